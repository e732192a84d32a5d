"""Asks a chat model behind OpenAI-compatible endpoints: many requests at once, within a budget, the key kept secret.

    with Endpoint(["http://127.0.0.1:8000/v1"], "my-model") as endpoint:
        reply = endpoint.submit(ChatRequest("Who are you?", system="You are Ada.")).result()

Any thread may call `submit`, for any number of requests. The number of concurrent ones starts at 20, grows with each
answer, and falls by a fifth when the endpoint reports too many (429).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from data_utils.errors import MMRoleError
from data_utils.network import check_network_settings

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
IMAGE_TOKENS = 1500  # estimate for a picture before the request; afterwards the endpoint's report counts
ANSWER_TOKENS = 1000  # the same for an answer without a limit
_CHARACTERS_PER_TOKEN = 2  # low, so that the estimate is rather too high; Chinese has about one
_START, _MOST = 20, 512  # concurrent requests
_LONGEST_WAIT = 300.0
_MOST_BUSY = 30  # retries of one request after a 429
_MOST_UNREACHED = 3  # requests in a row that are given up before the endpoint is
_LOCAL = {"127.0.0.1", "::1", "localhost"}
_SHORTEST_SECRET, _LONGEST_WORD = (
    8,
    16,
)  # characters; shorter keys, and words, are placeholders for servers without keys
_FATAL = {401, 402, 403, 404, 405}
_RETRY = {408, 409, 425, 429}
_PARAMETERS = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed")
_UNSUPPORTED = re.compile(
    r"un(?:supported|recogni[sz]ed|known|expected)|not (?:\w+ )?support|not (?:permitted|allowed)|only the default"
    r"|deprecated|invalid (?:parameter|field|argument)|extra (?:inputs|fields)|use '?max_completion_tokens"
    r"|cannot be (?:set|used)|must alternate|does not have a system",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(r"context (?:length|window|size)|too (?:large|long)|exceed", re.IGNORECASE)
_SYSTEM = re.compile(r"system\W{0,3}(?:\w+\W{1,3}){0,2}(?:role|message|prompt|instruction)|role\W.{0,20}\bsystem", re.I)
_PICTURES = re.compile(r"\bimages?\b|image_url|multi-?modal|\bvision\b|mmproj", re.IGNORECASE)
_FILTERED = re.compile(r"content_filter|content_policy|ResponsibleAI|moderation|flagged", re.IGNORECASE)
_DURATION = re.compile(r"([\d.]+)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class BudgetSpentError(Exception):
    """The budget does not allow another request; the text names the budget."""


@dataclass(frozen=True)
class ChatRequest:
    """One message to a chat model.

    Attributes:
        user: The user's text.
        system: The system message; empty for none.
        image: A picture as a data URL, shown before the text.
        temperature, top_p, seed, max_tokens: None leaves it to the model.
        server: The number of the endpoint's URL to use, modulo their count; if that cannot be reached, another is used,
            the same for all requests of this number.
        extra: Further fields of the request's body.
    """

    user: str
    system: str = ""
    image: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    server: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatReply:
    """The result of a request: a text (possibly cut off), a refusal, or an error.

    Attributes:
        text: The answer without thinking; empty beside a refusal or an error.
        error: The reason for a missing answer, after all retries; or None.
        refusal: Why the model, or a filter before it, refused; or None.
        cut: Whether the answer ends at the limit of its length.
        tokens: Tokens of prompt and answer, as the endpoint reports them, or else an estimate.
        prompt_tokens: Tokens of the prompt, as the endpoint reports them; 0 if it does not.
        model: The model's name as the server reports it.
        token_ids: The answer's ids, if the endpoint returns them.
    """

    text: str = ""
    error: str | None = None
    refusal: str | None = None
    cut: bool = False
    tokens: int = 0
    prompt_tokens: int = field(default=0, compare=False)
    model: str = ""
    token_ids: tuple[int, ...] | None = None


class Endpoint:
    """A model behind one or several URLs, for any number of threads.

    Parameters that the model refuses (a temperature, a seed, `max_tokens` by this name, a system message) are left out
    or sent in another form after their first error, and kept in `learned`.

    Args:
        urls: Base URLs, with `/v1`; None is OPENAI_BASE_URL or OpenAI's own.
        model: The model's name there.
        key_env: The environment variable that holds the key. A server on loopback needs none.
        timeout: Seconds for a complete request, even if its answer trickles in.
        attempts: How often a failing request is sent.
        first_wait: Seconds before the second attempt; doubled each time.
        max_requests: Requests in all, failed ones included; None for any number.
        max_tokens_total: Tokens in all, of prompts and answers; None for any number.

    Raises:
        MMRoleError: There is no key, no such URL, or the `openai` package or one for a proxy is not installed.
    """

    def __init__(
        self,
        urls: Sequence[str | None],
        model: str,
        *,
        key_env: str = KEY,
        timeout: float = 600.0,
        attempts: int = 6,
        first_wait: float = 1.0,
        max_requests: int | None = None,
        max_tokens_total: int | None = None,
    ) -> None:
        self.model, self.learned = model, {}
        self.requests = self.tokens = self.answered = 0
        self._urls = [checked_url(url or os.environ.get("OPENAI_BASE_URL")) for url in urls]
        self._key = _key(key_env, self._urls)
        self._key_env, self._timeout, self._attempts, self._first_wait = key_env, timeout, attempts, first_wait
        self._max_requests, self._max_tokens = max_requests, max_tokens_total
        self.concurrency = float(_START)
        self._active = self._reserved = self._episode = 0
        self._unreached = 0  # requests given up since the last answer, because no server could be reached
        self._said = ""  # the last error since then of a server that was reached
        self._down: set[int] = set()  # numbers of URLs that could not be reached; never all of several
        self._resume_at = 0.0
        self._fatal: Exception | None = None
        self._ending = False
        if not all(map(_is_local, self._urls)):
            check_network_settings()
        if not find_spec("openai"):
            fix = "pip install -r requirements.txt"
            raise MMRoleError("the openai package is not installed", None, "the active environment", fix)
        # No budget would count the client's retries.
        self._settings = {"api_key": self._key, "max_retries": 0, "timeout": timeout}
        self._clients = [self.client(number) for number in range(len(self._urls))]
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Condition()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()

    @property
    def limit(self) -> int:
        """The number of requests that may run now."""
        return int(self.concurrency)

    def submit(self, request: ChatRequest) -> Future[ChatReply]:
        """Send a request as soon as there is room for it.

        Returns:
            The future reply. Its `result()` raises `BudgetSpentError` if the budget does not allow for the request, and
            `MMRoleError` if the endpoint cannot accept any request: a wrong key, no such model, no pictures.
        """
        return asyncio.run_coroutine_threadsafe(self._ask(request), self._loop)

    def client(self, number: int = 0) -> Any:
        """Return an `openai.AsyncOpenAI` for a URL, to stream in an event loop; the caller closes it."""
        import openai

        url = self._urls[number]
        past_proxies = openai.DefaultAsyncHttpxClient(trust_env=False) if _is_local(url) else None
        return openai.AsyncOpenAI(base_url=url, http_client=past_proxies, **self._settings)

    def end(self) -> None:
        """Stop sending; running requests still get their answers."""
        self._ending = True
        asyncio.run_coroutine_threadsafe(self._notify(), self._loop)

    def close(self) -> None:
        """Cancel running requests, and close the connections."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def holds_key(self, text: str) -> bool:
        """Return whether a text holds the key, unless the key is a placeholder."""
        is_word = len(self._key) < _SHORTEST_SECRET or (self._key.isalpha() and len(self._key) < _LONGEST_WORD)
        return not is_word and self._key in text

    def scrub(self, text: str) -> str:
        """Return the text without the key and what looks like a part of one, because endpoints quote it in errors."""
        return re.sub(r"\bsk-[\w*.-]{4,}", "***", text.replace(self._key, "***") if self.holds_key(text) else text)

    def summary(self) -> str:
        """Return a one-line summary of the requests."""
        parts = [f"{self.requests:,} requests, {self.tokens:,} tokens, up to {self.limit} at once"]
        return ", ".join(parts + [f"{name} refused: {instead}" for name, instead in self.learned.items()])

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _ask(self, request: ChatRequest) -> ChatReply:
        failures = busy = 0
        problem, moved = "the run was ended", False
        estimate = self._estimate(request)
        while failures < self._attempts and busy < _MOST_BUSY:
            await self._enter(estimate, problem)
            episode, used, server = self._episode, 0, self._server(request)
            try:
                reply = await self._send(request, server, estimate)
                used = reply.tokens
                if not reply.error:
                    self.answered, self._unreached, self._said = self.answered + 1, 0, ""
                    self.concurrency = min(self.concurrency + 1 / self.concurrency, _MOST)
                return reply
            except _RetryError as error:
                problem = self.scrub(str(error))
                if error.learned:
                    continue
                if error.busy:
                    busy += 1
                    if episode == self._episode:  # sent since the last fall; earlier requests do not count again
                        self._episode += 1
                        self.concurrency = max(self.concurrency * 0.8, 1.0)
                else:
                    failures += 1
                wait = error.wait
                if wait is None:
                    spread = random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries
                    wait = spread * min(self._first_wait * 2 ** (failures + busy - 1), 60.0)
                elif error.busy:
                    self._resume_at = max(self._resume_at, time.monotonic() + wait)
                connected = error.connected
                self._said = problem if connected else self._said
            finally:
                await self._leave(estimate, used)
            if self._ending:
                break
            if failures < self._attempts and busy < _MOST_BUSY:
                await self.pause(wait)
            elif not connected and len(self._urls) > 1 and not moved:
                self._give_up(server, problem)
                failures, moved = 0, True
        if failures and not connected:
            self._unreached += 1
            problem = f"{problem}; before that: {self._said}" if self._said else problem
            if not self.answered or self._unreached >= _MOST_UNREACHED:
                fix = "start the server, or check the URL; run the same command again to resume"
                await self._fail(MMRoleError("the endpoint cannot be reached", problem, self._place(server), fix))
        return ChatReply(error=problem)

    async def _enter(self, estimate: int, problem: str) -> None:
        """Wait until a request may be sent, and count it."""
        while (pause := self._resume_at - time.monotonic()) > 0 and not self._ending and self._fatal is None:
            await self.pause(pause)
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    self._fatal is not None
                    or self._ending
                    or (self._active < self.limit and (self._fits(estimate) or not self._reserved))
                )
            )
            if self._fatal is not None:
                raise self._fatal
            if self._ending:
                raise BudgetSpentError(problem)
            if self._max_requests is not None and self.requests >= self._max_requests:
                raise BudgetSpentError(f"the budget of {self._max_requests:,} requests is spent")
            if not self._fits(estimate):
                text = f"the budget of {self._max_tokens:,} tokens is spent: {self.tokens:,} used"
                raise BudgetSpentError(f"{text}, and the next request may take {estimate:,}")
            self.requests += 1
            self._active += 1
            self._reserved += estimate

    async def _leave(self, estimate: int, used: int) -> None:
        self._active -= 1
        self._reserved -= estimate
        self.tokens += used
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def pause(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the run."""
        end = time.monotonic() + seconds
        while not self._ending and self._fatal is None and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.1))

    async def _shut(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for client in self._clients:
            await client.close()

    def _server(self, request: ChatRequest) -> int:
        own = request.server % len(self._urls)
        up = [number for number in range(len(self._urls)) if number not in self._down]
        return up[request.server % len(up)] if own in self._down else own

    def _give_up(self, server: int, problem: str) -> None:
        """Has the requests of a server sent to the others; if none is left, those that were down before may be back."""
        if server not in self._down:
            logger.warning("%s cannot be reached: its requests go to the others (%s)", self._urls[server], problem)
            self._down.add(server)
            if len(self._down) == len(self._urls):
                self._down = {server}

    def _fits(self, estimate: int) -> bool:
        return self._max_tokens is None or self.tokens + self._reserved + estimate <= self._max_tokens

    def _estimate(self, request: ChatRequest) -> int:
        text = (len(request.system) + len(request.user)) // _CHARACTERS_PER_TOKEN
        return text + (IMAGE_TOKENS if request.image else 0) + (request.max_tokens or ANSWER_TOKENS)

    def _place(self, server: int) -> str:
        return f"model {self.model} at {self._urls[server] or 'the default of the openai package'}"

    async def _send(self, request: ChatRequest, server: int, estimate: int) -> ChatReply:
        import openai

        body = self._body(request)
        try:
            call = self._clients[server].chat.completions.create(**body)
            answer = await asyncio.wait_for(call, self._timeout)  # the client's timeout restarts with each byte
            return self._read(answer, estimate)
        except openai.APIStatusError as error:
            refused = error  # kept out of what is raised later, because it may quote the key
        except (asyncio.TimeoutError, openai.APITimeoutError):
            raise _RetryError(f"no complete answer within {self._timeout:g} s") from None
        except openai.OpenAIError as error:  # no connection
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise _RetryError(f"{type(error).__name__}: {error}{cause}", connected=False) from None
        except ValueError as error:
            raise _RetryError(f"the endpoint's answer is not JSON; is the URL right? ({error})") from None
        return await self._refused(refused, request, server, body)

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        system, user = request.system, request.user
        if system and "system" in self.learned:
            system, user = "", f"{system}\n\n{user}"
        content: Any = user
        if request.image is not None:
            content = [{"type": "image_url", "image_url": {"url": request.image}}, {"type": "text", "text": user}]
        messages = [{"role": "system", "content": system}] if system else []
        limit = "max_completion_tokens" if "max_tokens" in self.learned else "max_tokens"
        given = {limit: request.max_tokens, "temperature": request.temperature}
        given |= {"top_p": request.top_p, "seed": request.seed}
        given = {name: value for name, value in given.items() if value is not None and name not in self.learned}
        extra = {"extra_body": dict(request.extra)} if request.extra else {}
        return {"model": self.model, "messages": [*messages, {"role": "user", "content": content}], **given, **extra}

    async def _refused(self, error: Any, request: ChatRequest, server: int, body: Mapping[str, Any]) -> ChatReply:
        status, text = error.status_code, self.scrub(str(error))
        code = str(getattr(error, "code", None) or "")
        if status in (400, 422, 500) and self._learn(text, str(getattr(error, "param", None) or ""), body):
            raise _RetryError(text, learned=True)
        if status in (400, 403, 451) and _FILTERED.search(f"{code} {text}"):
            return ChatReply(refusal=text)
        if request.image and not self.answered and status not in _RETRY and _PICTURES.search(text):
            fix = "use a model with vision, or check how it is served"
            await self._fail(MMRoleError("the model takes no pictures", text, self._place(server), fix))
        if status in _FATAL or code == "insufficient_quota":
            fix = f"check {self._key_env}, the URL, the model's name and your account; then run again to resume"
            await self._fail(MMRoleError(f"the endpoint refuses (status {status})", text, self._place(server), fix))
        if status in _RETRY or status >= 500:
            headers = error.response.headers
            raise _RetryError(f"status {status}: {text}", wait=wait_of(headers), busy=status == 429)
        return ChatReply(error=f"status {status}: {text}")

    async def _fail(self, error: MMRoleError) -> None:
        self._fatal = error
        await self._notify()
        raise error

    def _learn(self, text: str, parameter: str, body: Mapping[str, Any]) -> bool:
        """Learn from an error which parameter the model refuses; return whether to retry without it."""
        if _TOO_LONG.search(text) or not (_UNSUPPORTED.search(text) or parameter in body):
            return False
        sent = [name for name in _PARAMETERS if name in body]
        refused = [name for name in sent if name == parameter] or [n for n in sent if re.search(rf"\b{n}\b", text)][:1]
        if body["messages"][0]["role"] == "system" and not refused and _SYSTEM.search(text):
            refused = ["system"]
        instead = {"max_tokens": "sent as max_completion_tokens", "system": "put before the user's text"}
        for name in refused:
            self.learned.setdefault(name, instead.get(name, "left out"))
        return bool(refused)

    def _read(self, answer: Any, estimate: int) -> ChatReply:
        try:
            choice = answer.choices[0]
            message, finished = choice.message, choice.finish_reason
            text = message.content
        except (AttributeError, TypeError, LookupError):
            raise _RetryError("the endpoint's answer is not a chat completion; is the URL right?") from None
        text = without_thinking(text) if isinstance(text, str) else ""
        usage = [getattr(getattr(answer, "usage", None), f"{kind}_tokens", None) for kind in ("total", "prompt")]
        total, prompt = [count if isinstance(count, int) and count > 0 else 0 for count in usage]
        tokens = total or estimate
        model = self.scrub(str(getattr(answer, "model", None) or ""))
        refusal = getattr(message, "refusal", None) or ("content filter" if finished == "content_filter" else None)
        if refusal:
            return ChatReply(refusal=self.scrub(str(refusal)), tokens=tokens, model=model)
        if self.holds_key(text):
            return ChatReply(error="the answer holds the key for the endpoint", tokens=tokens, model=model)
        ids = (getattr(choice, "model_extra", None) or {}).get("token_ids")
        ids = tuple(ids) if isinstance(ids, list) and all(type(i) is int for i in ids) else None
        return ChatReply(text, None, None, finished == "length", tokens, prompt, model, ids)


def without_thinking(text: str) -> str:
    """Return an answer without the `<think>…</think>` before it, stripped; an unclosed one leaves nothing."""
    _, end, answer = text.rpartition("</think>")
    if end:
        return answer.strip()
    return "" if text.lstrip().startswith("<think>") else text.strip()


def checked_url(url: str | None) -> str | None:
    """Return a base URL.

    Raises:
        MMRoleError: It is invalid; the value is not shown, because it may hold a password.
    """
    try:
        parts = urlsplit(url or "http://localhost")
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
        good = good and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        fix = "give it as http(s)://host:port/v1, without a password: a key comes from the environment"
        raise MMRoleError("this is not the address of an endpoint", None, "the endpoint's URL or OPENAI_BASE_URL", fix)
    return url or None


def _is_local(url: str | None) -> bool:
    """Whether a URL is on this machine: no key is needed there, and a proxy could not reach it."""
    return bool(url) and urlsplit(url).hostname in _LOCAL


def _key(variable: str, urls: Sequence[str | None]) -> str:
    if not variable.isidentifier():
        fix = "give the name of the variable that holds the key, not the key; what was given is not shown"
        raise MMRoleError("this is not the name of a variable", None, "--api_key_env", fix)
    key = os.environ.get(variable, "").strip()
    if not key and all(map(_is_local, urls)):
        return "none"
    if not key:
        fix = f"export {variable}=... (any word, if your server needs none)"
        raise MMRoleError("no key for the endpoint", None, f"{variable} in the environment", fix)
    if not (key.isascii() and key.isprintable()):
        raise MMRoleError("the key has invalid characters", None, variable, "set it again; it is not shown")
    return key


class _RetryError(Exception):
    """A request failed, but a retry may succeed."""

    def __init__(
        self,
        problem: str,
        *,
        wait: float | None = None,
        busy: bool = False,
        learned: bool = False,
        connected: bool = True,
    ) -> None:
        super().__init__(problem)
        self.wait, self.busy, self.learned, self.connected = wait, busy, learned, connected


def wait_of(headers: Mapping[str, str]) -> float | None:
    """Return the wait in seconds from an error's headers, limited, or None."""
    found = [_number(headers.get("retry-after-ms"), 0.001), _after(headers.get("retry-after"))]
    spent = [kind for kind in ("requests", "tokens") if headers.get(f"x-ratelimit-remaining-{kind}") == "0"]
    found += [_duration(headers.get(f"x-ratelimit-reset-{kind}")) for kind in spent]
    waits = [wait for wait in found if wait is not None]
    return min(max(waits[0], 0.0), _LONGEST_WAIT) if waits else None


def _number(text: str | None, unit: float = 1.0) -> float | None:
    try:
        return float(text) * unit if text else None
    except ValueError:
        return None


def _after(text: str | None) -> float | None:
    seconds = _number(text)
    if seconds is not None or not text:
        return seconds
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return None


def _duration(text: str | None) -> float | None:
    """Return the seconds of "6m0s", "20ms" or "1.5"."""
    parts = _DURATION.findall(text or "")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts) if parts else _number(text)
