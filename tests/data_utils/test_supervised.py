"""Tokens and labels against the released trainer's, and what batches hold."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_utils.supervised import PackedCollator, PaddedCollator, SupervisedDataset, preprocess
from qwen_vl import QwenVLTokenizer

CONVERSATION = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"}]


@pytest.fixture(scope="module")
def golden_rows(shared: Path) -> list[dict]:
    return json.loads((shared / "golden" / "train" / "train.json").read_text(encoding="utf-8"))


def test_golden_ids_and_labels(shared: Path, golden_rows: list[dict]) -> None:
    released = QwenVLTokenizer.from_pretrained(shared / "qwen_vl_chat")
    golden = np.load(shared / "golden" / "train" / "preprocess.npz")
    checked = 0
    for max_length in (3072, 1024):
        for row, sample in enumerate(golden_rows):
            ids, labels = preprocess(sample["conversations"], released, max_length)
            assert ids == golden[f"{max_length}.{row}.input_ids"].tolist()
            assert labels == golden[f"{max_length}.{row}.labels"].tolist()
            checked += 1
    assert checked * 2 == len(golden.files)


def test_what_is_learned(tokenizer: QwenVLTokenizer) -> None:
    """published: the frame of every turn, and the assistant's body."""
    ids, labels = preprocess(CONVERSATION, tokenizer, system="S")
    kept = tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != -100])
    end = "<|im_start|><|im_end|>\n"
    assert tokenizer.decode(ids) == "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in (("system", "S"), ("user", "Hi"), ("assistant", "Yo"))
    )
    assert kept == end + end + "<|im_start|>Yo<|im_end|>\n"
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))


def test_leading_assistant_turn_is_dropped(tokenizer: QwenVLTokenizer) -> None:
    assert preprocess([{"from": "assistant", "value": "x"}, *CONVERSATION], tokenizer) == preprocess(
        CONVERSATION, tokenizer
    )


def test_unknown_speaker(tokenizer: QwenVLTokenizer) -> None:
    with pytest.raises(ValueError, match="'narrator'"):
        preprocess([*CONVERSATION, {"from": "narrator", "value": "x"}], tokenizer)


def test_an_image_is_never_cut_in_two(tokenizer: QwenVLTokenizer) -> None:
    conversation = [{"from": "user", "value": "Picture 1: <img>images/a.png</img>\nWho?"}, CONVERSATION[1]]
    whole, _ = preprocess(conversation, tokenizer)
    start = whole.index(tokenizer.img_start_id)
    for max_length in (start, start + 1, start + 100, start + 257):
        ids, labels = preprocess(conversation, tokenizer, max_length)
        assert len(ids) == len(labels) == start
    ids, _ = preprocess(conversation, tokenizer, start + 258)
    assert ids == whole[: start + 258]
    assert preprocess(conversation, tokenizer, len(whole) - 1)[0] == whole[:-1]


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: QwenVLTokenizer) -> SupervisedDataset:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "images" / "红.png")
    picture = [{"from": "user", "value": "Picture 1: <img>images/红.png</img>\nWho?"}, CONVERSATION[1]]
    rows = [
        {"id": "text", "system": "Be brief.", "conversations": CONVERSATION},
        {"id": "picture", "conversations": picture},
    ]
    return SupervisedDataset(rows, tokenizer, data_root=tmp_path, max_length=400)


def test_batches(dataset: SupervisedDataset, tokenizer: QwenVLTokenizer) -> None:
    samples = [dataset[0], dataset[1]]
    lengths = [len(sample["input_ids"]) for sample in samples]
    padded = PaddedCollator(tokenizer.pad_token_id)(samples)
    assert padded["input_ids"].shape == padded["labels"].shape == (2, max(lengths))
    assert padded["attention_mask"].sum(-1).tolist() == lengths
    assert (padded["labels"][padded["attention_mask"] == 0] == -100).all()
    assert PaddedCollator(tokenizer.pad_token_id, pad_to=400)(samples)["input_ids"].shape == (2, 400)
    packed = PackedCollator()(samples)
    assert packed["segments"] == lengths
    assert packed["input_ids"].tolist() == [samples[0]["input_ids"] + samples[1]["input_ids"]]
    assert packed["labels"][0, [0, lengths[0]]].tolist() == [-100, -100]
    assert packed["position_ids"][0, [0, lengths[0] - 1, lengths[0]]].tolist() == [0, lengths[0] - 1, 0]
    for batch in (padded, packed):
        assert batch["ids"] == ["text", "picture"]
        assert torch.equal(batch["pixel_values"], samples[1]["pixel_values"])
    assert "pixel_values" not in PackedCollator()(samples[:1])


def test_system_message_of_the_sample_only_on_demand(dataset: SupervisedDataset, tokenizer) -> None:
    """published: training uses its own system message."""
    assert "You are a helpful assistant." in tokenizer.decode(dataset[0]["input_ids"])
    dataset.use_sample_system = True
    assert "Be brief." in tokenizer.decode(dataset[0]["input_ids"])
    assert "You are a helpful assistant." in tokenizer.decode(dataset[1]["input_ids"])


@pytest.mark.parametrize(
    ("path", "message"),
    [("images/gone.png", "no such image"), ("../secret.png", "climb out"), ("/etc/passwd", "absolute")],
)
def test_images_only_from_below_the_data_root(dataset: SupervisedDataset, path: str, message: str) -> None:
    dataset.rows[1]["conversations"][0]["value"] = f"Picture 1: <img>{path}</img>\nWho?"
    with pytest.raises(ValueError, match=f"sample picture cannot be made(.|\n)*{message}"):
        dataset[1]
