"""A tiny checkpoint and the demo's world, served on loopback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qwen_vl
from data_utils.demo.world import draw_world, write_world
from qwen_vl import QwenVLTokenizer
from tests.qwen_vl.conftest import small_model

uvicorn = pytest.importorskip("uvicorn", reason="the web extra is not installed")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another made-up data root, whose first picture does not show its first character."""
    folder = tmp_path_factory.mktemp("web") / "world"
    write_world(draw_world(0), folder)
    return folder


@pytest.fixture(scope="session")
def chat_model(tokenizer: QwenVLTokenizer) -> tuple[qwen_vl.QwenVLForCausalLM, QwenVLTokenizer]:
    torch.set_num_threads(1)
    model = small_model(seq_length=2048, max_position_embeddings=8192)
    return model, tokenizer


class Served:
    """An app on a free port; `with` ends it."""

    def __init__(self, app: object) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Served:
        self._socket.listen()  # a connection waits until the server takes it
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()


@pytest.fixture(scope="session")
def served(chat_model, demo: Path) -> Iterator[Served]:
    from web.cast import read_cast
    from web.chats import Limits
    from web.server import LOOPBACK, build_app
    from web.service import EngineService

    service = EngineService(*chat_model, "tiny", most_waiting=40)
    app = build_app(
        service, read_cast(demo), hosts=frozenset(LOOPBACK), key=None, limits=Limits(body=4_000_000, pixels=1_000_000)
    )
    with Served(app) as running:
        running.service = service
        yield running
    service.close()
