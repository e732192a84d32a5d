"""The four scripts, as a person starts them."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import qwen_vl
from tests.conftest import ROOT
from tests.finetune.conftest import SECONDS, Data, losses, report
from tests.processes import reserved_port, run_group

SCRIPTS = {"finetune_lora_ds": ("agent", 3.0, 3072), "finetune_RM_lora_ds": ("reward_model", 10.0, 4096)}


def run(name: str, base: Path, data: Data, out: Path, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "MODEL_PATH": str(base), "DATA_ROOT": str(data.root), "DATA_PATH": str(data.file)}
    environ |= {"OUTPUT_DIR": str(out), "GLOBAL_BATCH": "8", "MICRO_BATCH": "1", **settings}
    command = ["bash", ROOT / "finetune" / f"{name}.sh", "--disable_tqdm", "True", *flags]
    return run_group(command, SECONDS, env=environ, stderr=subprocess.STDOUT, cwd="/")


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_lora_scripts_take_the_recipe(name: str, base: Path, data: Data, tmp_path: Path) -> None:
    """test_recipe.py has the others."""
    recipe, epochs, length = SCRIPTS[name]
    output = output_of(run(name, base, data, tmp_path / "out", "--max_steps", "2"))
    assert "8 samples a step: micro-batch 1 x accumulation 8 x 1 process(es)" in output
    result = report(tmp_path / "out")
    assert result["recipe"] == {"name": recipe, "changed": {"global_batch_size": 8}}
    wanted = {"learning_rate": 1e-5, "num_train_epochs": epochs, "model_max_length": length, "use_lora": True}
    assert {key: result["options"][key] for key in wanted} == wanted
    assert result["identity"]["ZeRO stage"] == 2
    qwen_vl.load(tmp_path / "out", device="cpu")


@pytest.mark.slow
def test_two_launches_are_two_nodes(base: Path, data: Data, tmp_path: Path) -> None:
    flags = ["--max_steps", "2", "--bf16", "False", "--sequential"]
    output_of(run("finetune_ds", base, data, tmp_path / "one", *flags))
    settings = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}

    def node(rank: str) -> subprocess.CompletedProcess[str]:
        return run("finetune_ds", base, data, tmp_path / "two", *flags, NODE_RANK=rank, MASTER_PORT=port, **settings)

    with reserved_port() as port, ThreadPoolExecutor() as pool:
        outputs = [output_of(done) for done in pool.map(node, "01")]
    assert "micro-batch 1 x accumulation 4 x 2 process(es)" in outputs[0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_one_process_waits_for_no_other_and_says_what_cannot_divide(base: Path, data: Data, tmp_path: Path) -> None:
    platform = {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "MASTER_ADDR": "elsewhere",
        "MASTER_PORT": "1",
    }  # set for a launch of its own
    done = run("finetune_ds", base, data, tmp_path / "out", GLOBAL_BATCH="24", MICRO_BATCH="16", **platform)
    assert done.returncode == 2
    assert "micro-batch 1, 2, 3, 4, 6, 8, 12, 24 with these 1 process(es)" in done.stdout
