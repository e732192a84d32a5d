"""The OpenAI-compatible API: `/v1/models` and `/v1/chat/completions`, with a model for each character.

Chats are neither stored nor logged, no URL is fetched and no path is read.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from data_utils.prompts import INFORMATION_FIELDS, ImageInformation
from qwen_vl.sampling_params import LEAST_TEMPERATURE
from web.cast import PREFIX, Cast
from web.chats import ChatError, Limits, Scene, parse_chat, plain_prompt, role_play
from web.service import Piece, Sampling, Service, fitting_prompt

# The interface of ASGI.
Scope = Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
_REFUSED = {  # unsupported parameters that would change the answer
    "n": (None, 1),
    "tool_choice": (None, "none", "auto"),  # offered tools are never called; front ends send theirs anyway
    "function_call": (None, "none", "auto"),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
}


class Guard:
    """Admits requests by host, origin, key and size.

    Args:
        app: The guarded app.
        hosts: Allowed names of the server; scripts of other pages use other names.
        key: The bearer token of clients, and password of browsers for any user; None for none.
        limits: The largest body.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], key: str | None, limits: Limits) -> None:
        self.app, self.hosts, self.key, self.limits = app, hosts, key, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject forbidden connections, and pass on the others."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        error = self._refusal(headers)
        if error is not None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            asks = {"WWW-Authenticate": 'Basic realm="MMRole", charset="UTF-8"'} if error.status == 401 else None
            await JSONResponse(error.body(), error.status, asks)(scope, receive, send)
            return
        await self.app(scope, self._counted(receive), _with_headers(send))

    def _refusal(self, headers: Mapping[str, str]) -> ChatError | None:
        host = _host_of("//" + headers.get("host", ""))
        if host not in self.hosts:
            return ChatError(f"this server does not answer to the host {host!r}", status=403, code="host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            return ChatError("requests from other pages are refused", status=403, code="origin")
        if self.key is not None and not _has_key(headers.get("authorization", ""), self.key):
            return ChatError("the key is missing or wrong: send it as a bearer token", status=401, code="key")
        if (
            headers.get("content-length", "0").isdecimal()
            and int(headers.get("content-length", "0")) > self.limits.body
        ):
            return self._too_large()
        return None

    def _too_large(self) -> ChatError:
        return ChatError(f"a request may have {self.limits.body:,} bytes", status=413, code="too_large")

    def _counted(self, receive: Receive) -> Receive:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.limits.body:
                raise self._too_large()
            return message

        return counted


def _with_headers(send: Send) -> Send:
    """Forbid pages to load anything from other hosts, or to send them their address."""

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *_HEADERS]}
        await send(message)

    return with_headers


def build_app(service: Service, cast: Cast, *, hosts: frozenset[str], key: str | None, limits: Limits) -> FastAPI:
    """Return the app of the API.

    Args:
        service: Writes the answers.
        cast: The characters, each with a model name.
        hosts: Allowed host names of the server, without ports.
        key: The key of clients, or None.
        limits: The limits of a request.
    """
    app = FastAPI(title="MMRole", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, hosts=hosts, key=key, limits=limits)
    started = int(time.time())

    @app.exception_handler(ChatError)
    async def error_response(_: Request, error: ChatError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, {"Retry-After": "2"} if error.status == 429 else None)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = [service.name, *(PREFIX + name for name in cast.roles)]
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": started, "owned_by": "mmrole"} for name in names],
        }

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            cast.role(name.removeprefix(PREFIX) if name.startswith(PREFIX) else name)
        return {"id": name, "object": "model", "created": started, "owned_by": "mmrole"}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Any:
        body = _json_object(await request.body())
        name, sampling, streams = body.get("model"), _sampling(body, limits), _streams(body)
        make = _maker(name, body, service, cast)
        # Pictures and long texts take their time: the others' answers go on meanwhile.
        chat = await asyncio.to_thread(parse_chat, body.get("messages"), limits)
        prompt = await asyncio.to_thread(fitting_prompt, service, make, chat, sampling)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        answer = service.stream(prompt, sampling)
        if streams:
            first = await anext(answer)  # errors in the request become HTTP errors
            options = body.get("stream_options")
            usage = isinstance(options, dict) and bool(options.get("include_usage"))
            events = _events(head, first, answer, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async with aclosing(answer):
            pieces = [piece async for piece in _until_gone(answer, request)]
        if not pieces:
            return JSONResponse({}, 499)  # the client has left
        last = pieces[-1]
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish_reason}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(last)}

    @app.api_route("/v1/{path:path}", methods=["GET", "POST"], include_in_schema=False)
    async def nothing(path: str) -> None:
        raise ChatError(f"there is no /v1/{path}: ask /v1/models or /v1/chat/completions", status=404)

    return app


