"""`bash scripts/chat.sh`: the terminal, an endpoint in place of a checkpoint, and what is refused early."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_utils.errors import MMRoleError
from data_utils.prompts import Role
from tests.conftest import ROOT
from tests.web.conftest import Served
from web.__main__ import main
from web.cast import Cast, read_cast
from web.chats import ChatError, Limits, Prompt
from web.service import EndpointService, Piece, Sampling
from web.terminal import talk


@pytest.fixture(scope="module")
def checkpoint(chat_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "Tiny-Agent"
    model, tokenizer = chat_model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def name_of(demo: Path) -> str:
    return min(json.loads((demo / "profiles/in-distribution/profiles.json").read_text(encoding="utf-8")))


def run_chat(settings: dict[str, Any], said: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    environment["VIRTUAL_ENV"] = sys.prefix
    command = ["sh", str(ROOT / "scripts" / "chat.sh"), *flags]
    return subprocess.run(command, input=said, env=environment, cwd=cwd, capture_output=True, text=True)


@pytest.mark.slow
def test_the_terminal(checkpoint: Path, demo: Path, tmp_path: Path) -> None:
    name = name_of(demo)
    said = "/again\n/agian\nHello\n/again\n/prompt\n/begin\n/quit\n"
    settings = {"MODEL_PATH": checkpoint, "DATA_ROOT": demo}
    done = run_chat(settings, said, "--terminal", "--character", name, "--max_new_tokens", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{name}: ") >= 3
    assert "[human]: Hello" in done.stdout or "the curious human about the image" in done.stdout
    assert "there is no answer yet" in done.stderr
    assert "there is no command /agian" in done.stderr
    own = read_cast(demo).pictures_of(name)
    assert name in own[0].information.role
    assert name not in json.loads((demo / "images" / "annotations.json").read_text(encoding="utf-8"))[0]["role_info"]
    assert f" - Scene information: {own[0].information.scene}\n" in done.stdout


def test_an_answer_that_is_stopped_and_saved(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped:
        name = "stopped"

        def prompt_tokens(self, prompt: Prompt) -> None:
            return None

        async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Piece]:
            asked.append(prompt)
            yield Piece("Half an")
            raise KeyboardInterrupt

    asked: list[Prompt] = []
    Image.new("RGB", (7, 5), "red").save(tmp_path / "mine.png")
    lines = iter(["Hello", f"/picture {tmp_path}/none.png", f"/picture {tmp_path}/mine.png", "And this?", "/save"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    options = argparse.Namespace(character=name_of(demo), partner=None, image=None, save_to=tmp_path / "my")
    assert talk(Stopped(), read_cast(demo), options, Limits()) == 0
    assert "that did not work: a picture cannot be read: No such file" in capsys.readouterr().err
    assert [prompt.query[0]["image"].size == (7, 5) for prompt in asked] == [False, True]
    assert [" - Scene information: " in prompt.query[1]["text"] for prompt in asked] == [True, False]
    (path,) = (tmp_path / "my" / "dialogues" / "in-distribution" / "human-role").glob("*.json")
    (dialogue,) = json.loads(path.read_text(encoding="utf-8"))
    assert [turn["value"] for turn in dialogue["conversations"]] == ["Hello", "Half an", "And this?", "Half an"]


def test_the_terminal_needs_no_package_of_the_page() -> None:
    code = "import sys; sys.modules |= dict.fromkeys(['fastapi', 'gradio', 'uvicorn']); import web.terminal"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_endpoint_in_place_of_a_checkpoint(served: Served) -> None:
    service = EndpointService(f"{served.url}/v1", "tiny")
    prompt = Prompt([{"text": "Tell me"}], "Be brief.", [([{"text": "Hi"}], "Yes?")])

    async def answer(sampling: Sampling) -> list[Piece]:
        return [piece async for piece in service.stream(prompt, sampling)]

    pieces = asyncio.run(answer(Sampling(temperature=0.0, max_tokens=5)))
    assert "".join(piece.text for piece in pieces)
    assert pieces[-1].finish_reason == "length"
    with pytest.raises(ChatError, match="the endpoint failed"):
        asyncio.run(answer(Sampling(temperature=9.0)))
    service.close()


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b'data: {"choices": [{"delta": {"content": "Half"}}]}\n\n', "broke off"),
        (b'data: {"choices": [{"delta": {"content": "Half"}}]}\n\ndata: {"cho\n\n', "the endpoint failed"),
        (b'data: {"error": {"message": "no such key: a-long-secret-0815"}}\n\n', r"no such key: \*\*\*"),
    ],
)
def test_an_endpoint_that_breaks(sent: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-long-secret-0815")

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": sent})

    async def answer(service: EndpointService) -> list[Piece]:
        return [piece async for piece in service.stream(Prompt([{"text": "Hi"}], ""), Sampling())]

    with Served(broken) as served:
        service = EndpointService(f"{served.url}/v1", "tiny")
        with pytest.raises(ChatError, match=message):
            asyncio.run(answer(service))
        service.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "neither --model_path nor --endpoint, or both"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "model is missing"),
        (["--model_path", "here", "--model", "m"], "flags without effect"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--device", "cpu"], "flags without effect"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--partner", "Ada"], "flags without effect"),
        (["--endpoint", "localhost", "--model", "m"], "not the address of an endpoint"),
        (["--endpoint", "https://example.org/v1", "--model", "m", "--no_page"], "no key for the endpoint"),
        (["--model_path", "nowhere"], "no such checkpoint folder"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--data_root", "nowhere"], "no such data root"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--host", "0.0.0.0"], "without a key"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--port", "0"], "not a port"),
    ],
)
def test_what_is_refused_early(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.__main__.listen_problem", lambda *_: None)  # whoever has port 8000 here
    with pytest.raises(MMRoleError, match=message):
        main(flags)


def test_a_port_that_is_taken_is_reported_before_the_model_loads() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        flags = ["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--port", str(other.getsockname()[1])]
        with pytest.raises(MMRoleError, match="cannot listen there"):
            main(flags)


def test_what_the_server_prints_can_be_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    monkeypatch.setattr("web.__main__.listen_problem", lambda *_: None)
    monkeypatch.setattr("web.__main__.read_cast", lambda _: Cast({"O'Brien": Role("O'Brien", "1984", "Thinks.")}, {}))
    monkeypatch.setenv("MMROLE_KEY", "a long random text")
    assert main(["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--no_page", "--host", "::1"]) == 0
    printed = capsys.readouterr().out
    command = shlex.split(printed[printed.index("curl") : printed.index("Ctrl-C")])
    assert command[1:4] == ["http://[::1]:8000/v1/chat/completions", "-H", "Authorization: Bearer $MMROLE_KEY"]
    assert json.loads(command[-1])["model"] == "mmrole/O'Brien"


def test_a_character_that_is_not_there(demo: Path) -> None:
    flags = ["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--data_root", str(demo), "--terminal"]
    with pytest.raises(MMRoleError, match="no such character") as error:
        main([*flags, "--character", "Nobody"])
    assert name_of(demo) in str(error.value)
