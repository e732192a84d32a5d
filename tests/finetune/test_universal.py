"""Resuming with another number of processes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_utils.errors import MMRoleError
from finetune import universal
from finetune.checkpoints import processes_of
from finetune.finetune import main
from tests.conftest import ROOT
from tests.finetune.conftest import SECONDS, losses, report
from tests.processes import run_group

Flags = Callable[..., list[str]]
SAME = {"rel": 1e-5}
EACH_IN_TURN = """
import json, sys
from finetune.distributed import leave_group
from finetune.finetune import main
for words in json.loads(sys.argv[1]):
    main(words)
leave_group()
"""


def forget_after(out: Path, step: int) -> None:
    """Leaves the output folder as if the run had been stopped after a step."""
    for path in list(out.iterdir()):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def train(runs: list[list[str]], processes: int, tmp_path: Path) -> str:
    """Trains each in turn, in processes that start once; returns what they printed."""
    program = tmp_path / "each.py"
    program.write_text(EACH_IN_TURN)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
    launcher = [*launcher, "--nproc_per_node", str(processes)] if processes > 1 else []
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = run_group([sys.executable, *launcher, program, json.dumps(runs)], 2 * SECONDS, env=environ)
    assert done.returncode == 0, done.stderr[-30000:]
    return done.stdout


@pytest.mark.slow
def test_sharded_runs_go_on_with_fewer_and_more_processes(flags: Flags, tmp_path: Path) -> None:
    """ZeRO-2, ZeRO-3 and adapters; of two groups of weights one decays fast, so that a mixed-up state shows."""
    kinds = {"zero2": ("zero2", False), "zero3": ("zero3", False), "lora": ("zero2", True)}

    def words(name: str, processes: int, *, again: bool = False, **more: object) -> list[str]:
        zero, lora = kinds[name]
        given = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "weight_decay": 5, "fill_to": 16}
        given |= {
            "deepspeed": ROOT / "finetune" / f"ds_config_{zero}.json",
            "output_dir": tmp_path / (f"{name} again" if again else name),
        }
        given |= {"gradient_accumulation_steps": 2 // processes}
        given |= {"use_lora": True, "lora_dropout": 0.0} if lora else {}
        return flags(**given, **more)

    train([words(name, 2) for name in kinds], 2, tmp_path)
    undisturbed = {name: losses(tmp_path / name) for name in kinds}
    for name in ("zero2", "zero3"):
        shutil.copytree(tmp_path / name / "checkpoint-4", tmp_path / f"{name} again" / "checkpoint-4")
    for step, processes, names in ((2, 1, ("zero2", "zero3", "lora")), (4, 2, ("zero2", "zero3"))):
        for name in names:
            forget_after(tmp_path / name, step)
            checkpoint = tmp_path / name / f"checkpoint-{step}"
            # What a conversion leaves that is killed on its way, and one whose training is killed before it loads.
            for left in (f"global_step{step}.abc", f"global_step{step}.universal"):
                (checkpoint / left / "zero").mkdir(parents=True)
            (checkpoint / "latest_universal").write_text(f"global_step{step}.universal")
        runs = [words(name, processes, resume_from_checkpoint="auto") for name in names]
        if processes == 2:  # as many as wrote it
            runs += [words(name, 2, again=True, resume_from_checkpoint="auto") for name in names]
        printed = train(runs, processes, tmp_path)
        assert printed.count(f"from {3 - processes} to {processes} process(es)") == len(names)
        for name in names:
            out = tmp_path / name
            assert losses(out) == pytest.approx(undisturbed[name], **SAME), name
            assert report(out)["throughput"]["steps"] == 6 - step
            assert [processes_of(out / f"checkpoint-{at}", 0) for at in (step, 6)] == [3 - processes, processes]
            assert not list(out.glob("checkpoint-*/*universal*"))
            assert not list(out.glob("checkpoint-*/global_step*.*"))
    for name in ("zero2", "zero3"):
        assert losses(tmp_path / f"{name} again") == pytest.approx(undisturbed[name], **SAME), name


def written_by(checkpoint: Path, processes: int) -> None:
    """Makes a checkpoint look like one of so many processes."""
    there = report(checkpoint)
    there["identity"]["processes"] = processes
    (checkpoint / "training.json").write_text(json.dumps(there))


def test_without_shards_only_the_samples_a_step_must_be_the_same(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    main(flags(**more, fill_to=8))
    four, checkpoint = losses(out), out / "checkpoint-2"
    forget_after(out, 2)
    written_by(checkpoint, 4)
    (checkpoint / "rng_state.pth").unlink()  # four processes have others
    with pytest.raises(MMRoleError, match="other settings") as caught:
        main(flags(**more, resume_from_checkpoint="auto", per_device_train_batch_size=3))
    result = str(caught.value)
    for part in ("samples a step: 4 there, 6 now", "--global_batch_size 4", "--fill_to 8", "--loss_group 2"):
        assert part in result
    assert "that divides with micro-batch 1, 2, 4 with these 1 process(es)" in result
    main(
        flags(
            **more,
            resume_from_checkpoint="auto",
            per_device_train_batch_size=1,
            global_batch_size=4,
            fill_to=8,
            loss_group=2,
        )
    )
    assert losses(out) == pytest.approx(four, **SAME)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The files of a checkpoint that a conversion reads, of two processes."""
    shards = tmp_path / "checkpoint-4" / "global_step4"
    shards.mkdir(parents=True)
    (shards.parent / "latest").write_text("global_step4")
    (shards.parent / "training.json").write_text('{"identity": {"processes": 2, "ZeRO stage": 2}}')
    for rank in range(2):
        torch.save(torch.zeros(2000), shards / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save(torch.zeros(1000), shards / "mp_rank_00_model_states.pt")
    return shards.parent


def training(**more: object) -> SimpleNamespace:
    given = {"zero_stage": 2, "world_size": 1, "process_index": 0, "optim": "adamw_torch_fused"}
    return SimpleNamespace(**(given | more), hf_deepspeed_config=SimpleNamespace(config={}))


def test_the_disk_and_the_optimizer_are_checked(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert universal.is_needed(sharded, training())
    assert not universal.is_needed(sharded, training(world_size=2))
    assert not universal.is_needed(sharded, training(zero_stage=0))
    assert universal.problems(sharded, training()) == []
    state = sum(file.stat().st_size for file in sharded.glob("global_step4/*optim*"))
    monkeypatch.setattr(universal.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * state))
    optimizer, disk = universal.problems(sharded, training(optim="adafactor"))
    assert optimizer.value == "adafactor"
    assert "no room to convert the checkpoint from 2 to 1 process(es)" in disk.what
    assert disk.where == sharded
    assert "resume with 2 process(es)" in disk.fix


def test_a_conversion_that_fails_leaves_nothing(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(sharded.rglob("*"))
    monkeypatch.setattr(universal, "CONVERTER", "no_such_converter")
    flags = training()
    with pytest.raises(MMRoleError, match="converter of checkpoints ended with status 1") as caught:
        universal.convert(sharded, flags)
    assert "no_such_converter" in str(caught.value)
    assert sorted(sharded.rglob("*")) == before
    assert flags.hf_deepspeed_config.config == {}
