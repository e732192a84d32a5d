"""The samples of a run: tokenizing, collating, their order, and the groups of the loss."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data_utils.errors import MMRoleError
from data_utils.prompts import TRAINING_SYSTEM
from data_utils.schema import Row
from data_utils.supervised import image_names, image_path, preprocess
from qwen_vl import QwenVLImageProcessor, QwenVLTokenizer
from qwen_vl.loss import IGNORED

_BETWEEN_ROWS = re.compile(r"[\s,\[]*", re.ASCII)


class FileRows(Sequence[Row]):
    """Rows of a data file that stay text, each parsed when it is asked for.

    A forked worker shares the parent's memory until a page is written; merely reading a Python object writes its
    reference count, so that lists of dicts end up as one copy per worker. Text and an array have two reference counts.

    Args:
        content: The file's bytes.
        spans: Begin and end of each row in them, see `row_spans`.
    """

    def __init__(self, content: bytes, spans: Sequence[Sequence[int]]) -> None:
        self._content = content
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def spans(self) -> list[list[int]]:
        """Begin and end of each row in the file."""
        return self._spans.tolist()

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        begin, end = self._spans[index].tolist()
        return json.loads(self._content[begin:end])

    def taken(self, indices: Sequence[int]) -> FileRows:
        """Returns some of the rows."""
        return FileRows(self._content, self._spans[indices])


def row_spans(content: bytes) -> list[tuple[int, int]]:
    """Returns where each row begins and ends in the bytes of a data file.

    Args:
        content: A JSON list of objects, or one object a line; valid.
    """
    text, decoder = content.decode("utf-8-sig"), json.JSONDecoder()
    spans, place = [], 0
    at = len(content) - len(text.encode())  # a byte order mark
    while (begin := _BETWEEN_ROWS.match(text, place).end()) < len(text) and text[begin] == "{":
        end = decoder.raw_decode(text, begin)[1]
        at += begin - place  # what is between rows is ASCII
        spans.append((at, at := at + len(text[begin:end].encode())))
        place = end
    return spans


class SupervisedDataset(Dataset):
    """Training samples, tokenized and with their images decoded on access: in the loader's workers.

    Nothing is kept, so memory does not grow with the data. Use `data_utils.check` or the trainer's own check first: a
    sample that cannot be made is an error here, never silently replaced.

    Args:
        rows: Training samples, each with `id` and `conversations`.
        tokenizer: The checkpoint's tokenizer.
        data_root: Folder from which the samples' image paths (`images/…`) count.
        max_length: Tokens to keep of a sample.
        use_sample_system: Use the sample's `system` if it has one, instead of the published message.
        image_size: Side of the model's square images, in pixels.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: QwenVLTokenizer,
        *,
        data_root: str | Path,
        max_length: int = 3072,
        use_sample_system: bool = False,
        image_size: int = 448,
    ) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.data_root = Path(data_root)
        self.max_length = max_length
        self.use_sample_system = use_sample_system
        self.processor = QwenVLImageProcessor(image_size)

    def __len__(self) -> int:
        return len(self.rows)

    def tokens(self, index: int, max_length: int | None = None) -> tuple[list[int], list[int]]:
        """Returns the ids and labels of a sample, without its images."""
        row = self.rows[index]
        system = row.get("system") if self.use_sample_system else None
        return preprocess(
            row["conversations"], self.tokenizer, max_length or self.max_length, system or TRAINING_SYSTEM
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a sample: `id`, `input_ids` and `labels` (lists), `pixel_values` (N, 3, size, size) or None.

        Raises:
            ValueError: An image is missing or broken, or a tag is; names the sample.
        """
        row = self.rows[index]
        try:
            ids, labels = self.tokens(index)
            images = [image_path(self.data_root, name) for name in image_names(ids, self.tokenizer)]
            pixels = self.processor.load_all(images)
        except (OSError, ValueError, MMRoleError) as error:
            raise ValueError(f"sample {row.get('id', index)} cannot be made: {error}") from error
        return {"id": str(row.get("id", index)), "input_ids": ids, "labels": labels, "pixel_values": pixels}


@dataclass(frozen=True)
class PaddedCollator:
    """Collates samples into a rectangle, padded on the right with `<|endoftext|>` to the longest, or to `pad_to`.

    Returns per batch `input_ids`, `labels`, `attention_mask` (B, T), `pixel_values` if there are images, and `ids`.
    """

    pad_id: int
    pad_to: int | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        width = max(self.pad_to or 0, *(len(sample["input_ids"]) for sample in samples))
        gaps = [width - len(sample["input_ids"]) for sample in samples]
        pairs = list(zip(samples, gaps, strict=True))
        return {
            "input_ids": torch.tensor([[*s["input_ids"], *[self.pad_id] * gap] for s, gap in pairs]),
            "labels": torch.tensor([[*s["labels"], *[IGNORED] * gap] for s, gap in pairs]),
            "attention_mask": torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps]),
            **_images_and_ids(samples),
        }


@dataclass(frozen=True)
class PackedCollator:
    """Collates samples into one row without padding, each seeing only itself.

    Returns per batch `input_ids`, `labels`, `position_ids` (1, T), `segments` (lengths that sum to T), `pixel_values`
    if there are images, and `ids`.
    """

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        # The first token of a sample would be predicted from the sample before, so its label is ignored.
        labels = [i for sample in samples for i in (IGNORED, *sample["labels"][1:])]
        return {
            "input_ids": torch.tensor([[i for sample in samples for i in sample["input_ids"]]]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "segments": lengths,
            **_images_and_ids(samples),
        }


def _images_and_ids(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pixels = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
    ids = [sample["id"] for sample in samples]
    return {"pixel_values": torch.cat(pixels), "ids": ids} if pixels else {"ids": ids}


def filled_length(samples: int, multiple: int) -> int:
    """Returns the number of samples after filling up to a multiple."""
    return math.ceil(samples / multiple) * multiple


@dataclass(frozen=True)
class Order:
    """The stream of samples: one permutation per epoch, filled up by repeating its own beginning, epochs joined.

    published: update u takes positions u * step to (u + 1) * step - 1 of the stream; there are epochs * floor(filled /
    step) updates, so none is incomplete, on any number of processes.

    Attributes:
        samples: Samples of the training file.
        multiple: Every epoch is filled up to a multiple of this.
        step: Samples of an update.
        epochs: Epochs to train; may be a fraction.
        max_steps: Updates, if above 0; then the epochs do not count.
        seed: Decides, with the epoch's number, its permutation; None keeps the order of the file.
    """

    samples: int
    multiple: int
    step: int
    epochs: float
    max_steps: int
    seed: int | None

    @property
    def filled(self) -> int:
        """Samples of an epoch."""
        return filled_length(self.samples, self.multiple)

    @property
    def updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * (self.filled // self.step))

    def ends_epoch(self, update: int) -> bool:
        """Returns whether the next update begins in another epoch, or there is none; the released trainer saves there.

        Args:
            update: Updates done.
        """
        epoch = max(1, math.ceil(update * self.step / self.filled))
        return update >= self.updates or epoch * self.filled < (update + 1) * self.step

    def epoch_ends(self) -> int:
        """Returns the number of updates after which `ends_epoch` holds."""
        return sum(self.ends_epoch(update) for update in range(1, self.updates + 1))

    def sample(self, position: int) -> int:
        """Returns the index in the training file of the sample at a position of the stream."""
        epoch, place = divmod(position, self.filled)
        place %= self.samples
        return place if self.seed is None else int(_permutation(self.samples, self.seed, epoch)[place])


@lru_cache(maxsize=2)
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(samples)


class Stream(Dataset):
    """The samples of a run by their position in the stream, which each has as `position`.

    Args:
        dataset: The training samples.
        order: Their order.
    """

    def __init__(self, dataset: Dataset, order: Order) -> None:
        self.dataset = dataset
        self.order = order

    def __len__(self) -> int:
        return self.order.updates * self.order.step

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.dataset[self.order.sample(position)], "position": position}


class FilledDataset(Dataset):
    """Samples to evaluate on, filled up so that every process gets equally many batches; added samples have no labels.

    Args:
        dataset: The samples.
        multiple: What their number is filled up to a multiple of.
    """

    def __init__(self, dataset: Dataset, multiple: int) -> None:
        self.dataset = dataset
        self.multiple = multiple

    def __len__(self) -> int:
        return filled_length(len(self.dataset), self.multiple)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index % len(self.dataset)]
        if index < len(self.dataset):
            return sample
        return {**sample, "labels": [IGNORED] * len(sample["labels"])}


@dataclass(frozen=True)
class StreamCollator:
    """Collates samples of a stream, with their positions in it and their numbers of supervised tokens.

    Attributes:
        collate: Makes the batch itself.
    """

    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        supervised = [sum(label != IGNORED for label in sample["labels"][1:]) for sample in samples]
        positions = [sample["position"] for sample in samples]
        return {
            **self.collate(samples),
            "positions": torch.tensor(positions),
            "supervised": torch.tensor(supervised),
        }


def loss_divisors(
    batches: Sequence[Mapping[str, Any]],
    *,
    step: int,
    group: int,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """Returns what to divide the loss of each sample's tokens by, so that an update's sum is its loss.

    published: the loss of an update is the mean over its groups of the mean over each group's supervised tokens. A
    repeated sample counts twice, a group without supervised tokens counts 0.

    Args:
        batches: This process's micro-batches of an update, as `StreamCollator` makes them.
        step: Samples of an update, over all processes.
        group: Number of consecutive samples in a group.
        sum_over_processes: Sums a tensor over all processes.

    Returns:
        Per micro-batch int64 (samples,).
    """
    groups = [batch["positions"] % step // group for batch in batches]
    tokens = torch.zeros(step // group, dtype=torch.long, device=groups[0].device)
    for place, batch in zip(groups, batches, strict=True):
        tokens.index_add_(0, place, batch["supervised"])
    divisors = len(tokens) * sum_over_processes(tokens).clamp(min=1)
    return [divisors[place] for place in groups]
