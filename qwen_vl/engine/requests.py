"""Requests, results and counts of the engine."""

import codecs
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwen_vl.chat import DEFAULT_SYSTEM, Query, Turn, cut_answer
from qwen_vl.special_tokens import IMAGE_SPAN
from qwen_vl.tokenization import QwenVLTokenizer


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        id: Returned with the events and the result.
        query: As for `chat()`: a text whose tags are read, or elements whose texts are plain.
        system: The system message, a text or elements.
        history: Pairs (query, answer), oldest first.
        seed: What sampling depends on.
        do_sample, temperature, top_k, top_p, max_new_tokens: None for the checkpoint's own settings.
        stop_ids: Ids that end the answer; None for those of `chat()`, empty for none.
        stop: Texts that end the answer; it is cut before the first of them.
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
    stop: Sequence[str] = ()


@dataclass(frozen=True)
class Result:
    """The result of a request.

    Attributes:
        id: The request's.
        text: The answer, cut and stripped as `chat()` does it; empty if the request failed.
        error: Why it failed, or None.
        token_ids: All ids that came out, the one that ended the answer included.
        prompt_tokens: Length of the prompt.
        finish_reason: `stop` (a stop token or text), `length` (the limit) or `error`.
    """

    id: Any
    text: str
    error: str | None = None
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    finish_reason: Literal["stop", "length", "error"] = "stop"

    @classmethod
    def failed(cls, request: Request, error: str, prompt_tokens: int = 0) -> "Result":
        """Returns the result of a request that failed."""
        return cls(request.id, "", error, prompt_tokens=prompt_tokens, finish_reason="error")


@dataclass(frozen=True)
class Event:
    """What one step of the engine did for one request.

    Attributes:
        id: The request's.
        token_id: Its new token; None if it failed.
        text: Text that is certain now, beyond that of its earlier events: whole characters, which no later token
            changes. The texts of all events of a request, joined, are its result's text.
        result: Its result if it is finished, else None.
    """

    id: Any
    token_id: int | None
    text: str
    result: Result | None = None


class TextStream:
    """The text of an answer while its tokens arrive: returns a piece as soon as no later token can change it.

    The last token may still be dropped (`cut_answer`), a character or an image span may be incomplete, trailing
    whitespace may be stripped, and a stop text may have begun.

    Args:
        tokenizer: The checkpoint's.
        stop: Texts that end the answer.

    Attributes:
        stopped: Whether a stop text has come.
    """

    def __init__(self, tokenizer: QwenVLTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last: int | None = None  # the latest token, which the next one makes certain
        self._ids: list[int] = []  # certain, but possibly of an incomplete image span
        self._held = ""  # decoded, but possibly to be stripped, or part of a stop text
        self._given = 0  # characters
        self._ended = self.stopped = False

    def push(self, token: int) -> str:
        """Returns the text that is certain now that `token` has come, beyond what was returned before."""
        before, self._last, ended = self._last, token, self._ended
        self._ended = ended or token in (self._tokenizer.im_end_id, self._tokenizer.im_start_id)
        if before is None or ended:
            return ""
        self._ids.append(before)
        if self._in_span():
            return ""
        # A token that breaks off a span may begin the next one.
        certain = len(self._ids) - (before == self._tokenizer.img_start_id)
        self._held += self._decoder.decode(self._tokenizer.decode_bytes(self._ids[:certain]))
        del self._ids[:certain]
        if not self._given:
            self._held = self._held.lstrip()
        self.stopped = any(text in self._held for text in self._stop)
        piece = self._held[: self._first_stop(self._held)].rstrip()
        self._held = self._held[len(piece) :]
        self._given += len(piece)
        return piece

    def finish(self, ids: Sequence[int]) -> tuple[str, str]:
        """Returns the whole text of an answer that ended with these ids, and what of it was not returned before."""
        text = cut_answer(self._tokenizer, ids)
        found = [text.index(stop) for stop in self._stop if stop in text]
        if found:
            text = text[: min(found)].rstrip()
            self.stopped = True
        return text, text[self._given :]

    def _in_span(self) -> bool:
        """Returns whether the ids are the beginning of what may become a whole image span, which is decoded as one."""
        pad = self._tokenizer.img_pad_id
        if self._ids[0] != self._tokenizer.img_start_id or len(self._ids) > IMAGE_SPAN + 1:
            return False
        return all(0 <= token < 256 or token == pad for token in self._ids[1:])

    def _first_stop(self, text: str) -> int:
        """Returns where the first stop text begins, or may begin."""
        ends = range(len(text))
        return min((i for i in ends for stop in self._stop if _may_begin(text[i:], stop)), default=len(text))


def _may_begin(text: str, stop: str) -> bool:
    return text.startswith(stop) or stop.startswith(text)


@dataclass
class Statistics:
    """The work of an engine so far, in tokens unless named otherwise."""

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
