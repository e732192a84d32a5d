"""What goes into the engine, what comes out, and what it counts."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_vl.chat import DEFAULT_SYSTEM, Query, Turn


@dataclass(frozen=True)
class Request:
    """Something to be answered.

    Attributes:
        id: Comes back with the result.
        query: As `chat()` takes it: a text whose tags are read, or elements whose texts are plain.
        system: The system message, a text or elements.
        history: Pairs (query, answer), oldest first.
        seed: What sampling depends on.
        do_sample, temperature, top_k, top_p, max_new_tokens: None for the checkpoint's own settings.
        stop_ids: Ids that end the answer; None for those of `chat()`, empty for none.
    """

    id: Any
    query: Query
    system: Query = DEFAULT_SYSTEM
    history: Sequence[Turn] = ()
    seed: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    stop_ids: Collection[int] | None = None


@dataclass(frozen=True)
class Result:
    """What became of a request.

    Attributes:
        id: The request's.
        text: The answer, cut and stripped as `chat()` does it; empty if it failed.
        error: Why it failed, or None.
        token_ids: All ids that came out, the one that ended the answer included.
        prompt_tokens: Length of the prompt.
    """

    id: Any
    text: str
    error: str | None = None
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0


@dataclass
class Statistics:
    """What a generator has done so far, in tokens unless it says otherwise."""

    requests: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    read_tokens: int = 0  # whose keys and values the steps have read, a shared prefix once a step
    images: int = 0
    peak_rows: int = 0
    peak_cache_tokens: int = 0
    out_of_memory: int = 0

    @property
    def prefill_saved(self) -> float:
        """Share of the prompts' tokens that were not computed, because another prompt began with them."""
        return 1 - self.prefilled_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def mean_rows(self) -> float:
        """Rows of the average decoding step."""
        return self.new_tokens / self.steps if self.steps else 0.0