def _maker(name: Any, body: Mapping[str, Any], service: Service, cast: Cast) -> Any:
    """Return the function from a chat to the prompt of the requested model."""
    if name == service.name:
        return plain_prompt
    if not isinstance(name, str) or not name.startswith(PREFIX):
        what = f"there is no model {name!r}: GET /v1/models lists them"
        raise ChatError(what, "model", status=404, code="model_not_found")
    character = name.removeprefix(PREFIX)
    role = cast.role(character)
    own = body.get("mmrole") or {}
    if (
        not isinstance(own, dict)
        or not own.keys() <= {"partner", *INFORMATION_FIELDS}
        or not all(isinstance(value, str) for value in own.values())
    ):
        raise ChatError(f"mmrole must be an object of texts: partner, {', '.join(INFORMATION_FIELDS)}", "mmrole")
    partner = cast.role(own["partner"]) if own.get("partner") else None
    scene = Scene(role, partner, ImageInformation.of(own))
    return lambda chat: role_play(scene, chat)


def _sampling(body: Mapping[str, Any], limits: Limits) -> Sampling:
    for field, harmless in _REFUSED.items():
        if body.get(field) not in harmless:
            raise ChatError(f"{field} = {body[field]!r} is not supported: leave it out", field)
    most = body.get("max_completion_tokens")
    most = body.get("max_tokens") if most is None else most
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or not 0 < most <= limits.new_tokens):
        raise ChatError(f"max_tokens must be a whole number from 1 to {limits.new_tokens}", "max_tokens")
    most = limits.usual_tokens if most is None else most
    temperature, top_p = _number(body, "temperature", 0, 2), _number(body, "top_p", 0, 1)
    if top_p == 0 or (temperature is not None and temperature < LEAST_TEMPERATURE):
        temperature, top_p = 0.0, None  # only the most likely token
    seed = body.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63):
        raise ChatError("seed must be a whole number of 64 bits", "seed")
    stop = body.get("stop")
    stop = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(text, str) and text for text in stop):
        raise ChatError("stop must be a text, or up to 16 texts, none of them empty", "stop")
    return Sampling(temperature, top_p, seed, most, tuple(stop))


def _streams(body: Mapping[str, Any]) -> bool:
    if body.get("stream") not in (None, True, False):
        raise ChatError("stream must be true or false", "stream")
    return bool(body.get("stream"))


def _number(body: Mapping[str, Any], field: str, least: float, most: float) -> float | None:
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ChatError(f"{field} must be a number from {least} to {most}", field)
    return float(value)


async def _events(
    head: Mapping[str, Any], first: Piece, answer: AsyncIterator[Piece], usage: bool
) -> AsyncIterator[str]:
    """Yield an answer as server-sent events."""

    def event(delta: Mapping[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event({**head, "object": "chat.completion.chunk", "choices": [choice]})

    async with aclosing(answer):
        yield event({"role": "assistant", "content": ""})
        piece = first
        try:
            while True:
                if piece.text:
                    yield event({"content": piece.text})
                if piece.finish_reason is not None:
                    break
                piece = await anext(answer)
        except ChatError as error:
            yield _event(error.body())
            return
        yield event({}, piece.finish_reason)
        if usage and _usage(piece):
            yield _event({**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(piece)})
        yield "data: [DONE]\n\n"


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _until_gone(answer: AsyncIterator[Piece], request: Request) -> AsyncIterator[Piece]:
    """Yield the pieces of an answer; ends early when the client has left."""
    async for piece in answer:
        if await request.is_disconnected():
            return
        yield piece


def _usage(piece: Piece) -> dict[str, int] | None:
    """Return the tokens that an answer took, or None where an endpoint does not say."""
    prompt, completion = piece.prompt_tokens, piece.completion_tokens
    if prompt is None or completion is None:
        return None
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise ChatError("the request is not valid JSON") from None
    if not isinstance(body, dict):
        raise ChatError("the request must be a JSON object")
    return body


def _has_key(authorization: str, key: str) -> bool:
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(value.encode(), key.encode())


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
