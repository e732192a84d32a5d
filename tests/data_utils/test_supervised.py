"""Tokens and labels against the released trainer's."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_utils.supervised import preprocess
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
