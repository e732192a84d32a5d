"""Samples to tokens, labels and batches, as the released trainer makes them, without its padding and its caches.

Shapes: B samples, T tokens, N images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from data_utils.errors import MMRoleError
from data_utils.images import find_image
from data_utils.prompts import SYSTEM_MESSAGE
from qwen_vl import QwenVLImageProcessor, QwenVLTokenizer
from qwen_vl.chat import make_context
from qwen_vl.loss import IGNORED
from qwen_vl.tokenization import IMAGE_SPAN

DEFAULT_SYSTEM = "You are a helpful assistant."
_NEXT_LINE = re.compile(r"(?<=\n)(?=\S)")


def preprocess(
    conversations: Sequence[Mapping[str, str]],
    tokenizer: QwenVLTokenizer,
    max_length: int = 3072,
    system: str = DEFAULT_SYSTEM,
) -> tuple[list[int], list[int]]:
    """Ids and labels of one training sample, not padded.

    Args:
        conversations: Turns `{"from": "user" or "assistant", "value": text}`; a leading assistant turn is dropped.
        tokenizer: The checkpoint's tokenizer.
        max_length: Tokens to keep, from the left; an image that would be cut in two is left out.
        system: published: this message, whatever the sample's own `system` says.

    Returns:
        Two lists of one length; a label is -100 where nothing is to be learned.

    Raises:
        ValueError: A turn is of nobody known, or an image tag is broken.

    Source: the released `finetune.py` (behaviour); DESIGN "What must stay", 2, 10 and 11.
    """
    newline = tokenizer.encode("\n")
    ids, labels = _turn(tokenizer, "system", system, newline, learned=False)
    turns = list(conversations)
    if turns and turns[0]["from"] != "user":
        turns = turns[1:]  # published: a leading assistant turn is dropped
    for turn in turns:
        if turn["from"] not in ("user", "assistant"):
            raise ValueError(f'a turn is "from" {turn["from"]!r}; it must be "user" or "assistant"')
        more_ids, more_labels = _turn(
            tokenizer, turn["from"], turn["value"], newline, learned=turn["from"] == "assistant"
        )
        ids += more_ids
        labels += more_labels
    end = _cut(ids, max_length, tokenizer)
    return ids[:end], labels[:end]


def _turn(
    tokenizer: QwenVLTokenizer, role: str, text: str, newline: list[int], *, learned: bool
) -> tuple[list[int], list[int]]:
    head = [*tokenizer.encode(role), *newline]
    # published: training reads every special token in the text, a typed <|im_end|> too.
    body = tokenizer.encode(text)
    ids = [tokenizer.im_start_id, *head, *body, tokenizer.im_end_id, *newline]
    # published: <|im_start|>, <|im_end|> and the newline after it count in every turn, the body in the assistant's.
    ignored_body = body if learned else [IGNORED] * len(body)
    labels = [tokenizer.im_start_id, *[IGNORED] * len(head), *ignored_body, tokenizer.im_end_id, *newline]
    return ids, labels


def _cut(ids: list[int], max_length: int, tokenizer: QwenVLTokenizer) -> int:
    """Where to cut: at `max_length`, or before the image span that reaches over it."""
    start = next((i for i in range(min(max_length, len(ids)) - 1, -1, -1) if ids[i] == tokenizer.img_start_id), None)
    if start is None or tokenizer.img_end_id in ids[start:max_length]:
        return max_length
    return start


class SupervisedDataset(Dataset):
    """Training samples, tokenized and their images decoded when they are asked for: in the loader's workers.

    Nothing is kept, so memory does not grow with the data. Use `data_utils.check` or the trainer's own check first: a
    sample that cannot be made is an error here, never silently another sample.

    Args:
        rows: Training samples, each with `id` and `conversations`.
        tokenizer: The checkpoint's tokenizer.
        data_root: Folder from which the samples' image paths (`images/…`) count.
        max_length: Tokens to keep of a sample.
        use_sample_system: Use the sample's `system` where it has one, instead of the published message.
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
        """Ids and labels of a sample, without its images."""
        row = self.rows[index]
        system = row.get("system") if self.use_sample_system else None
        return preprocess(row["conversations"], self.tokenizer, max_length or self.max_length, system or DEFAULT_SYSTEM)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample: `id`, `input_ids` and `labels` (lists), `pixel_values` (N, 3, size, size) or None.

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


def image_names(ids: Sequence[int], tokenizer: QwenVLTokenizer) -> list[str]:
    """The paths in the image spans of a sample's ids, in order."""
    starts = [i for i, token in enumerate(ids) if token == tokenizer.img_start_id]
    spans = (ids[start + 1 : start + 1 + IMAGE_SPAN] for start in starts)
    return [bytes(i for i in span if i != tokenizer.img_pad_id).decode("utf-8", errors="replace") for span in spans]


def image_path(data_root: str | Path, name: str) -> Path:
    """The file of an image that a training sample names, below the data root and nowhere else.

    Raises:
        FileNotFoundError: There is no such file.
        MMRoleError: The name leads out of the data root.
    """
    path = find_image(data_root, name, follow_links=True)
    if path is None:
        raise FileNotFoundError(f"no such image file: {Path(data_root) / name}")
    return path


@dataclass(frozen=True)
class PaddedCollator:
    """Samples to a rectangle, padded on the right with `<|endoftext|>` to the longest, or to `pad_to`.

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
    """Samples one after the other in one row, each seeing itself only: nothing is padded.

    Returns per batch `input_ids`, `labels`, `position_ids` (1, T), `segments` (lengths that sum to T), `pixel_values`
    if there are images, and `ids`.
    """

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        # The first token of a sample would be predicted from the sample before it; its label is not learned.
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


class LengthCounter:
    """Counts a sample's prompt and answer: tokens as the model reads them, or characters without a tokenizer.

    The tokenizer never joins what stands before and after a line's end, so that lines can be counted one by one and
    each only once; they come again in sample after sample.
    """

    def __init__(self, tokenizer: QwenVLTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}
        self._frame = 0
        if tokenizer is not None:
            ids = make_context(tokenizer, [{"image": "x"}, {"text": "T"}], system=SYSTEM_MESSAGE)[1]
            self._frame = len(ids) - self.count("T")

    def count(self, text: str) -> int:
        """Tokens of a plain text, or its characters."""
        if self._tokenizer is None:
            return len(text)
        return sum(map(self._line, _NEXT_LINE.split(text)))

    def prompt(self, text: str) -> int:
        """Tokens of the whole prompt: system message, picture and marks included; or characters of the text."""
        return self._frame + self.count(text)

    def _line(self, line: str) -> int:
        known = self._known.get(line)
        if known is None:
            assert self._tokenizer is not None
            known = self._known[line] = len(self._tokenizer.encode(line, allowed_special=()))
        return known
