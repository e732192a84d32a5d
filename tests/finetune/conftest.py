"""A base, data and command lines small enough that a whole training run takes a second or two."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen_vl import QwenVLTokenizer
from tests.conftest import ROOT
from tests.processes import run_group
from tests.qwen_vl.conftest import RANKS, one_thread, small_model  # noqa: F401 - the fixture, for these tests too

SCRIPT = ROOT / "finetune" / "finetune.py"
SECONDS = 560  # less than the time limit of a test, so that a run that hangs is ended and shown


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model's folder, laid out as a released one, with a code file that nothing runs."""
    folder = tmp_path_factory.mktemp("base") / "Small-Chat"
    folder.mkdir()
    lines = [base64.b64encode(bytes([i])) + b" " + str(i).encode() for i in range(RANKS)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    QwenVLTokenizer.from_pretrained(folder).save_pretrained(folder)
    model = small_model()
    model.generation_config.update(do_sample=True, top_p=0.3, chat_format="chatml")
    model.save_pretrained(folder)
    (folder / "modeling_qwen.py").write_text("raise RuntimeError('code of a checkpoint was run')\n")
    return folder


@dataclass(frozen=True)
class Data:
    """A data root and its training file."""

    root: Path
    file: Path
    rows: list[dict[str, Any]]

    def with_rows(self, rows: list[dict[str, Any]], name: str = "other.json") -> Path:
        """Another training file of the same root."""
        file = self.root / name
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return file


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Sixteen samples, three quarters with an image, of different lengths."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    for number, gradient in enumerate((Image.radial_gradient("L"), Image.linear_gradient("L"))):
        gradient.convert("RGB").save(root / "images" / f"{number}.png")
    rows = []
    for number in range(16):
        picture = f"Picture 1: <img>images/{number % 2}.png</img>\n" if number % 4 != 3 else ""
        question = f"{picture}What do you see? {'Look well. ' * (number % 3)}"
        answer = f"I, number {number}, see 一幅画{'!' * (number % 5)}"
        turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
        rows.append({"id": f"sample_{number}", "image": None, "conversations": turns})
    file = root / "train.json"
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return Data(root, file, rows)


@pytest.fixture
def flags(base: Path, data: Data, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a short run: two steps of four samples into tmp_path/out; what is given overrides."""

    def make(**changes: object) -> list[str]:
        given = {
            "model_name_or_path": base,
            "data_path": data.file,
            "data_root": data.root,
            "output_dir": tmp_path / "out",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "dataloader_num_workers": 0,
            "disable_tqdm": True,
            **changes,
        }
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]

    return make


def command(words: list[str], *, processes: int = 1) -> list[str]:
    """How the trainer is started as processes of their own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]  # as finetune/launch.sh
    launcher += ["--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), *words]


def run(words: list[str], *, processes: int = 1, seconds: int = SECONDS, **more: Any) -> subprocess.CompletedProcess:
    """Runs the real command line; a run that hangs fails."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("environ", {})}
    return run_group(command(words, processes=processes), seconds, env=environ, **more)


def report(folder: Path) -> dict[str, Any]:
    """What `training.json` says."""
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def losses(folder: Path) -> list[float]:
    """The logged losses of a run."""
    return [entry["loss"] for entry in report(folder)["log"]]
