"""The model against what the released code computed: logits, hidden states, image features, greedy and sampled text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import qwen_vl
from qwen_vl.vision import sincos_positions
from tests.golden_checkpoint import GOLDEN, write_golden_checkpoint

CASES = ("text_short", "one_image", "two_images", "len_2047", "len_2048", "len_2049", "len_3000")
LOGITS = 2e-4  # absolute; the logits have deviation 1


@pytest.fixture(scope="module")
def golden() -> np.lib.npyio.NpzFile:
    return np.load(GOLDEN / "forward.npz")


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> qwen_vl.QwenVLForCausalLM:
    folder = write_golden_checkpoint(tmp_path_factory.mktemp("golden") / "tiny_a")
    return qwen_vl.QwenVLForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def loaded(tiny_a: Path):
    return qwen_vl.load(tiny_a, dtype=torch.float32, device="cpu")


def test_bin_shards_hold_the_same(golden_model, tmp_path: Path) -> None:
    """The other kind of shard gives the same weights, so that all below holds for both."""
    folder = write_golden_checkpoint(tmp_path / "tiny_a", "bin")
    assert len(list(folder.glob("pytorch_model-*.bin"))) == 2
    model = qwen_vl.QwenVLForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = golden_model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def _pixels(ids: torch.Tensor) -> torch.Tensor | None:
    """The pictures of a prompt: after <img> come the bytes of a path, then the padding."""
    config = qwen_vl.QwenVLConfig()
    flat = ids.flatten().tolist()
    paths = []
    for start in (place for place, token in enumerate(flat) if token == config.image_start_id):
        end = flat.index(config.image_end_id + 1, start)  # <imgpad>
        paths.append(GOLDEN / bytes(flat[start + 1 : end]).decode())
    return qwen_vl.QwenVLImageProcessor().load_all(paths)


def test_sincos_table() -> None:
    golden = np.load(GOLDEN / "sincos.npz")["dim128_grid16"]
    np.testing.assert_allclose(sincos_positions(128, 16), golden, atol=1e-6, rtol=0)


@torch.no_grad()
def test_vision(golden_model, golden) -> None:
    for name in ("rgb_640x480.png", "rgba_256x512.png"):
        pixels = qwen_vl.QwenVLImageProcessor().load(GOLDEN / "images" / name)
        features = golden_model.transformer.visual(pixels[None])
        assert features.shape == (1, 256, 128)
        np.testing.assert_allclose(features[0], golden[f"vision.{name}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward_and_greedy(golden_model, golden, case: str) -> None:
    model = golden_model
    ids = torch.from_numpy(golden[f"{case}.ids"]).long()[None]
    positions = golden[f"{case}.positions"]
    pixels = _pixels(ids)
    out = model(ids, pixel_values=pixels, use_cache=True)
    np.testing.assert_allclose(
        out.logits[0, positions][:, golden["vocab_probe"]], golden[f"{case}.logits"], atol=LOGITS
    )
    hidden = model.transformer(ids, pixel_values=pixels).last_hidden_state
    np.testing.assert_allclose(hidden[0, positions], golden[f"{case}.hidden_last"], atol=LOGITS)
    top = out.logits[0, -1].topk(20)
    assert top.indices.tolist() == golden[f"{case}.top_ids"].tolist()
    np.testing.assert_allclose(top.values, golden[f"{case}.top_logits"], atol=LOGITS)

    for step, token in enumerate(golden[f"{case}.greedy"].tolist()):  # the golden logits follow the token of their step
        assert out.logits[0, -1].argmax() == token
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        probe = out.logits[0, -1, golden["vocab_probe"]]
        np.testing.assert_allclose(probe, golden[f"{case}.greedy_logits"][step], atol=LOGITS)
    generated = model.generate(ids, pixel_values=pixels, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert generated[0, ids.shape[1] :].tolist() == golden[f"{case}.greedy"].tolist()


def test_eager_agrees_with_sdpa(golden, tmp_path: Path) -> None:
    folder = write_golden_checkpoint(tmp_path / "tiny_a")
    model = qwen_vl.QwenVLForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.from_numpy(golden["one_image.ids"]).long()[None]
    with torch.no_grad():
        logits = model(ids, pixel_values=_pixels(ids)).logits[0, golden["one_image.positions"]]
    np.testing.assert_allclose(logits[:, golden["vocab_probe"]], golden["one_image.logits"], atol=LOGITS)


def test_chat_greedy_and_sampled(shared: Path, loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    monkeypatch.chdir(shared / "golden")  # the images are named relative to this folder
    cases = json.loads((shared / "golden" / "tiny_a" / "chat.json").read_text(encoding="utf-8"))
    assert {case["mode"] for case in cases} == {"greedy", "sample"}
    for case in cases:
        settings = {"do_sample": case["mode"] == "sample", "max_new_tokens": case["max_new_tokens"]}
        context = {"history": case["history"], "system": case["system"]}
        torch.manual_seed(case["seed"])
        response, history = model.chat(tokenizer, case["query"], **context, **settings)
        assert response == case["response"]
        assert history == [*case["history"], (case["query"], response)]


def test_chat_seed_leaves_the_global_state_alone(shared: Path, loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    cases = json.loads((shared / "golden" / "tiny_a" / "chat.json").read_text(encoding="utf-8"))
    case = next(c for c in cases if c["mode"] == "sample" and "<img>" not in c["query"])
    torch.manual_seed(99)
    before = torch.get_rng_state()
    settings = {"system": case["system"], "do_sample": True, "max_new_tokens": case["max_new_tokens"]}
    assert model.chat(tokenizer, case["query"], seed=case["seed"], **settings)[0] == case["response"]
    assert torch.equal(torch.get_rng_state(), before)


def test_chat_contexts(shared: Path, loaded) -> None:
    _, tokenizer = loaded
    golden = json.loads((shared / "golden" / "tokenizer.json").read_text(encoding="utf-8"))["chat_context"]
    for case in golden:
        context = {key: case[key] for key in ("history", "system", "max_window_size")}
        text, ids = qwen_vl.chat.make_context(tokenizer, case["query"], **context)
        assert text == case["raw_text"]
        assert ids == case["ids"]


def test_the_released_853_weights(shared: Path) -> None:
    index = json.loads((shared / "qwen_vl_chat" / "pytorch_model.bin.index.json").read_text())
    config = qwen_vl.QwenVLConfig.from_pretrained(shared / "qwen_vl_chat")
    with torch.device("meta"):
        model = qwen_vl.QwenVLForCausalLM(config).to(torch.bfloat16)
    state = model.state_dict()
    assert set(state) == set(index["weight_map"])
    assert len(state) == 853
    assert (
        sum(t.numel() * t.element_size() for t in state.values()) == index["metadata"]["total_size"] == 19_313_870_336
    )
