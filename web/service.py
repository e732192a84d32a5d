"""Serves many people at once: through the engine in a separate thread, or through an endpoint."""

from __future__ import annotations

import asyncio
import itertools
import queue
import secrets
import threading
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qwen_vl.sampling_params import MAX_NEW_TOKENS
from web.chats import Chat, ChatError, Prompt, openai_messages, without_oldest_turns

if TYPE_CHECKING:
    from qwen_vl import QwenVLForCausalLM, QwenVLTokenizer


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; None for the model's own settings. A temperature of 0 is greedy."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """New text of an answer; the last has a reason (`stop` or `length`) and, where they are known, the tokens used."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Service(Protocol):
    """Writes answers."""

    name: str

    def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Piece]:
        """Yield the answer as it is written; leaving the iteration frees its place.

        Raises:
            ChatError: The prompt cannot be answered, or too many are waiting.
        """
        ...

    def prompt_tokens(self, prompt: Prompt) -> int | None:
        """Return the tokens of a prompt, or None if only the endpoint knows."""
        ...


def fitting_prompt(service: Service, make: Callable[[Chat], Prompt], chat: Chat, sampling: Sampling) -> Prompt:
    """Return the prompt of a chat, without the oldest turns if prompt and answer do not fit into the model.

    Raises:
        ChatError: Not even the last message fits.
    """
    longest = getattr(service, "longest", None)
    answer = sampling.max_tokens or MAX_NEW_TOKENS

    def fits(pairs: int) -> bool:
        prompt = make(without_oldest_turns(chat, pairs))
        return longest is None or (service.prompt_tokens(prompt) or 0) + answer <= longest

    pairs = range((len(chat.turns) + 1) // 2 or 1)  # that can be left out
    fewest = 0 if fits(0) else bisect_left(pairs, True, lo=1, key=fits)
    if fewest == len(pairs):
        what = f"the prompt and an answer of {answer} tokens have room for {longest:,} tokens"
        raise ChatError(f"{what}: shorten the message", "messages", code="context_length_exceeded")
    return make(without_oldest_turns(chat, fewest))


class EngineService:
    """The batching engine in a thread: requests join and leave between its steps.

    Args:
        model: In eval mode.
        tokenizer: The checkpoint's.
        name: The model's name for clients.
        most_waiting: The largest number of requests at once; more are refused.
        max_batch_tokens: See `BatchGenerator`.

    Attributes:
        engine: The engine, for its thread only (`call`).
    """

    def __init__(
        self,
        model: QwenVLForCausalLM,
        tokenizer: QwenVLTokenizer,
        name: str,
        *,
        most_waiting: int = 256,
        max_batch_tokens: int | None = None,
    ) -> None:
        from qwen_vl.generation import BatchGenerator

        self.name, self.most_waiting = name, most_waiting
        self.engine = BatchGenerator(model, tokenizer, max_batch_tokens=max_batch_tokens)
        self._tokenizer = tokenizer
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outputs: dict[int, Callable[[Any], None]] = {}  # of running requests, for the thread only
        self._numbers = itertools.count()
        self._under_way = 0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def prompt_tokens(self, prompt: Prompt) -> int:
        """Return the tokens of a prompt, without history that the window drops."""
        from qwen_vl.chat import build_context

        system = [{"text": prompt.system}]
        return len(build_context(self._tokenizer, prompt.query, prompt.history, system).ids)

    @property
    def longest(self) -> int:
        """Return how many tokens prompt and answer may have together."""
        return self.engine.model.config.max_position_embeddings

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Piece]:
        """See `Service`."""
        from qwen_vl.generation import Request

        if self._under_way >= self.most_waiting:
            raise ChatError("too many requests are waiting: try again in a moment", status=429, code="busy")
        number = next(self._numbers)
        request = Request(
            id=number,
            query=prompt.query,
            system=[{"text": prompt.system}],  # an element: tags in it are text
            history=prompt.history,
            seed=secrets.randbits(31) if sampling.seed is None else sampling.seed,
            do_sample=None if sampling.temperature is None else sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_tokens,
            stop=sampling.stop,
        )
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Any] = asyncio.Queue()

        def put(item: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed, so nobody waits
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        self._under_way += 1
        self.call(lambda: self._add(request, put))
        try:
            while True:
                event = await pieces.get()
                if isinstance(event, Exception):
                    raise event
                result = event.result
                if result is not None and result.error:
                    raise ChatError(f"the answer failed: {result.error}", status=500, code="failed")
                if result is None:
                    if event.text:
                        yield Piece(event.text)
                    continue
                yield Piece(event.text, result.finish_reason, result.prompt_tokens, len(result.token_ids))
                return
        finally:
            self._under_way -= 1
            self.call(lambda: self._abort(number))

    def call(self, function: Callable[[], None]) -> None:
        """Run a function in the engine's thread, between two steps."""
        self._commands.put(function)

    def close(self) -> None:
        """End the thread after its current step."""
        self._commands.put(None)
        self._thread.join()

    def _add(self, request: Any, put: Callable[[Any], None]) -> None:
        try:
            self.engine.add_request(request)
        except (ValueError, TypeError, KeyError) as error:
            put(ChatError(str(error), "messages", code="context_length_exceeded" if "long" in str(error) else None))
        else:
            self._outputs[request.id] = put

    def _abort(self, number: int) -> None:
        if self._outputs.pop(number, None) is not None:
            self.engine.abort(number)

    def _work(self) -> None:
        while True:
            waits = not self._outputs
            with suppress(queue.Empty):
                while True:
                    command = self._commands.get(block=waits)
                    if command is None:
                        return
                    command()
                    waits = False
            if self._outputs:
                self._step()

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception as error:  # noqa: BLE001 - server boundary: running requests fail, the next may work
            failure = ChatError(f"the engine failed: {type(error).__name__}: {error}", status=500, code="failed")
            for number, put in self._outputs.items():
                self.engine.abort(number)
                put(failure)
            self._outputs.clear()
            return
        for event in events:
            put = self._outputs.get(event.id)
            if put is not None:
                if event.result is not None:
                    del self._outputs[event.id]
                put(event)


class EndpointService:
    """Answers with a model behind an OpenAI-compatible endpoint.

    Args:
        url: Its base URL, with `/v1`; the key is in OPENAI_API_KEY, if it needs one.
        model: The model's name there.

    Raises:
        MMRoleError: As `data_utils.endpoint.Endpoint` does; nothing is sent.
    """

    longest: int | None = None

    def __init__(self, url: str, model: str) -> None:
        from data_utils.endpoint import Endpoint

        self.name, self._endpoint = model, Endpoint([url], model)

    def prompt_tokens(self, prompt: Prompt) -> None:
        """Return None: only the endpoint knows."""
        return

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Piece]:
        """See `Service`."""
        settings: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        settings |= {"max_tokens": sampling.max_tokens, "stop": list(sampling.stop) or None}
        settings = {name: value for name, value in settings.items() if value is not None}
        reason = usage = None
        try:
            async with self._endpoint.client() as client:
                chunks = await client.chat.completions.create(
                    model=self.name, messages=openai_messages(prompt), stream=True, **settings
                )
                async with chunks:
                    async for chunk in chunks:
                        usage = chunk.usage or usage
                        for choice in chunk.choices[:1]:
                            reason = choice.finish_reason or reason
                            if choice.delta.content:
                                yield Piece(choice.delta.content)
        except Exception as error:  # noqa: BLE001 - one answer fails; a broken stream raises the HTTP library's own errors
            what = self._endpoint.scrub(f"{type(error).__name__}: {error}")
            raise ChatError(f"the endpoint failed: {what}", status=502, code="endpoint") from None
        if reason is None:
            raise ChatError("the endpoint broke off in the middle of its answer", status=502, code="endpoint")
        used = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
        yield Piece("", "length" if reason == "length" else "stop", *used)

    def close(self) -> None:
        """Ends the connections."""
        self._endpoint.close()
