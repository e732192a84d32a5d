"""`scripts/serve_vllm.sh`: the same answers over HTTP, streamed or not, and what it refuses."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, shared_folder
from tests.golden_checkpoint import write_golden_checkpoint
from tests.processes import reserved_port
from tests.vllm.conftest import NEW_TOKENS, SYSTEM, Native, Prompt, needs_vllm

pytestmark = needs_vllm

FLAGS = ["--dtype", "float32", "--enforce-eager", "--enable-chunked-prefill", "--max-num-batched-tokens", "2048"]


class Server:
    """The script, running; `ready` is what it says then."""

    def __init__(self, folder: Path, port: str) -> None:
        # The environment of these tests, but with an engine in a separate process, as users have it.
        environ = {**os.environ, "MODEL_PATH": str(folder), "PORT": port, "VLLM_VENV": sys.prefix}
        environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        command = ["bash", "scripts/serve_vllm.sh", *FLAGS]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environ, start_new_session=True, **pipes)
        self.output: list[str] = []
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        self._ready.wait()
        self.ready = "".join(self.output)
        assert "\ncurl " in self.ready, f"the server has ended:\n{self.ready}"

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.output.append(line)
            if line.startswith("curl "):
                self._ready.set()
        self._ready.set()  # it has ended

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(native: Native, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the same weights as `.bin` files, as the released ones are; those of `native` without `../shared`."""
    folder = native.folder
    if shared_folder():
        folder = write_golden_checkpoint(tmp_path_factory.mktemp("bin") / "tiny_a", kind="bin")
        shutil.copyfile(native.folder / "qwen.tiktoken", folder / "qwen.tiktoken")
    with reserved_port() as port:
        running = Server(folder, port)
        yield running
        running.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    import httpx
    import openai

    [address] = set(re.findall(r"http://127\.0\.0\.1:\d+/v1", server.ready))
    return openai.OpenAI(base_url=address, api_key="none", http_client=httpx.Client(trust_env=False), max_retries=0)


def model_of(client: Any) -> str:
    return client.models.list().data[0].id


def over_http(prompt: Prompt) -> list[dict[str, Any]]:
    """Return messages with pictures as `data:` URLs of the unchanged files."""
    parts = []
    for element in prompt.query:
        if "image" in element:
            kind = "jpeg" if element["image"].suffix == ".jpg" else "png"
            data = base64.b64encode(element["image"].read_bytes()).decode()
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}})
        else:
            parts.append({"type": "text", "text": element["text"]})
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}]


@pytest.mark.parametrize("tokens", [2049, 900])
@pytest.mark.parametrize("shown", [None, 0, 1], ids=["text", "sideways", "transparent"])
def test_answers(tokens: int, shown: int | None, native: Native, pictures: list[Path], client: Any) -> None:
    prompt = native.prompt(tokens, seed=tokens, picture=None if shown is None else pictures[shown])
    asked = {"model": model_of(client), "messages": over_http(prompt), "temperature": 0, "max_tokens": NEW_TOKENS}
    [expected] = native.answers([prompt])
    answer = client.chat.completions.create(**asked, extra_body={"return_token_ids": True})
    assert answer.usage.prompt_tokens == tokens
    assert native.cut(answer.choices[0].token_ids) == expected
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == answer.choices[0].message.content
    assert len(pieces) > 5


def test_the_printed_example_works(server: Server) -> None:
    [example] = [line for line in server.output if line.startswith("curl ")]
    if shutil.which("curl") is None:
        pytest.skip("no curl here, with which the printed example asks")
    command = example.replace('"messages"', '"max_tokens": 4, "messages"')
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_raw_prompts(native: Native, client: Any) -> None:
    import openai

    model = model_of(client)
    for prompt in ("Once upon a time", "<|im_start|>assistant\n"):
        with pytest.raises(openai.BadRequestError, match="must end with"):
            client.completions.create(model=model, prompt=prompt)
    prompt = native.prompt(300)
    answer = client.completions.create(
        model=model,
        prompt=native.ids(prompt.query),
        temperature=0,
        max_tokens=NEW_TOKENS,
        extra_body={"return_token_ids": True},
    )
    assert [native.cut(answer.choices[0].token_ids)] == native.answers([prompt])


def test_a_begun_answer_is_not_continued(client: Any) -> None:
    import openai

    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy, my"}]
    further = {"continue_final_message": True, "add_generation_prompt": False}
    for extra in (further, {}):
        with pytest.raises(openai.BadRequestError, match="cannot be continued"):
            client.chat.completions.create(model=model_of(client), messages=begun, extra_body=extra)


def test_pictures_are_not_fetched(client: Any) -> None:
    import openai

    for url in ("http://127.0.0.1:9/a.png", "file:///etc/hostname", "data:image/png;base64,AAAA"):
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
        with pytest.raises(openai.BadRequestError, match=r"not fetched|not a readable picture"):
            client.chat.completions.create(model=model_of(client), messages=messages)


@pytest.mark.parametrize(
    ("files", "problem"),
    [(["adapter_config.json"], "LoRA adapter"), ([], "no config.json")],
)
def test_folders_that_are_refused(files: list[str], problem: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with reserved_port() as port:
        environ = {**os.environ, "MODEL_PATH": str(tmp_path), "PORT": port}
        result = subprocess.run(["bash", ROOT / "scripts/serve_vllm.sh"], env=environ, capture_output=True, text=True)
    assert result.returncode == 2
    assert problem in result.stderr


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"n": 2, "extra_body": {"use_beam_search": True}}, "cannot be continued"),  # which its second step would do
        ({"response_format": {"type": "json_object"}}, "takes no response_format"),
    ],
    ids=["beam search", "response_format"],
)
def test_requests_that_are_refused(asked: dict[str, Any], problem: str, client: Any) -> None:
    """With a message to the client; the server goes on."""
    import openai

    common = {"model": model_of(client), "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match=problem):
        client.chat.completions.create(**common, **asked)
    assert client.chat.completions.create(**common).choices[0].message.content is not None
