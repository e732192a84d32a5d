"""The tiny checkpoint: the released layout, a lossless vocabulary, the same bytes each time."""

import importlib.util
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import ModuleType

import pytest
import torch

import qwen_vl
from data_utils.errors import MMRoleError
from qwen_vl.special_tokens import SPECIAL_TOKENS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_tiny_checkpoint.py"
SMALL = ["--hidden_size", "128", "--layers", "1", "--vision_layers", "1", "--ranks", "1200"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(script: ModuleType, demo: Path) -> Path:
    out = demo.parent / "checkpoint"
    script.main([str(out), "--corpus", str(demo), *SMALL])
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_folder_is_laid_out_as_a_released_one(checkpoint: Path):
    assert sorted(contents(checkpoint)) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",  # for AutoImageProcessor; the released folder has none
        "qwen.tiktoken",
        "tokenizer_config.json",
    ]


def test_ids_of_special_tokens_follow_the_ranks(checkpoint: Path):
    config, generation = (json.loads((checkpoint / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    tokenizer = qwen_vl.QwenVLTokenizer.from_pretrained(checkpoint)
    ranks = len((checkpoint / "qwen.tiktoken").read_text().splitlines())
    assert 256 < ranks <= 1200
    assert generation["eos_token_id"] == generation["pad_token_id"] == ranks == tokenizer.eod_id
    assert config["visual"]["image_start_id"] == ranks + 214 == tokenizer.img_start_id
    assert config["vocab_size"] % 64 == 0
    assert config["vocab_size"] > ranks + len(SPECIAL_TOKENS) == len(tokenizer)


def test_the_fields_are_the_released_ones(checkpoint: Path, shared: Path):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        released = json.loads((shared / "qwen_vl_chat" / name).read_text(encoding="utf-8"))
        missing = set(released) - set(json.loads((checkpoint / name).read_text())) - {"_name_or_path", "auto_map"}
        assert missing == set()


@pytest.mark.parametrize(
    "text",
    [
        "Ah, lovely! I see a red kite above the hill.",
        "哈哈！夜里湖面上有一艘橙色的小船。",
        "never in the corpus: Žluťoučký kůň, 🪁, \t\r\n  and\u00a0blanks ",
        "".join(map(chr, range(32, 1000))).replace("\u0340", "").replace("\u0341", "").replace("\u0343", ""),
    ],
)
def test_the_vocabulary_loses_nothing(checkpoint: Path, text: str):
    tokenizer = qwen_vl.QwenVLTokenizer.from_pretrained(checkpoint)
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_the_vocabulary_fits_the_corpus(checkpoint: Path, demo: Path):
    tokenizer = qwen_vl.QwenVLTokenizer.from_pretrained(checkpoint)
    samples = json.loads((demo / "data" / "train" / "train_85k.json").read_text(encoding="utf-8"))
    answers = [s["conversations"][1]["value"] for s in samples]
    tokens, size = (sum(map(len, part)) for part in (map(tokenizer.encode, answers), map(str.encode, answers)))
    assert size / tokens > 3  # bytes a token


def test_it_loads_and_talks_about_a_demo_picture(checkpoint: Path, demo: Path):
    model, tokenizer = qwen_vl.load(checkpoint)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    query = [{"image": str(demo / "images" / "中国唐代" / "01.jpg")}, {"text": "What do you see?"}]
    answers = [model.chat(tokenizer, query, seed=seed, max_new_tokens=8)[0] for seed in (1, 1, 2)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_the_same_seed_and_corpus_give_the_same_bytes(script: ModuleType, checkpoint: Path, demo: Path, tmp_path: Path):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    script.main([str(tmp_path / "same"), "--corpus", str(demo), *SMALL])
    assert torch.equal(torch.get_rng_state(), state)
    assert contents(tmp_path / "same") == contents(checkpoint)
    script.main([str(tmp_path / "other"), "--corpus", str(demo), *SMALL, "--seed", "1"])
    changed = {n for n, content in contents(tmp_path / "other").items() if content != contents(checkpoint)[n]}
    assert changed == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


@pytest.mark.slow
def test_the_command_makes_the_same_bytes_in_another_process(checkpoint: Path, demo: Path, tmp_path: Path):
    command = [sys.executable, SCRIPT, tmp_path / "again", "--corpus", demo, *SMALL]
    subprocess.run(list(map(str, command)), env=os.environ | {"PYTHONHASHSEED": "7"}, check=True, cwd=tmp_path)
    assert contents(tmp_path / "again") == contents(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--hidden_size", "192"], "does not divide"),
        (["--hidden_size", "128", "--heads", "3"], "does not divide"),
        (["--vision_width", "50", "--vision_heads", "4"], "does not divide"),
    ],
)
def test_sizes_that_do_not_fit_are_reported(
    script: ModuleType, demo: Path, tmp_path: Path, arguments: list[str], what: str
):
    with pytest.raises(MMRoleError, match=what):
        script.main([str(tmp_path / "out"), "--corpus", str(demo), *arguments])
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_and_a_corpus_without_text_are_refused(script: ModuleType, demo: Path, tmp_path: Path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(MMRoleError, match="not empty"):
        script.main([str(tmp_path), "--corpus", str(demo)])
    with pytest.raises(MMRoleError, match="no text"):
        script.main([str(tmp_path / "out"), "--corpus", str(tmp_path)])
