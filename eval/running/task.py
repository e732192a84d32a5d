"""The task of a run: the prompts of a row, and how a row gets its texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_utils.schema import Record, Row
from eval.backends.backend import Completion, Prompt


@dataclass(frozen=True)
class Task:
    """Answering or judging.

    Attributes:
        name: Its name in journals: "answers".
        unit: The name of one text: "answer".
        record: The type of an input row.
        prompts: Return the prompts of a row, given the file of its picture; keys are unique within the input file.
        fill: Return a copy of a row with its texts, from the completions by key.
        notes: Return notes on a file for the report, beside its counts.
        advice: What the user can do about failures.
        is_wanted: Return whether a row needs any text, and so its picture.
        complaint: Return why a text cannot be used, or None.
        attempts: The largest number of texts per prompt until one is usable; all but the first are sampled.
        remarks: Return remarks for the end of the report.
    """

    name: str
    unit: str
    record: type[Record]
    prompts: Callable[[Row, Path], list[Prompt]]
    fill: Callable[[Row, Mapping[str, Completion]], Row]
    notes: Callable[[Sequence[Row], Sequence[Completion]], list[str]]
    advice: str
    is_wanted: Callable[[Row], bool] = lambda row: True
    complaint: Callable[[str], str | None] = lambda text: None
    attempts: int = 1
    remarks: Callable[[], list[str]] = list

    def next_attempt(self, completion: Completion | None) -> int | None:
        """Return the number of the next attempt at a prompt, or None; an attempt that ended in an error is repeated."""
        if completion is None:
            return 0
        if completion.error is not None:
            return completion.attempt
        if self.complaint(completion.text) is None or completion.attempt + 1 >= self.attempts:
            return None
        return completion.attempt + 1

    def failure(self, completion: Completion) -> str | None:
        """Return why a completion cannot be used, or None."""
        if completion.refusal is not None and self.complaint("") is None:
            return None
        if completion.error is None:
            reason = self.complaint(completion.text)
            return f"refused: {completion.refusal}" if reason and completion.refusal is not None else reason
        before = self.complaint(completion.text) if completion.text else None
        return f"{completion.error} (the text before: {before})" if before else completion.error


def derive_seed(*parts: object) -> int:
    """Return a seed, 0 to 2**63 - 1, that depends on the parts alone."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1
