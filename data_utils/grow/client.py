"""Asks a model behind an OpenAI-compatible endpoint: with retries, within a budget, the key kept to itself."""

from __future__ import annotations

import os
import random
import re
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from data_utils.errors import MMRoleError
from data_utils.network import check_network_settings

KEY = "OPENAI_API_KEY"
IMAGE_TOKENS = 1500  # estimate for an image before it is sent; afterwards the endpoint's report counts
_RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_FATAL = {401, 402, 403, 404, 405}
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second attempt, doubled each time
_CHARACTERS_PER_TOKEN = 2  # few, so that the estimate is rather too high; Chinese has about one


class BudgetSpentError(Exception):
    """The budget does not allow for another request; the text says what went wrong before, if anything did."""


class NoAnswerError(Exception):
    """This request got no answer after all retries."""


class _RetryError(Exception):
    """A request failed in a way that the next may not."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


@dataclass(frozen=True)
class Settings:
    """The settings of a client.

    Attributes:
        model: The model's name at the endpoint.
        base_url: The endpoint; None is `OPENAI_BASE_URL` of the environment, or OpenAI's own.
        max_tokens: Limit of an answer.
        temperature: None is the model's own.
        max_requests: Budget of requests, failed ones included; None is any number.
        max_tokens_total: Budget of tokens of prompts and answers; None is any number.
        attempts: Requests for one answer when the endpoint is busy or broken.
        timeout: Seconds for one request.
    """

    model: str
    base_url: str | None = None
    max_tokens: int = 4096
    temperature: float | None = None
    max_requests: int | None = None
    max_tokens_total: int | None = None
    attempts: int = 6
    timeout: float = 300.0


class Client:
    """A model that several threads can ask.

    Attributes:
        requests: Requests made so far.
        tokens: Tokens used so far.

    Raises:
        MMRoleError: There is no key, no such address, a proxy that cannot work, or no `openai` package.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._key = os.environ.get(KEY, "").strip()
        if not self._key:
            fix = f"export {KEY}=... (any word will do for a server of your own that asks for none)"
            raise MMRoleError("no key for the endpoint", None, f"{KEY} in the environment", fix)
        if not (self._key.isascii() and self._key.isprintable()):
            raise MMRoleError("the key holds characters that no key has", None, KEY, "set it again; it is not shown")
        self.requests = self.tokens = 0
        self._reserved = 0  # tokens of the requests under way
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._fatal: MMRoleError | None = None  # refuses all further requests
        self._limit_name = "max_tokens"
        check_network_settings()
        self._client = self._connect(settings.base_url or os.environ.get("OPENAI_BASE_URL") or None)

    def _connect(self, url: str | None) -> Any:
        if url is not None and not _is_address(url):
            fix = "give it as http(s)://host:port/v1"
            raise MMRoleError("no such address", None, "--base_url or OPENAI_BASE_URL", fix)
        try:
            import openai
        except ImportError:
            fix = "pip install -r requirements.txt"
            raise MMRoleError("the openai package is not installed", None, "the active environment", fix) from None
        # Its own retries would escape the budget.
        return openai.OpenAI(api_key=self._key, base_url=url, max_retries=0, timeout=self._settings.timeout)

    def ask(self, system: str, user: str, image: str | None = None) -> str:
        """Return the model's answer; empty if it was cut off or withheld.

        Args:
            system: The system message.
            user: The user's text.
            image: A data URL.

        Raises:
            NoAnswerError: There is none to this request.
            BudgetSpentError: The budget does not allow for the request.
            MMRoleError: The endpoint refuses all requests: a wrong key, no such model.
        """
        content: Any = user
        if image is not None:
            content = [{"type": "text", "text": user}, {"type": "image_url", "image_url": {"url": image}}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        estimate = (len(system) + len(user)) // _CHARACTERS_PER_TOKEN + (IMAGE_TOKENS if image else 0)
        problem, wait = "", 0.0
        for attempt in range(self._settings.attempts):
            if attempt and self._stopped.wait(max(wait, self._wait(attempt))):
                break
            if self._fatal is not None:
                raise self._fatal
            try:
                return self._request(messages, estimate)
            except _RetryError as error:
                problem, wait = self.without_key(str(error)), error.wait
            except BudgetSpentError as error:
                raise BudgetSpentError(str(error) or problem) from None
        raise NoAnswerError(problem)

    def stop(self) -> None:
        """Ask for nothing again from now on; requests under way still get their answers."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def holds_key(self, text: str) -> bool:
        """Return whether a text holds the key, unless it is short or a word, as for servers that ask for none."""
        is_word = len(self._key) < 8 or (self._key.isalpha() and len(self._key) < 16)
        return not is_word and self._key in text

    def without_key(self, text: str) -> str:
        """Return a message without the key, or what looks like a piece of one, which endpoints like to quote."""
        return re.sub(r"\bsk-[\w*.-]{4,}", "***", text.replace(self._key, "***"))

    def _wait(self, attempt: int) -> float:
        jitter = random.uniform(0.75, 1.25)  # noqa: S311 - so that threads do not come back all at once
        return min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * jitter

    def _reserve(self, tokens: int) -> None:
        """Count a request and reserve its tokens, so that the budget holds with requests under way.

        Waits for these if they may leave enough.
        """
        limit = self._settings.max_tokens_total
        if limit is not None and tokens > limit:
            problem = f"a request reserves {tokens:,} tokens (--max_tokens and its prompt)"
            raise BudgetSpentError(f"{problem}, more than --max_tokens_total {limit:,}")
        with self._changed:
            while True:
                if self._settings.max_requests is not None and self.requests >= self._settings.max_requests:
                    raise BudgetSpentError
                if limit is None or self.tokens + self._reserved + tokens <= limit:
                    break
                if not self._reserved:
                    raise BudgetSpentError
                self._changed.wait()
            self.requests += 1
            self._reserved += tokens

    def _request(self, messages: list[dict[str, Any]], estimate: int) -> str:
        reserved = estimate + self._settings.max_tokens
        self._reserve(reserved)
        used = 0
        try:
            text, used = _read(self._send(messages), estimate)
            return text
        finally:
            with self._changed:
                self._reserved -= reserved
                self.tokens += used
                self._changed.notify_all()

    def _send(self, messages: list[dict[str, Any]]) -> Any:
        import openai

        options: dict[str, Any] = {self._limit_name: self._settings.max_tokens}
        if self._settings.temperature is not None:
            options["temperature"] = self._settings.temperature
        try:
            return self._client.chat.completions.create(model=self._settings.model, messages=messages, **options)
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except openai.OpenAIError as error:  # no connection
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise _RetryError(f"{type(error).__name__}: {error}{cause}") from None
        except ValueError as error:
            raise _RetryError(f"the endpoint's answer is not JSON; is --base_url right? ({error})") from None

    def _status_error(self, error: Any) -> Exception:
        status, text = error.status_code, self.without_key(str(error))
        if status == 400 and "max_completion_tokens" in text and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"  # newer models of OpenAI know the limit by this name only
            return _RetryError(text)
        if status in _FATAL or getattr(error, "code", None) == "insufficient_quota":
            what = f"the endpoint refuses (status {status})"
            fix = f"check {KEY}, --base_url, --model and your account; run the same command again to go on"
            self._fatal = MMRoleError(what, text, f"model {self._settings.model}", fix)
            return self._fatal
        if status in _RETRY or status >= 500:
            return _RetryError(f"status {status}: {text}", _seconds(error.response.headers.get("retry-after")))
        return NoAnswerError(f"status {status}: {text}")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def _read(answer: Any, estimate: int) -> tuple[str, int]:
    """Return the text of an answer, and the tokens it took."""
    try:
        choice = answer.choices[0]
        text, finished = choice.message.content, choice.finish_reason
    except (AttributeError, TypeError, LookupError):
        raise _RetryError("the endpoint's answer is no chat completion") from None
    text = text if isinstance(text, str) else ""
    total = getattr(getattr(answer, "usage", None), "total_tokens", None)
    used = total if isinstance(total, int) and total > 0 else estimate + len(text) // _CHARACTERS_PER_TOKEN
    return ("" if finished in ("length", "content_filter") else text), used


def _seconds(text: str | None) -> float:
    """Return the seconds of a Retry-After header, within reason; a date counts as nothing."""
    try:
        return min(max(float(text or 0), 0.0), LONGEST_WAIT)
    except ValueError:
        return 0.0
