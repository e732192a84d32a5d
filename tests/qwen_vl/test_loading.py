"""Checkpoint folders: what is saved loads again, in the released layout; damaged ones say what is wrong."""

import base64
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import qwen_vl
from qwen_vl import QwenVLForCausalLM, QwenVLTokenizer, loading
from qwen_vl.generation import BatchGenerator
from tests.conftest import RANKS
from tests.qwen_vl.conftest import small_config, small_model

AUTO_MAP = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
NEVER = "raise SystemExit('code of a checkpoint must never run')\n"


@pytest.fixture
def base(tmp_path: Path, tokenizer: QwenVLTokenizer) -> Path:
    """A checkpoint as it is released: auto_map, code files, generation settings of its own."""
    folder = tmp_path / "base"
    model = small_model(auto_map=AUTO_MAP, no_bias=True, tokenizer_type="QWenTokenizer")
    settings = {"do_sample": True, "top_p": 0.3, "top_k": 0, "chat_format": "chatml", "max_window_size": 6144}
    model.generation_config = GenerationConfig(**settings)
    folder.mkdir()
    for name in ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py"):
        (folder / name).write_text(NEVER)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shard", ["50GB", "100KB"])
def test_save_and_load_round_trip(base: Path, tmp_path: Path, shard: str) -> None:
    model, tokenizer = qwen_vl.load(base, device="cpu")
    out = tmp_path / "saved"
    model.save_pretrained(out, max_shard_size=shard)
    tokenizer.save_pretrained(out)
    assert (out / "model.safetensors.index.json").is_file() == (shard == "100KB")
    again, _ = qwen_vl.load(out, device="cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for name in ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py"):
        assert (out / name).read_text() == NEVER
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["QWenLMHeadModel"]
    assert config["model_type"] == "qwen"
    assert config["torch_dtype"] == "float32"
    assert config["tokenizer_type"] == "QWenTokenizer"
    assert json.loads((out / "generation_config.json").read_text())["chat_format"] == "chatml"


def test_released_config_survives(shared: Path, tmp_path: Path) -> None:
    """Every field of the released config.json comes back as it was, but auto_map without the code that it names."""
    released = json.loads((shared / "qwen_vl_chat" / "config.json").read_text())
    qwen_vl.QwenVLConfig.from_pretrained(shared / "qwen_vl_chat").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    changed = {key for key, value in released.items() if saved.get(key) != value}
    assert changed == {"_name_or_path", "transformers_version", "auto_map"}


