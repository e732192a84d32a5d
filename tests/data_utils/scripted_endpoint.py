"""An OpenAI-compatible endpoint on loopback that answers what a test tells it to: garbage, 429, 500, the key."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.data_utils.loopback import Server

SECRET = "top-secret-0123456789"
PIECE = "sk-abcd********wxyz"  # as OpenAI quotes a key
PARTS = ("introduction", "personality", "experience", "relationship", "catchphrase")
DETAILED = {part: f"Something about the {part} of the character." for part in PARTS}
SUMMARY = "\n".join(f"### {part.title()}\nWhat there is to say of it, in a sentence or two." for part in PARTS)

Reply = tuple[int, Any]


@dataclass
class Site:
    """The faults that the endpoint answers first, in order, and the requests that came."""

    faults: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    tokens: int = 100  # that each answer is said to have taken
    answer: Callable[[dict[str, Any]], str] | None = None
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


def text_of(request: dict[str, Any]) -> str:
    content = request["messages"][1]["content"]
    return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")


def good_answer(request: dict[str, Any], number: int) -> str:
    """What a strong model would write."""
    text = text_of(request)
    if "Shorten the profile" in text:
        return SUMMARY
    if "five keys" in text:
        return f"Here it is:\n```json\n{json.dumps(DETAILED)}\n```"
    turns = re.search(r"take turns, (\d+) turns", text)
    if not turns:
        return f"I see a picture, and it is the picture number {number} of this day."
    first, second = re.search(r'"speaker": "([^"]+)" or "([^"]+)"', text).groups()
    said = [{"speaker": (first, second)[i % 2], "text": f"I say {number} and {i}."} for i in range(int(turns[1]))]
    return json.dumps(said)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.site.lock:
            self.site.asked.append(request)
            self.site.keys.append(self.headers.get("Authorization", ""))
            number = len(self.site.asked)
            fault = self.site.faults.pop(0) if self.site.faults else ""
        status, body = self.reply(request, number, fault)
        if status == 0:
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def reply(self, request: dict[str, Any], number: int, fault: str) -> Reply:
        if fault.isdigit():
            return int(fault), {"error": {"message": f"no: your key is {SECRET}, {PIECE}", "code": "x"}}
        if fault == "quota":
            return 429, {"error": {"message": "spent", "code": "insufficient_quota"}}
        if fault == "hang up":
            return 0, b""
        if fault == "not json":
            return 200, b"<html>busy</html>"
        if fault == "not chat":
            return 200, {"object": "list", "data": []}
        if "new-model" in request["model"] and "max_tokens" in request:
            return 400, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}}
        content = fault.removeprefix("say ") if fault.startswith("say ") else good_answer(request, number)
        if self.site.answer is not None and not fault:
            content = self.site.answer(request)
        choice = {"index": 0, "finish_reason": "length" if fault == "cut" else "stop", "message": {"role": "assistant"}}
        choice["message"]["content"] = content
        usage = {"prompt_tokens": 70, "completion_tokens": 30, "total_tokens": self.site.tokens}
        return 200, {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }


@contextmanager
def serving() -> Iterator[Site]:
    """Serve on a free port of loopback."""
    found = Site()
    server = Server(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": found}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield found
    server.shutdown()
    server.server_close()
