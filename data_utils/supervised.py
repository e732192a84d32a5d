"""Tokens and labels of a sample, as the released trainer makes them, without its padding and its caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_utils.images import find_image
from data_utils.prompts import TRAINING_SYSTEM
from qwen_vl import QwenVLTokenizer
from qwen_vl.loss import IGNORED
from qwen_vl.special_tokens import IMAGE_SPAN


def preprocess(
    conversations: Sequence[Mapping[str, str]],
    tokenizer: QwenVLTokenizer,
    max_length: int = 3072,
    system: str = TRAINING_SYSTEM,
) -> tuple[list[int], list[int]]:
    """Return ids and labels of one training sample, not padded.

    Args:
        conversations: Turns `{"from": "user" or "assistant", "value": text}`; a leading assistant turn is dropped.
        tokenizer: The checkpoint's tokenizer.
        max_length: Tokens to keep, from the left; an image that would be cut in two is left out.
        system: published: this message, whatever the sample's own `system` says.

    Returns:
        Two lists of one length; a label is -100 where nothing is learned.

    Raises:
        ValueError: A turn is neither the user's nor the assistant's, or an image tag is broken.

    Source: the released `finetune.py` (behaviour).
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
    """Return where to cut: at `max_length`, or before the image span that reaches over it."""
    start = next((i for i in range(min(max_length, len(ids)) - 1, -1, -1) if ids[i] == tokenizer.img_start_id), None)
    if start is None or tokenizer.img_end_id in ids[start:max_length]:
        return max_length
    return start


def image_names(ids: Sequence[int], tokenizer: QwenVLTokenizer) -> list[str]:
    """Return the paths in the image spans of a sample's ids, in order."""
    starts = [i for i, token in enumerate(ids) if token == tokenizer.img_start_id]
    spans = (ids[start + 1 : start + 1 + IMAGE_SPAN] for start in starts)
    return [bytes(i for i in span if i != tokenizer.img_pad_id).decode("utf-8", errors="replace") for span in spans]


def image_path(data_root: str | Path, name: str) -> Path:
    """Return the file of an image that a training sample names, which must lie below the data root.

    Raises:
        FileNotFoundError: There is no such file.
        MMRoleError: The name leads out of the data root.
    """
    path = find_image(data_root, name, follow_links=True)
    if path is None:
        raise FileNotFoundError(f"no such image file: {Path(data_root) / name}")
    return path
