"""A run that was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qwen_vl
from data_utils.errors import MMRoleError
from finetune.finetune import main
from finetune.trainer import SupervisedTrainer
from tests.conftest import ROOT
from tests.finetune.conftest import SECONDS, Data, losses, report, run
from tests.processes import run_group

Flags = Callable[..., list[str]]
FOUR = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def forget_after(out: Path, step: int) -> None:
    """Leaves the output folder as if the run had been stopped after a step."""
    for path in list(out.iterdir()):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_and_two_steps_are_four(flags: Flags, tmp_path: Path, lora: bool) -> None:
    out = tmp_path / "out"
    main(flags(**FOUR, use_lora=lora))
    four, name = losses(out), "adapter_model.safetensors" if lora else "model.safetensors"
    weights = load_file(out / name)
    assert {path.name for path in out.iterdir()} >= {"checkpoint-2", "checkpoint-4", "loss.png", "training.json"}
    forget_after(out, 2)
    main(flags(**FOUR, use_lora=lora, resume_from_checkpoint="auto"))
    assert losses(out) == pytest.approx(four, rel=1e-6)
    assert all(torch.allclose(weights[key], value, atol=1e-6) for key, value in load_file(out / name).items())
    assert report(out)["throughput"]["steps"] == 2


def test_auto_begins_at_the_beginning_where_there_is_nothing(flags: Flags, tmp_path: Path) -> None:
    main(flags(resume_from_checkpoint="auto", max_steps=1))
    assert len(losses(tmp_path / "out")) == 1


def test_a_path_and_the_released_bool(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(flags(**FOUR))
    four = losses(out)
    main(flags(**FOUR, resume_from_checkpoint=out / "checkpoint-2"))
    assert losses(out) == pytest.approx(four, rel=1e-6)
    main(flags(**{**FOUR, "max_steps": 5}, resume_from_checkpoint=True, lr_scheduler_type="constant"))
    assert len(losses(out)) == 5
    with pytest.raises(MMRoleError, match="no checkpoint to go on with") as caught:
        main(flags(**FOUR, resume_from_checkpoint=out / "checkpoint-3"))
    assert "checkpoint-4" in str(caught.value)


def test_a_checkpoint_loads_as_it_is_and_old_ones_go(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(flags(max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    qwen_vl.load(out / "checkpoint-2", device="cpu")
    assert report(out / "checkpoint-2")["state"] == "running"
    assert (out / "checkpoint-2" / "loss.png").is_file()
    main(flags(max_steps=1, overwrite_output_dir=True))
    assert list(out.glob("checkpoint-*")) == []


def test_other_settings_are_told_before_anything_is_loaded(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    main(flags(**FOUR))
    file = out / "checkpoint-4" / "training.json"
    there = json.loads(file.read_text())
    there["identity"]["processes"] = 8
    file.write_text(json.dumps(there))
    monkeypatch.setattr("finetune.model.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(MMRoleError, match="other settings") as caught:
        main(flags(**FOUR, resume_from_checkpoint="auto", gradient_accumulation_steps=4))
    told = str(caught.value)
    for part in ("processes: 8 there, 1 now", "samples a step: 4 there, 8 now", f"--model_name_or_path {out}"):
        assert part in told


def test_other_data_or_another_base_is_told(flags: Flags, base: Path, data: Data, tmp_path: Path) -> None:
    main(flags(**FOUR))
    there = tmp_path / "out" / "checkpoint-4"
    shutil.copytree(base, tmp_path / "moved")
    changed = tmp_path / "changed"
    shutil.copytree(there, changed)
    file = data.with_rows(data.rows[:-1], "fewer.json")
    more = {**FOUR, "resume_from_checkpoint": "auto"}
    with pytest.raises(MMRoleError) as caught:
        main(flags(**more, data_path=file, model_name_or_path=changed))
    assert "began with other data" in str(caught.value)
    assert "began with other base" in str(caught.value)
    main(flags(**{**more, "max_steps": 5}, model_name_or_path=tmp_path / "moved"))


CHANGES = {"model_max_length": 300, "use_sample_system": True, "fix_vit": False}
LORA_CHANGES = {"lora_alpha": 32, "lora_dropout": 0.0, "lora_bias": "all", "lora_r": 8}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_is_learned_may_not_change(flags: Flags, tmp_path: Path, lora: bool) -> None:
    main(flags(max_steps=1, save_strategy="steps", use_lora=lora))
    for name, value in (LORA_CHANGES if lora else CHANGES).items():
        with pytest.raises(MMRoleError, match="other settings") as caught:
            main(flags(max_steps=2, use_lora=lora, resume_from_checkpoint="auto", **{name: value}))
        assert len(caught.value.problems[0].value) == 1
        assert ("merge_lora.py" in str(caught.value)) == lora


def test_another_schedule_is_told(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = {"max_steps": 1, "save_strategy": "steps", "lr_scheduler_type": "constant"}
    main(flags(**first))
    main(flags(**{**first, "max_steps": 2}, learning_rate=1e-5, resume_from_checkpoint="auto"))
    told = capsys.readouterr().err
    assert "learning_rate 0.001 there, 1e-05 now; max_steps 1 there, 2 now" in told
    assert report(tmp_path / "out")["log"][-1]["learning_rate"] == 1e-3  # as the line says
    main(flags(**first, resume_from_checkpoint=tmp_path / "out" / "checkpoint-1"))
    assert "schedule" not in capsys.readouterr().err


def test_a_finished_run_is_left_alone(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    main(flags(**FOUR))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("finetune.model.load_model", lambda *_: pytest.fail("the model was loaded"))
        main(flags(**FOUR, resume_from_checkpoint="auto"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    forget_after(out, 4)
    main(flags(**FOUR, resume_from_checkpoint="auto"))  # killed between the last checkpoint and the finished model
    for name in ("training.json", "trainer_state.json"):
        there, now = (json.loads(text) for text in (before[out / name], (out / name).read_text()))
        assert len(now["log" if name == "training.json" else "log_history"]) >= 4
        assert (now.get("global_step"), now.get("log")) == (there.get("global_step"), there.get("log"))
    assert report(out)["throughput"]["steps"] == 4
    assert (out / "model.safetensors").read_bytes() == before[out / "model.safetensors"]


def test_deleting_and_going_on_are_two_things(flags: Flags) -> None:
    with pytest.raises(MMRoleError, match="cannot be gone on with and deleted"):
        main(flags(overwrite_output_dir=True, resume_from_checkpoint="auto"))


def test_a_save_that_is_not_whole_ends_the_run_and_gets_no_name(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = SupervisedTrainer._save

    def lose_a_tensor(self: SupervisedTrainer, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.state.global_step == 4:
            state_dict = dict(self.model.state_dict())
            del state_dict["transformer.ln_f.weight"]
        save(self, output_dir, state_dict)

    monkeypatch.setattr(SupervisedTrainer, "_save", lose_a_tensor)
    with pytest.raises(MMRoleError, match="missing from the save") as caught:
        main(flags(**FOUR))
    assert "transformer.ln_f.weight" in str(caught.value)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


KILLED_IN_A_SAVE = """
import os, signal, sys
from finetune import finetune, trainer

