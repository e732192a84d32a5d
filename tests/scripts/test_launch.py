"""finetune/launch.sh: one process, or several under torchrun; and the scripts that answer and judge."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import run_group

PRINT = "import os; print({key: os.environ.get(key) for key in ('WORLD_SIZE', 'OMP_NUM_THREADS')})"


def run(*lines: str, **settings: str) -> subprocess.CompletedProcess[str]:
    script = "\n".join(["set -euo pipefail", f"source {ROOT}/finetune/launch.sh", *lines])
    environ = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PROCESSES")}
    environ |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **settings}
    return run_group(["bash", "-c", script], 120, env=environ)


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(PRINT + "; raise SystemExit(3)")
    done = run(f'spread "{tmp_path}/x.py"', CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3
    assert done.stdout.strip() == "{'WORLD_SIZE': None, 'OMP_NUM_THREADS': None}"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "0,2,3"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": "0, 1"}, "2"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a,MIG-2b"}, "2"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "PROCESSES": "5"}, "5"),
    ],
)
def test_one_process_per_gpu(settings: dict[str, str], expected: str) -> None:
    assert run('echo "$PROCESSES"', **settings).stdout.strip() == expected


def test_several_nodes_must_be_named() -> None:
    done = run("spread x.py", NNODES="2")
    assert done.returncode != 0
    assert "NODE_RANK: the number of this node, from 0" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("PROCESSES", "abc"), ("PROCESSES", "0"), ("NNODES", "x"), ("NNODES", "-1")]
)
def test_numbers_that_are_none(name: str, value: str) -> None:
    done = run("spread x.py", **{name: value})
    assert done.returncode == 2
    assert f"value:   {value}\nwhere:   {name}\n" in done.stderr


@pytest.mark.parametrize(("folder", "expected"), [("a b", ["a b"]), ("other", ["a", "b"])])
def test_an_agents_name_may_hold_a_blank(tmp_path: Path, folder: str, expected: list[str]) -> None:
    (tmp_path / "out-test_answers" / folder).mkdir(parents=True)
    show = tmp_path / "python"
    show.write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\n')
    show.chmod(0o755)
    script = (ROOT / "eval" / "RM_review.sh").read_text().splitlines()
    lines = [f'PYTHON="{show}"', *script[script.index("set -euo pipefail") + 2 :]]
    done = run(*lines, AGENT="a b", EVAL_DIR=str(tmp_path), PROCESSES="1")
    words = [line.strip("<>") for line in done.stdout.splitlines()]
    assert words[words.index("--agent") + 1 :] == expected, done.stderr
