"""A stand-in for the model, a small world to run it on, and both entry scripts run with it in a process of their own.

    python -m tests.fake_backend inference|RM_review FLAGS...

KILL_AT=n in the environment kills that process, as `kill -9` does, in the middle of the n-th write to a file or just
before the n-th renaming.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

from eval.backends.backend import Request, Result
from eval.running.team import run_script

SYSTEM = "You are a dedicated role-playing assistant."
TEST_FILES = ("comment_test.json", "human-role_test.json", "inter-role_test.json")


class FakeBackend:
    """Says something that depends on all of a request; `reply` may say something else, or raise."""

    def __init__(self, reply: Callable[[Request], str] | None = None) -> None:
        self.requests: list[Request] = []
        self._reply = reply or fake_answer

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for request in requests:
            self.requests.append(request)
            try:
                yield Result(request.id, self._reply(request))
            except ValueError as error:
                yield Result(request.id, "", str(error))

    def __call__(self, options: object) -> FakeBackend:
        return self


def fingerprint_of(request: Request) -> str:
    told = (request.image and request.image.name, request.text, request.system, request.seed, request.do_sample)
    return hashlib.sha256(repr(told).encode("utf-8", "replace")).hexdigest()[:12]


def fake_answer(request: Request) -> str:
    return f"喝茶 “{fingerprint_of(request)}”\n再来"


def fake_review(request: Request) -> str:
    """A review; about a third cannot be read."""
    digest = fingerprint_of(request)
    return f"Fine, {digest}. " + ("no scores" if int(digest, 16) % 3 == 0 else "[Scores]: (8, 9)")


def sample(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "system": SYSTEM,
        "image": "西游记/01.png",
        "conversations": [
            {"from": "user", "value": f"Please step into the shoes of 孙悟空. {name}"},
            {"from": "assistant", "value": "俺老孙来也！"},
        ],
        "role": "孙悟空",
        "script": "西游记",
        "other_role": "a curious human",
        **changes,
    }


def write_rows(path: Path, rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=4), encoding="utf-8")
    return path


def make_world(root: Path, *, rows: int = 3) -> Path:
    """A data root with both test sets and one image, and a checkpoint folder `model` that looks complete."""
    (root / "images" / "西游记").mkdir(parents=True)
    Image.new("RGB", (8, 8), "orange").save(root / "images" / "西游记" / "01.png")
    for folder in ("in-distribution", "out-of-distribution"):
        for name in TEST_FILES:
            samples = [sample(f"{folder}_{name[:-10]}_{number}") for number in range(rows)]
            write_rows(root / "data" / "test" / folder / name, samples)
    make_model(root / "model")
    return root


def make_model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "qwen.tiktoken").write_text("IQ== 0\n")
    (folder / "model.safetensors").write_bytes(save({"weights": np.frombuffer(weights, np.uint8)}))
    return folder


def flags(root: Path, *more: object) -> list[str]:
    """Flags of both scripts for such a world; results go below `root/eval`."""
    told = ["--data_root", root, "--eval_dir", root / "eval", "--model_path", root / "model", *more]
    return [str(word) for word in told]


def results(folder: Path) -> dict[str, bytes]:
    """The bytes of every result file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.json"))}


def kill_at(count: int) -> None:
    """Lets this process die at its `count`-th write or renaming, a write being half done."""
    left = [count]
    write, replace = os.write, Path.replace

    def die_in_time() -> bool:
        left[0] -= 1
        return left[0] == 0

    def dying_write(descriptor: int, data: Any) -> int:
        if die_in_time():
            write(descriptor, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    def dying_replace(path: Path, target: Path) -> Path:
        if die_in_time():
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    os.write, Path.replace = dying_write, dying_replace


def _main() -> int:
    script, arguments = sys.argv[1], sys.argv[2:]
    if os.environ.get("KILL_AT"):
        kill_at(int(os.environ["KILL_AT"]))
    if script == "inference":
        import inference

        return inference.main(arguments, FakeBackend())
    from eval import RM_review

    return RM_review.main(arguments, FakeBackend(fake_review))


if __name__ == "__main__":
    sys.exit(run_script(_main))
