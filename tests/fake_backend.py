"""A stand-in for the model, and a small world to run it on.

`python -m tests.fake_backend FLAGS...` runs inference.py with it.
"""

from __future__ import annotations

import argparse
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

from data_utils.console import ignore_lost_output
from data_utils.errors import MMRoleError, run_main
from eval.backends import native
from eval.backends.backend import Completion, Prompt

SYSTEM = "You are a dedicated role-playing assistant."
TEST_FILES = ("comment_test.json", "human-role_test.json", "inter-role_test.json")


class FakeBackend(native.Backend):
    """The native backend without its engine: says something that depends on all of a prompt, or what `reply` says.

    It is its own factory, and travels to workers if `reply` does.
    """

    def __init__(self, reply: Callable[[Prompt], str] | None = None) -> None:
        self.prompts: list[Prompt] = []
        self._reply = reply or fake_answer

    def __call__(self, options: argparse.Namespace) -> FakeBackend:
        super().__init__(options)
        return self

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Completion]:
        for prompt in prompts:
            self.prompts.append(prompt)
            try:
                yield Completion(prompt.id, self._reply(prompt))
            except ValueError as error:
                yield Completion(prompt.id, "", str(error))

    def summary(self) -> str:
        return f"fake on {self._options.device}"


class Unloadable(FakeBackend):
    def run(self, prompts):
        raise MMRoleError("the checkpoint cannot be loaded", "cuda", "model", "check it")


def fingerprint_of(prompt: Prompt) -> str:
    image, decoding = prompt.image and prompt.image.name, prompt.decoding
    content = (image, prompt.text, prompt.system, prompt.seed, decoding.do_sample)
    return hashlib.sha256(repr(content).encode("utf-8", "replace")).hexdigest()[:12]


def fake_answer(prompt: Prompt) -> str:
    return f"喝茶 “{fingerprint_of(prompt)}”\n再来"


def fake_review(prompt: Prompt) -> str:
    """A review; about a third cannot be read."""
    digest = fingerprint_of(prompt)
    return f"Fine, {digest}. " + ("no scores" if int(digest, 16) % 3 == 0 else "[Scores]: (8, 9)")


def dies_at_one_row_once(prompt):
    marker = prompt.image.with_name("died")
    if "in-distribution_comment_1" in prompt.text and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return fake_answer(prompt)


def dies_at_one_row(prompt):
    if "in-distribution_comment_1" in prompt.text:
        os.kill(os.getpid(), signal.SIGKILL)
    return fake_answer(prompt)


def dies(prompt):
    os.kill(os.getpid(), signal.SIGKILL)


def waits_for_ever(prompt):
    """Tells its process id through the pipe beside the image, whose end stays open as long as the process lives."""
    with prompt.image.with_name("pids").open("w") as pids:
        print(os.getpid(), file=pids, flush=True)
        signal.pause()


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
    result = ["--data_root", root, "--eval_dir", root / "eval", "--model_path", root / "model", *more]
    return [str(word) for word in result]


def results(folder: Path) -> dict[str, bytes]:
    """The bytes of every result file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.json"))}


if __name__ == "__main__":
    import inference

    ignore_lost_output()
    sys.exit(run_main(lambda: inference.main(sys.argv[1:], FakeBackend())))
