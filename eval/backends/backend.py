"""The door that every engine stands behind: requests in, results out as they finish."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """One text to generate.

    Attributes:
        id: Comes back with the result; unique within a call of `run`.
        image: The picture, a checked path; None for a text-only request.
        text: What is asked, plain text: nothing in it is ever a control tag.
        system: The system message.
        seed: What sampling depends on, and nothing else; 0 to 2**63 - 1.
        do_sample: True or False, or None for the checkpoint's own setting.
        max_new_tokens: Limit of the answer in tokens, or None for the checkpoint's own.
    """

    id: str
    image: Path | None
    text: str
    system: str
    seed: int
    do_sample: bool | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Result:
    """What became of a request.

    Attributes:
        id: The request's.
        text: What was generated; empty if it failed.
        error: Why it failed, or None.
    """

    id: str
    text: str
    error: str | None = None


class Backend(Protocol):
    """Who answers or judges."""

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Yields one result per request, in any order, as they finish; a request that cannot be done fails alone."""
        ...
