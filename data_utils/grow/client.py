"""Asks a strong model behind an OpenAI-compatible endpoint: with retries, within a budget, the key kept to itself."""

from __future__ import annotations

import os
import random
import re
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from data_utils.errors import MMRoleError
from data_utils.grow.validation import UnusableError
from data_utils.network import check_network_settings

KEY = "OPENAI_API_KEY"
IMAGE_TOKENS = 1500  # reckoned for an image before it is sent; what counts afterwards is what the endpoint reports
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_FATAL = {401, 402, 403, 404, 405}
_LONGEST_WAIT = 60.0
_SHORTEST_SECRET, _LONGEST_WORD = 8, 16  # characters; shorter keys, and words, are for servers that ask for none
_CHARACTERS_PER_TOKEN = 2  # few, so that the reckoning errs on the safe side; Chinese has about one


class BudgetSpentError(Exception):
    """The budget does not allow for another request; says what went wrong before, if anything did."""


class NoAnswerError(Exception):
    """This request got no usable answer, however often it was tried."""


class Budget:
    """How many requests may be made and how many tokens used, by several threads together.

    Tokens are reserved before a request and settled after it, so that the limit holds even with requests under way.

    Args:
        max_requests: Requests, failed ones included; None is any number.
        max_tokens: Tokens of prompts and answers; None is any number.
    """

    def __init__(self, max_requests: int | None = None, max_tokens: int | None = None) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = self._reserved = 0
        self._changed = threading.Condition()

    def reserve(self, tokens: int) -> None:
        """Counts a request and reserves its tokens; waits for requests under way if they may leave enough.

        Raises:
            BudgetSpentError: The budget does not allow for it.
        """
        if self.max_tokens is not None and tokens > self.max_tokens:
            told = f"a request reserves {tokens:,} tokens (--max_tokens and its prompt), more than --max_tokens_total"
            raise BudgetSpentError(f"{told} {self.max_tokens:,}")
        with self._changed:
            while True:
                if self.max_requests is not None and self.requests >= self.max_requests:
                    raise BudgetSpentError
                if self.max_tokens is None or self.tokens + self._reserved + tokens <= self.max_tokens:
                    break
                if not self._reserved:
                    raise BudgetSpentError
                self._changed.wait()
            self.requests += 1
            self._reserved += tokens

    def settle(self, reserved: int, used: int) -> None:
        """Gives back what was reserved and counts what was used."""
        with self._changed:
            self._reserved -= reserved
            self.tokens += used
            self._changed.notify_all()


@dataclass(frozen=True)
class Settings:
    """What is asked of the endpoint, and how often.

    Attributes:
        model: The model's name there.
        base_url: The endpoint, by default `OPENAI_BASE_URL` of the environment or OpenAI's own.
        max_tokens: Of an answer.
        temperature: None is the model's own.
        attempts: Requests for one answer when the endpoint is busy or broken.
        first_wait: Seconds before the second attempt; doubled each time.
        timeout: Seconds for one request.
    """

    model: str
    base_url: str | None = None
    max_tokens: int = 4096
    temperature: float | None = None
    attempts: int = 6
    first_wait: float = 1.0
    timeout: float = 300.0


