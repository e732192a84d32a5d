"""scripts/launch.sh: one process or several under torchrun, the exit status, the cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.eval.test_jobs_engine import make_real_world
from tests.fake_backend import results

PRINT = "import os; print({key: os.environ.get(key) for key in ('WORLD_SIZE', 'OMP_NUM_THREADS')})"


def run(*lines: str, **settings: str) -> subprocess.CompletedProcess[str]:
    script = "\n".join(["set -euo pipefail", f"source {ROOT}/scripts/launch.sh", *lines])
    environ = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PROCESSES")}
    environ |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **settings}
    return subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=120)


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(PRINT + "; raise SystemExit(3)")
    done = run(f'launch "{tmp_path}/x.py"', CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3
    assert done.stdout.strip() == "{'WORLD_SIZE': None, 'OMP_NUM_THREADS': None}"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "0,2,3"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a,MIG-2b"}, "2"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "PROCESSES": "5"}, "5"),
    ],
)
def test_one_process_per_gpu(settings: dict[str, str], told: str) -> None:
    assert run('echo "$PROCESSES"', **settings).stdout.strip() == told


def test_several_nodes_must_be_named() -> None:
    done = run("launch x.py", NNODES="2")
    assert done.returncode != 0
    assert "NODE_RANK: the number of this node, from 0" in done.stderr


def start(world: Path, script: str, **settings: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "MODEL_PATH": str(world / "model"), "DATA_ROOT": str(world), **settings}
    environ |= {"EVAL_DIR": str(world / "eval"), "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / script), "--max_new_tokens", "6", "--limit", "1"]
    more = ["--retries", "0"] if "review" in script else []
    return subprocess.Popen(
        command + more, cwd="/", env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_files_from_any_number_of_processes(tmp_path: Path, tokenizer) -> None:
    """Both scripts with the real engine under torchrun: 1 process, 3, and two nodes of one each."""
    made = {}
    for name, settings in (("one", [{"PROCESSES": "1"}]), ("three", [{"PROCESSES": "3"}]), ("nodes", nodes())):
        world = make_real_world(tmp_path / name, tokenizer)
        for script, status in (("inference.sh", 0), ("eval/RM_review.sh", 1)):
            runs = [start(world, script, **more) for more in settings]
            told = [one.communicate(timeout=200) for one in runs]
            assert [one.returncode for one in runs] == [status] * len(runs), told
            assert sum(out.count("model fingerprint") for out, _ in told) == 1
            assert not any("ChildFailedError" in error for _, error in told)
        made[name] = results(world / "eval")
    assert len(made["one"]) == 12
    assert made["one"] == made["three"] == made["nodes"]


def nodes() -> list[dict[str, str]]:
    alike = {
        "PROCESSES": "1",
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 9999),
    }
    return [{**alike, "NODE_RANK": str(rank)} for rank in range(2)]