def check_saved(folder, expected):
    if folder.name == "checkpoint-3":
        os.kill(os.getpid(), signal.SIGKILL)

trainer.check_saved = check_saved
finetune.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "zero3"], ids=["plain", "zero3"])
def test_killed_in_a_save_it_resumes_from_the_last_whole_checkpoint(
    flags: Flags, tmp_path: Path, config: str | None
) -> None:
    out = tmp_path / "out"
    more = {"deepspeed": ROOT / "finetune" / f"ds_config_{config}.json"} if config else {}
    words = flags(max_steps=4, save_strategy="steps", save_steps=1, **more)
    assert run(words).returncode == 0
    four = losses(out)
    shutil.rmtree(out)
    killed = run_group([sys.executable, "-c", KILLED_IN_A_SAVE, *words], SECONDS, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert (out / ".saving" / "checkpoint-3").exists()
    done = run([*words, "--resume_from_checkpoint", "auto"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-2" in done.stdout
    assert losses(out) == pytest.approx(four, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_sharded_runs_resume_too_but_not_with_fewer_processes(flags: Flags, tmp_path: Path, config: str) -> None:
    out = tmp_path / "out"
    more = {**FOUR, "deepspeed": ROOT / "finetune" / f"ds_config_{config}.json", "gradient_accumulation_steps": 1}
    done = run(flags(**more), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    four = losses(out)
    forget_after(out, 2)
    fewer = run(flags(**{**more, "gradient_accumulation_steps": 2}, resume_from_checkpoint="auto"))
    assert fewer.returncode == 2
    assert "processes: 2 there, 1 now" in fewer.stderr
    done = run(flags(**more, resume_from_checkpoint="auto"), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(out) == pytest.approx(four, rel=1e-6)
    weights = (out / "model.safetensors").read_bytes()
    forget_after(out, 4)  # killed between the last checkpoint and the finished model
    done = run(flags(**more, resume_from_checkpoint="auto"), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(out) == pytest.approx(four, rel=1e-6)
    assert (out / "model.safetensors").read_bytes() == weights
    next(out.glob("checkpoint-4/global_step4/*zero_pp_rank_1_*optim_states.pt")).unlink()
    done = run(flags(**more, resume_from_checkpoint=out / "checkpoint-4"), processes=2, seconds=200)  # its optimizer
    assert done.returncode != 0
    assert done.stderr.count("this checkpoint is not whole") == 1