class Endpoint:
    """A model to be asked, by several threads at once.

    Raises:
        MMRoleError: There is no key, or the `openai` package is not installed.
    """

    def __init__(self, settings: Settings, budget: Budget) -> None:
        self._key = os.environ.get(KEY, "").strip()
        if not self._key:
            raise MMRoleError(
                "no key for the endpoint", None, f"{KEY} in the environment",
                f"export {KEY}=... (any word will do for a server of your own that asks for none)",
            )  # fmt: skip
        if not (self._key.isascii() and self._key.isprintable()):
            raise MMRoleError(
                "the key holds characters that no key has", None, KEY, "set it anew; it is not shown here"
            )
        check_network_settings()
        self._settings, self._budget = settings, budget
        self._limit_name = "max_tokens"
        self._refusal: MMRoleError | None = None  # of all further requests
        self._ending = threading.Event()
        self._client = self._connect(_checked_url(settings.base_url or os.environ.get("OPENAI_BASE_URL")))

    def _connect(self, url: str | None) -> Any:
        try:
            import openai
        except ImportError:
            raise MMRoleError(
                "the openai package is not installed", None, "the active environment", "pip install -r requirements.txt"
            ) from None
        # It retries by itself too, but those requests no budget would count.
        return openai.OpenAI(api_key=self._key, base_url=url, max_retries=0, timeout=self._settings.timeout)

    def ask(self, system: str, user: str, image: str | None = None) -> str:
        """The model's answer.

        Args:
            system: The system message.
            user: The user's text.
            image: A data URL.

        Raises:
            NoAnswerError: It has none to this request.
            UnusableError: The answer holds the key.
            BudgetSpentError: The budget does not allow for the request.
            MMRoleError: The endpoint will not answer any request: a wrong key, no such model.
        """
        content: Any = user
        if image is not None:
            content = [{"type": "text", "text": user}, {"type": "image_url", "image_url": {"url": image}}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        reckoned = (len(system) + len(user)) // _CHARACTERS_PER_TOKEN + (IMAGE_TOKENS if image else 0)
        problem, asked_wait = "", 0.0
        for attempt in range(self._settings.attempts):
            if attempt and self._ending.wait(max(asked_wait, self._wait(attempt))):
                break
            if self._refusal is not None:
                raise self._refusal
            try:
                text = self._request(messages, reckoned)
            except _BusyError as error:
                problem, asked_wait = self.scrub(str(error)), error.wait
                continue
            except BudgetSpentError as error:
                raise BudgetSpentError(str(error) or problem) from None
            if self.holds_key(text):
                raise UnusableError("the answer holds the key for the endpoint")
            return text
        raise NoAnswerError(problem)

    def end(self) -> None:
        """From now on nothing is asked for again; what is under way still gets its answer."""
        self._ending.set()

    @property
    def ending(self) -> bool:
        """Whether nothing is to be asked for again."""
        return self._ending.is_set()

    def holds_key(self, text: str) -> bool:
        """Whether a text holds the key, if it is a secret and not a word for a server that asks for none."""
        is_word = len(self._key) < _SHORTEST_SECRET or (self._key.isalpha() and len(self._key) < _LONGEST_WORD)
        return not is_word and self._key in text

    def scrub(self, text: str) -> str:
        """The text without the key, or what looks like a piece of one; endpoints like to quote it."""
        return re.sub(r"\bsk-[\w*.-]{4,}", "***", text.replace(self._key, "***"))

    def _wait(self, attempt: int) -> float:
        if not attempt:
            return 0.0
        spread = random.uniform(0.75, 1.25)  # noqa: S311 - so that threads do not come back all at once
        return min(self._settings.first_wait * 2 ** (attempt - 1), _LONGEST_WAIT) * spread

    def _request(self, messages: list[dict[str, Any]], reckoned: int) -> str:
        reserved = reckoned + self._settings.max_tokens
        self._budget.reserve(reserved)
        used = 0
        try:
            answer = self._send(messages)
            text, used = _read(answer, reckoned)
            return text
        finally:
            self._budget.settle(reserved, used)

    def _send(self, messages: list[dict[str, Any]]) -> Any:
        import openai

        options: dict[str, Any] = {self._limit_name: self._settings.max_tokens}
        if self._settings.temperature is not None:
            options["temperature"] = self._settings.temperature
        try:
            return self._client.chat.completions.create(model=self._settings.model, messages=messages, **options)
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.OpenAIError as error:  # no connection
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise _BusyError(f"{type(error).__name__}: {error}{cause}") from None
        except ValueError as error:
            raise _BusyError(f"the endpoint's answer is not JSON; is --base_url right? ({error})") from None

    def _refused(self, error: Any) -> Exception:
        status, text = error.status_code, self.scrub(str(error))
        if status == 400 and "max_completion_tokens" in text and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"  # newer models of OpenAI know the limit by this name only
            return _BusyError(text)
        if status in _FATAL or getattr(error, "code", None) == "insufficient_quota":
            self._refusal = MMRoleError(
                f"the endpoint refuses (status {status})", text, f"model {self._settings.model}",
                f"check {KEY}, --base_url, --model and your account; run the same command again to go on",
            )  # fmt: skip
            return self._refusal
        if status in _AGAIN or status >= 500:
            return _BusyError(f"status {status}: {text}", _seconds(error.response.headers.get("retry-after")))
        return NoAnswerError(f"status {status}: {text}")


def _checked_url(url: str | None) -> str | None:
    try:
        parts = urlsplit(url) if url else None
        good = parts is None or (parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0)
    except ValueError:
        good = False
    if not good:
        raise MMRoleError("no such address", None, "--base_url or OPENAI_BASE_URL", "give it as http(s)://host:port/v1")
    return url or None


class _BusyError(Exception):
    """A request failed in a way that the next may not."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


def _read(answer: Any, reckoned: int) -> tuple[str, int]:
    """The text of an answer, and the tokens it took."""
    try:
        choice = answer.choices[0]
        text, finished = choice.message.content, choice.finish_reason
    except (AttributeError, TypeError, LookupError):
        raise _BusyError("the endpoint's answer is no chat completion") from None
    text = text if isinstance(text, str) else ""
    total = getattr(getattr(answer, "usage", None), "total_tokens", None)
    used = total if isinstance(total, int) and total > 0 else reckoned + len(text) // _CHARACTERS_PER_TOKEN
    return ("" if finished in ("length", "content_filter") else text), used


def _seconds(text: str | None) -> float:
    """What a Retry-After header asks for, within reason; a date counts as nothing."""
    try:
        return min(max(float(text or 0), 0.0), _LONGEST_WAIT)
    except ValueError:
        return 0.0