def test_dtype_auto_and_named(base: Path) -> None:
    assert qwen_vl.load(base)[0].dtype == torch.float32
    assert qwen_vl.load(base, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no such dtype: 'int8'"):
        qwen_vl.load(base, dtype="int8")


def test_lora_folder_goes_onto_its_base(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = qwen_vl.load(base, device="cpu")
    lora = peft.LoraConfig(r=4, target_modules=["c_attn", "w1"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    ids = torch.tensor([tokenizer.encode("who are you")])
    with torch.no_grad():
        expected = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, _ = qwen_vl.load(tmp_path / "adapter", device="cpu")
    assert isinstance(loaded, QwenVLForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(FileNotFoundError, match="not a checkpoint folder here: /gone"):
        qwen_vl.load(tmp_path / "adapter")


@pytest.mark.parametrize("lost", ["config.json", "qwen.tiktoken", "model.safetensors"])
def test_incomplete_folder(base: Path, lost: str) -> None:
    (base / lost).unlink()
    with pytest.raises(FileNotFoundError, match=lost.removesuffix(".safetensors")):
        qwen_vl.load(base)


def test_missing_folder_and_missing_shard(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        qwen_vl.load(tmp_path / "nowhere")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        qwen_vl.load(base)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_broken_config(base: Path, name: str) -> None:
    (base / name).write_text('{"model_max_length": ')
    with pytest.raises(ValueError, match=f"not a JSON file: .*{name}"):
        qwen_vl.load(base)


def test_missing_weights_are_never_drawn_at_random(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["transformer.h.1.mlp.w2.weight"], weights["transformer.visual.proj"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 of \d+ weights: transformer.h.1.mlp.w2.weight, transformer.vis"):
        qwen_vl.load(base)


@pytest.mark.parametrize("part", ["decoder", "vision tower"])
def test_layers_that_the_config_leaves_out(base: Path, part: str) -> None:
    config = json.loads((base / "config.json").read_text())
    if part == "decoder":
        config["num_hidden_layers"] -= 1
    else:
        config["visual"]["layers"] -= 1
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weights of layers that its config.json does not have: transformer\."):
        qwen_vl.load(base)


def test_vocabulary_of_another_length(base: Path) -> None:
    """As one cut at the end of a line: its ranks have no gap, and every special token has another number."""
    with (base / "qwen.tiktoken").open("a") as vocabulary:
        vocabulary.write(f"{base64.b64encode(b'ab').decode()} {RANKS}\n")
    with pytest.raises(ValueError, match="do not belong together: <img> is"):
        qwen_vl.load(base)


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:99", "is not here: this torch"), ("graphics", "no such device: 'graphics'")]
)
def test_device_that_is_not_here(base: Path, device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before the weights are read."""
    monkeypatch.setattr(QwenVLForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        qwen_vl.load(base, device=device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_channels": 16}, "must be hidden_size 128"),
        ({"vocab_size": 300}, "outside vocab_size 300"),
        ({"hidden_size": 256, "kv_channels": 64}, "visual.output_dim 128"),
        ({"visual": {"heads": 2, "colour": 1}}, r"see to \['colour', 'image_size'"),
    ],
)
def test_sizes_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**change)


def test_bin_with_a_pickle_is_refused(base: Path, tmp_path: Path) -> None:
    """`.bin` shards are read with weights_only: an object in one is an error, and is never built."""
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    qwen_vl.load(base, device="cpu")
    marker = tmp_path / "ran"
    writer = f"""
import os, sys, torch
class Evil:
    def __reduce__(self):
        return (os.mknod, ({str(marker)!r},))
torch.save({{"lm_head.weight": Evil()}}, {str(base / "pytorch_model.bin")!r})
"""
    subprocess.run([sys.executable, "-c", writer], check=True)
    with pytest.raises(Exception, match=r"weights_only|Weights only|Unsupported"):
        qwen_vl.load(base, device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_spread_over_cpu_and_disk(
    base: Path, tmp_path: Path, picture: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over two small GPUs: chat, stream and generate give what they give on one device; the engine refuses."""
    pytest.importorskip("accelerate")
    whole, tokenizer = qwen_vl.load(base, device="cpu")
    if kind == "bin":  # as the released weights are
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parts = {"transformer.wte": "disk", "transformer.visual": "disk", "transformer.ln_f": "cpu", "lm_head": "disk"}
    parts |= {"transformer.h.0": "cpu", "transformer.h.1": "disk"}
    spread, _ = qwen_vl.load(base, device_map=parts)
    assert {parameter.device.type for parameter in spread.parameters()} == {"cpu", "meta"}
    query, greedy = [{"image": picture}, {"text": "Who?"}], {"do_sample": False, "max_new_tokens": 4}
    assert spread.chat(tokenizer, query, **greedy) == whole.chat(tokenizer, query, **greedy)
    assert list(spread.chat_stream(tokenizer, "Hi", **greedy)) == list(whole.chat_stream(tokenizer, "Hi", **greedy))
    ids = torch.tensor([tokenizer.encode("Who are you?")])
    assert torch.equal(spread.generate(ids, **greedy), whole.generate(ids, **greedy))
    with pytest.raises(ValueError, match="the whole model on one device"):
        BatchGenerator(spread, tokenizer)
    assert len(list(tmp_path.glob("qwen_vl_*"))) == (kind == "bin")
    del spread
    gc.collect()
    assert not list(tmp_path.glob("qwen_vl_*"))


def test_device_map_auto_and_quantization(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    model, _ = qwen_vl.load(base, device_map="auto")
    assert model.is_on_one_device
    with pytest.raises(ValueError, match="no such quantization: '3bit'"):
        qwen_vl.load(base, quantization="3bit")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes"):
        qwen_vl.load(base, quantization="4bit")
    with pytest.raises(ValueError, match="needs the package accelerate"):
        qwen_vl.load(base, device_map="auto")


def test_modules_that_must_stay_whole_across_devices() -> None:
    """accelerate's device map for two small devices cuts between the declared blocks only."""
    accelerate = pytest.importorskip("accelerate")
    with torch.device("meta"):
        model = QwenVLForCausalLM(small_config(num_hidden_layers=4))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    device_map = accelerate.infer_auto_device_map(
        model, max_memory={0: int(size * 0.6), 1: size}, no_split_module_classes=list(model._no_split_modules)
    )
    assert set(device_map.values()) == {0, 1}
    whole = [name for name, m in model.named_modules() if type(m).__name__ in model._no_split_modules]
    assert whole
    for name in whole:
        assert not any(entry.startswith(f"{name}.") for entry in device_map), (name, device_map)
