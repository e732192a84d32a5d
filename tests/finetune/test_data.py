"""The order of samples, the divisors that make their tokens' losses the loss of a step, rows as bytes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finetune.data import (
    FileRows,
    FilledDataset,
    Order,
    PackedCollator,
    PaddedCollator,
    Stream,
    SupervisedDataset,
    loss_divisors,
    row_spans,
)
from qwen_vl import QwenVLTokenizer

AGENT = Order(85_456, multiple=64, step=256, epochs=3, max_steps=-1, seed=42)
REWARD_MODEL = Order(23_200, multiple=32, step=256, epochs=10, max_steps=-1, seed=42)


def test_updates_of_the_published_data() -> None:
    assert (AGENT.filled, AGENT.updates) == (85_504, 1002)
    assert (REWARD_MODEL.filled, REWARD_MODEL.updates) == (23_200, 900)


def test_saves_at_the_ends_of_epochs() -> None:
    """Where an epoch ends within an update, before that update, as the released trainer does."""
    assert [n for n in range(1, 1003) if AGENT.ends_epoch(n)] == [334, 668, 1002]
    expected = [90, 181, 271, 362, 453, 543, 634, 725, 815, 900]
    assert [n for n in range(1, 901) if REWARD_MODEL.ends_epoch(n)] == expected


def test_each_epoch_is_another_permutation_that_repeats_its_beginning() -> None:
    order = Order(10, multiple=4, step=4, epochs=3, max_steps=-1, seed=7)
    epochs = [[order.sample(12 * epoch + place) for place in range(12)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch[:10]) == list(range(10))
        assert epoch[10:] == epoch[:2]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = Order(10, multiple=4, step=6, epochs=9, max_steps=-1, seed=7)
    assert [again.sample(position) for position in range(36)] == [sample for epoch in epochs for sample in epoch]
    other = Order(10, multiple=4, step=4, epochs=3, max_steps=-1, seed=8)
    assert [other.sample(position) for position in range(12)] != epochs[0]


def test_fewer_samples_than_the_multiple_are_repeated_as_often_as_it_takes() -> None:
    order = Order(3, multiple=8, step=4, epochs=1, max_steps=-1, seed=None)
    assert [order.sample(position) for position in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_steps_and_parts_of_epochs() -> None:
    assert Order(24, multiple=4, step=4, epochs=1.5, max_steps=-1, seed=0).updates == 9
    assert Order(24, multiple=4, step=4, epochs=1.5, max_steps=50, seed=0).updates == 50
    rows = [{"id": i} for i in range(24)]
    stream = Stream(rows, Order(24, multiple=4, step=4, epochs=2, max_steps=-1, seed=0))
    assert len(stream) == 48
    assert [stream[i]["position"] for i in range(48)] == list(range(48))
    assert set(Counter(stream[i]["id"] for i in range(48)).values()) == {2}


def test_divisors_make_means_over_groups() -> None:
    """Two groups of two samples, one without anything to learn, in micro-batches that cut across them."""
    batches = [
        {"positions": torch.tensor([4, 5, 6]), "supervised": torch.tensor([3, 1, 0])},
        {"positions": torch.tensor([7]), "supervised": torch.tensor([0])},
    ]
    found = loss_divisors(batches, step=4, group=2, sum_over_processes=lambda counts: counts)
    assert found[0].tolist() == [8, 8, 2]
    assert found[1].tolist() == [2]


def test_what_fills_up_an_evaluation_has_no_labels() -> None:
    filled = FilledDataset([{"labels": [1, 2]}, {"labels": [3]}, {"labels": [4]}], 2)
    assert [filled[i]["labels"] for i in range(len(filled))] == [[1, 2], [3], [4], [-100, -100]]


@pytest.mark.parametrize("layout", [{"indent": 4}, {"separators": (",", ":")}, "lines"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_rows_come_back_as_they_were(layout: Any, mark: str) -> None:
    rows = [{"id": "a", "value": "一幅画 [{,"}, {"id": "b", "nested": [1, {"x": None}]}, {"id": "c"}]
    one = lambda value: json.dumps(value, ensure_ascii=False, **({} if layout == "lines" else layout))  # noqa: E731
    text = "\n\n".join(map(one, rows)) + "\n" if layout == "lines" else one(rows)
    content = f"{mark}{text}".encode()
    kept = FileRows(content, row_spans(content))
    assert list(kept) == rows
    assert kept[-1] == rows[-1]
    assert list(kept.taken([2, 0])) == [rows[2], rows[0]]
    with pytest.raises(IndexError):
        kept[3]
    assert len(FileRows(b"[]", row_spans(b"[]"))) == 0


CONVERSATION = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"}]


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
