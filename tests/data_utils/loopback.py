"""A fake hub, image server and chat model in one: a server on loopback whose faults a test chooses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c0ffee" + "0" * 34
LARGE = 2000  # bytes from which the fake hub gives a sha256
SECRET = "top-verysecret-0123456789"


@dataclass
class Reply:
    """A reply of the chat model: a status, a body (JSON, or raw bytes) and headers; or a fault.

    Attributes:
        fault: "hang up" closes the connection, "trickle" sends a byte now and then and never ends.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    fault: str = ""


Chat = Callable[[dict[str, Any], int], "Reply | str"]


def completion(text: str, *, finish: str = "stop", model: str = "m", tokens: int = 100, **message: Any) -> Reply:
    """A chat completion, as endpoints send it."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": tokens - 30, "completion_tokens": 30, "total_tokens": tokens}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": usage}
    return Reply(body=body)


def refusal(status: int, message: str, **more: Any) -> Reply:
    """An error, as endpoints send it."""
    headers = more.pop("headers", {})
    return Reply(status, {"error": {"message": message, **more}}, headers)


def scripted(*replies: Reply | str | Chat) -> Chat:
    """Return a chat model that gives these replies in turn, and from then on always the last."""
    left, lock = list(replies), threading.Lock()

    def chat(body: dict[str, Any], number: int) -> Reply | str:
        with lock:
            reply = left.pop(0) if len(left) > 1 else left[0]
        return reply(body, number) if callable(reply) else reply

    return chat


@dataclass
class Site:
    """The files and replies of the server, its faults, and the requests that came.

    Attributes:
        chat: Replies to a chat request, by its body and its number from 1.
        chats: The bodies of the chat requests.
        keys: Their Authorization headers.
        files: Content by path.
        faults: By path, the faults of the first, second, ... GET of it.
        requests: (method, path, Range header) of each request for a file.
        stalled: Set when a file has stalled half-way.
        over: Ends what stalls.
    """

    chat: Chat = lambda body, number: "fine"
    chats: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def gets(self, path: str) -> list[str | None]:
        return [byte_range for method, name, byte_range in self.requests if method == "GET" and name == path]


class Server(ThreadingHTTPServer):
    request_queue_size = 256  # more connections at once than any client makes, because others would be refused


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.site.lock:
            self.site.chats.append(body)
            self.site.keys.append(self.headers.get("Authorization", ""))
            number = len(self.site.chats)
        reply = self.site.chat(body, number)
        reply = completion(reply) if isinstance(reply, str) else reply
        if reply.fault == "hang up":
            self.close_connection = True
            return
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(10**6 if reply.fault == "trickle" else len(data)))
        self.end_headers()
        if reply.fault == "trickle":
            with contextlib.suppress(OSError):
                while not self.site.over.wait(0.02):
                    self.wfile.write(b" ")
            return
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        byte_range = self.headers.get("Range")
        self.site.requests.append((self.command, path, byte_range))
        content = self.site.files.get(path)
        faults = self.site.faults.get(path, []) if self.command == "GET" else []
        fault = faults.pop(0) if faults else ""
        if content is None or fault == "missing":
            return self.send(404, b"")
        if fault == "busy":
            return self.send(503, b"", {"Retry-After": "0"})
        if fault == "garbage":
            content = b"<html>" + content[6:]  # as many bytes as it should be
        if fault == "short":  # truncated, with a fitting length
            return self.send(200, content[:-40], self.about(path, content))
        start = int(byte_range.removeprefix("bytes=").partition("-")[0]) if byte_range else 0
        headers = self.about(path, content)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fault == "drop":
            return self.send(206 if start else 200, body[: len(body) // 2], headers, announced=len(body))
        if fault == "stall":
            self.send(206 if start else 200, body[: len(body) // 2], headers, announced=len(body))
            self.site.stalled.set()
            self.site.over.wait()
            return None
        return self.send(206 if start else 200, body, headers)

    def about(self, path: str, content: bytes) -> dict[str, str]:
        if "/resolve/" not in path:
            return {}
        return {"ETag": f'"{hub_id(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}

    def send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, announced: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        if announced is not None:
            self.close_connection = True
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def hub_id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if len(content) >= LARGE else git_id(content)


@contextlib.contextmanager
def serving() -> Iterator[Site]:
    """Serve a site on a free port."""
    found = Site()
    server = Server(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": found}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    found.over.set()
    server.shutdown()
    server.server_close()


def stay_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the caches and the token of the hub that this machine may have; the chat model's key is `SECRET`."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for name in ("HF_HUB_CACHE", "HF_HOME", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def put_repo(site: Site, name: str, kind: str, files: dict[str, bytes]) -> dict[str, str]:
    """Put a hub repository on the site; returns the path of each file on the server."""
    base = f"/datasets/{name}" if kind == "dataset" else f"/{name}"
    tree = []
    for path, content in files.items():
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
        if len(content) >= LARGE:
            entry["lfs"] = {"oid": hub_id(content), "size": len(content), "pointerSize": 130}
        tree.append(entry)
        site.files[f"{base}/resolve/{COMMIT}/{path}"] = content
    about = json.dumps({"id": name, "sha": COMMIT, "siblings": [], "private": False, "tags": []}).encode()
    for revision in ("main", COMMIT):
        site.files[f"/api/{kind}s/{name}/revision/{revision}"] = about
        site.files[f"/api/{kind}s/{name}/tree/{revision}"] = json.dumps(tree).encode()
    return {path: f"{base}/resolve/{COMMIT}/{path}" for path in files}


def held(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
