"""Checkpoints: whole or not there, verified, resumed from."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import qwen_vl
from data_utils.errors import MMRoleError
from finetune.arguments import parse_arguments
from finetune.checkpoints import (
    STAGING,
    check_saved,
    checkpoint_to_resume,
    checkpoints,
    expected_tensors,
    prune,
    publish_files,
    publish_folder,
    save_model,
    verify,
    writing,
)
from finetune.finetune import main
from finetune.trainer import SupervisedTrainer
from tests.conftest import ROOT
from tests.finetune.conftest import SECONDS, Data, losses, report, run
from tests.processes import run_group


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> tuple[Path, dict]:
    """A save of the small model, and what must be in it."""
    model, tokenizer = qwen_vl.load(base, dtype=torch.float32, device="cpu")
    folder = tmp_path / "saved"
    save_model(model, tokenizer, folder)
    return folder, expected_tensors(model)


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_good_save_passes_and_loads(saved: tuple[Path, dict], base: Path) -> None:
    folder, expected = saved
    check_saved(folder, expected)
    assert (folder / "modeling_qwen.py").is_file()
    assert (folder / "generation_config.json").read_text() == (base / "generation_config.json").read_text()
    # Not private, as safetensors makes it: as readable as files are here.
    assert (folder / "model.safetensors").stat().st_mode == (folder / "qwen.tiktoken").stat().st_mode
    model, _ = qwen_vl.load(folder, device="cpu")
    there, _ = qwen_vl.load(base, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), there.parameters(), strict=True))
    assert model.config.use_cache is True


def test_every_way_to_be_wrong_is_found_at_once(saved: tuple[Path, dict]) -> None:
    folder, expected = saved

    def spoil(weights: dict) -> None:
        del weights["transformer.ln_f.weight"]
        weights["lm_head.weight"] = torch.zeros(0)  # what sharded training leaves behind
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()
        weights["more"] = torch.zeros(1)

    rewrite(folder, spoil)
    with pytest.raises(MMRoleError) as caught:
        check_saved(folder, expected)
    result = str(caught.value)
    for part in ("transformer.ln_f.weight", "lm_head.weight: F32 [0] instead of F32 [512, 128]", "BF16", "more"):
        assert part in result


def test_a_file_cut_short_is_found(saved: tuple[Path, dict]) -> None:
    folder, expected = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MMRoleError, match="cannot be read again"):
        check_saved(folder, expected)
    file.unlink()
    with pytest.raises(MMRoleError, match="missing"):
        check_saved(folder, expected)


def test_weights_can_be_cast_on_the_way(base: Path, tmp_path: Path) -> None:
    model, tokenizer = qwen_vl.load(base, dtype=torch.float32, device="cpu")
    save_model(model, tokenizer, tmp_path / "half", dtype=torch.bfloat16)
    check_saved(tmp_path / "half", expected_tensors(model, torch.bfloat16))
    assert next(model.parameters()).dtype == torch.float32
    assert next(qwen_vl.load(tmp_path / "half", device="cpu")[0].parameters()).dtype == torch.bfloat16


def test_publishing_into_a_folder_takes_the_old_weights_away(tmp_path: Path) -> None:
    staged, target = tmp_path / "staged", tmp_path / "target"
    staged.mkdir()
    target.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "notes.txt"):
        (target / name).write_text("old")
    for name in ("model.safetensors", "config.json"):
        (staged / name).write_text("new")
    publish_files(staged, target)
    assert {file.name: file.read_text() for file in target.iterdir()} == {
        "model.safetensors": "new",
        "config.json": "new",
        "notes.txt": "old",
    }
    assert not staged.exists()


def test_a_folder_is_not_loadable_while_it_is_being_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged, target = tmp_path / "staged", tmp_path / "target"
    staged.mkdir()
    target.mkdir()
    (target / "config.json").write_text("old")
    for name in ("model.safetensors", "config.json"):
        (staged / name).write_text("new")
    replace = Path.replace

    def killed(self: Path, to: Path) -> Path:
        replace(self, to)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        publish_files(staged, target)
    assert [file.name for file in target.iterdir()] == ["model.safetensors"]


def test_a_folder_replaces_one_of_its_name(tmp_path: Path) -> None:
    staged, target = tmp_path / STAGING / "checkpoint-2", tmp_path / "checkpoint-2"
    for folder, text in ((staged, "new"), (target, "old")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
    publish_folder(staged, target)
    assert (target / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [STAGING, "checkpoint-2"]


def test_only_errors_of_writing_are_reported_as_such(tmp_path: Path) -> None:
    for error in (OSError(28, "No space left on device"), SafetensorError("x"), RuntimeError("PytorchStreamWriter x")):
        (tmp_path / STAGING).mkdir()
        with pytest.raises(MMRoleError, match="cannot be written"), writing(tmp_path / STAGING):
            raise error
        assert not (tmp_path / STAGING).exists()
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path / STAGING):
        raise RuntimeError("shapes do not fit")


def test_checkpoints_by_step(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-100", "checkpoint-x", ".saving"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert checkpoints(tmp_path / "nowhere") == []
    prune(tmp_path, None, tmp_path / "checkpoint-100", resume_state_of_newest_only=False)
    prune(tmp_path, 2, tmp_path / "checkpoint-100", resume_state_of_newest_only=False)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    # Resumed from an earlier one: the newest stays.
    prune(tmp_path, 1, tmp_path / "checkpoint-10", resume_state_of_newest_only=False)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10"]


Flags = Callable[..., list[str]]
LOST = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors", "config.json"]
CUT = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors", "training.json"]


@pytest.fixture(scope="module")
def finished(base: Path, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run with checkpoints after two and four steps."""
    out = tmp_path_factory.mktemp("finished") / "out"
    words = ["--model_name_or_path", base, "--data_path", data.file, "--data_root", data.root, "--output_dir", out]
    words += ["--max_steps", 4, "--save_steps", 2, "--dataloader_num_workers", 0, "--disable_tqdm", True]
    main([str(word) for word in words])
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "out")


def test_a_whole_one(out: Path) -> None:
    assert verify(out / "checkpoint-4", 1) == []
    assert verify(out / "checkpoint-4", 2) == []  # another number of processes is another problem


@pytest.mark.parametrize(("name", "cut"), [*((name, False) for name in LOST), *((name, True) for name in CUT)])
def test_a_damaged_one_is_passed_over_or_refused(
    flags: Flags, out: Path, capsys: pytest.CaptureFixture[str], name: str, cut: bool
) -> None:
    file = out / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:-100]) if cut else file.unlink()
    (damage,) = verify(out / "checkpoint-4", 1)
    assert damage.startswith((f"{name}: ", f"the weights ({name.partition('.')[0]}"))
    options = parse_arguments(flags(resume_from_checkpoint="auto"))[0]
    assert checkpoint_to_resume(options) == out / "checkpoint-2"
    result = capsys.readouterr().err
    assert f"checkpoint-4 is damaged or holds no optimizer state ({damage})" in result
    assert "resuming from the one before, checkpoint-2" in result
    options = parse_arguments(flags(resume_from_checkpoint=out / "checkpoint-4"))[0]
    with pytest.raises(MMRoleError, match="is damaged") as caught:
        checkpoint_to_resume(options)
    assert "checkpoint-2" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "content"),
    [("training.json", "[]"), ("training.json", '{"identity": []}'), ("trainer_state.json", '{"steps": 2}')],
)
def test_files_that_hold_something_else(out: Path, name: str, content: str) -> None:
    (out / "checkpoint-4" / name).write_text(content)
    assert [line.split(":")[0] for line in verify(out / "checkpoint-4", 1)] == [name]


def test_none_is_whole(flags: Flags, out: Path) -> None:
    for step in (2, 4):
        (out / f"checkpoint-{step}" / "optimizer.pt").unlink()  # as --save_only_model leaves them
    with pytest.raises(MMRoleError, match="the run has no checkpoint to resume from") as caught:
        checkpoint_to_resume(parse_arguments(flags(resume_from_checkpoint="auto"))[0])
    assert len(caught.value.value) == 2


def as_sharded(folder: Path, stage: int, processes: int) -> Path:
    """Makes a checkpoint look as DeepSpeed's do."""
    (folder / "training.json").write_text(f'{{"identity": {{"processes": {processes}, "ZeRO stage": {stage}}}}}')
    (folder / "optimizer.pt").unlink()
    (folder / "rng_state.pth").unlink()
    (folder / "latest").write_text("global_step4")
    shards = folder / "global_step4"
    shards.mkdir()
    names = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(processes)]
    if stage == 3:
        names += [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(processes)]
    else:
        names.append("mp_rank_00_model_states.pt")
    for file in (*(shards / name for name in names), *(folder / f"rng_state_{rank}.pth" for rank in range(processes))):
        torch.save({"a": torch.zeros(2)}, file)
    return shards


@pytest.mark.parametrize("stage", [2, 3])
def test_every_shard_must_be_there(out: Path, stage: int) -> None:
    folder = out / "checkpoint-4"
    shards = as_sharded(folder, stage, 2)
    assert verify(folder, 2) == []
    (shards / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    model = next(shards.glob("*mp_rank_00_model_states.pt"))
    model.write_bytes(model.read_bytes()[:-10])
    (folder / "rng_state_1.pth").unlink()
    found = verify(folder, 2)
    assert found[:2] == ["rng_state_1.pth: missing", "zero_pp_rank_1_mp_rank_00_optim_states.pt: missing"]
    assert found[2].startswith(f"{model.name}: is cut off")
    (folder / "latest").unlink()
    assert "latest: missing" in verify(folder, 2)


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
    with pytest.raises(MMRoleError, match="no such checkpoint") as caught:
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


def test_other_settings_are_reported_before_anything_is_loaded(
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
    result = str(caught.value)
    for part in ("samples a step: 4 there, 8 now", "--global_batch_size 4", f"--model_name_or_path {out}"):
        assert part in result
    assert "processes" not in result


def test_other_data_or_another_base_is_reported(flags: Flags, base: Path, data: Data, tmp_path: Path) -> None:
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


def test_another_schedule_is_reported(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = {"max_steps": 1, "save_strategy": "steps", "lr_scheduler_type": "constant"}
    main(flags(**first))
    main(flags(**{**first, "max_steps": 2}, learning_rate=1e-5, resume_from_checkpoint="auto"))
    result = capsys.readouterr().err
    assert "learning_rate 0.001 there, 1e-05 now; max_steps 1 there, 2 now" in result
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
    with pytest.raises(MMRoleError, match="cannot be both resumed and deleted"):
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


# The best step is the first, whose rate is 0; patience ends the run after the third.
BEST = {"eval_split": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST |= {"load_best_model_at_end": True, "early_stopping_patience": 2, "save_total_limit": 1, "learning_rate": 1.0}
BEST |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "kept"), [({"dataloader_num_workers": 1}, [2]), (BEST, [1, 2])], ids=["plain", "best"]
)
def test_sigterm_saves_stops_and_resumes_exactly(
    flags: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, object],
    kept: list[int],
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    main(flags(max_steps=4, output_dir=whole, **more))
    words = flags(max_steps=4, **more)
    step = SupervisedTrainer.training_step

    def asked_to_stop(self: SupervisedTrainer, *args: object) -> torch.Tensor:
        if self.state.global_step == 1 and not self.stop_asked:
            workers = [str(worker.pid) for worker in multiprocessing.active_children()]
            subprocess.run(["kill", "-TERM", str(os.getpid()), *workers], check=True)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "training_step", asked_to_stop)
        assert main(words) == 128 + signal.SIGTERM
    assert [path.name for path in checkpoints(out)] == [f"checkpoint-{number}" for number in kept]
    assert "stopped after step 2" in capsys.readouterr().out
    assert report(out)["state"] == "running"
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert losses(out) == pytest.approx(losses(whole), rel=1e-6)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


STOPPED_BY_ONE_OF_TWO = """
import os, signal, sys
from finetune import finetune, trainer

step = trainer.SupervisedTrainer.training_step

def asked_to_stop(self, *args):
    if self.state.global_step == 1 and self.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args)

trainer.SupervisedTrainer.training_step = asked_to_stop
sys.exit(finetune.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(flags: Flags, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(STOPPED_BY_ONE_OF_TWO)
    words = flags(max_steps=5, gradient_accumulation_steps=1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", "2"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = run_group([sys.executable, *launcher, program, *words], SECONDS, env=environ)
    assert done.returncode != 0
    assert "stopped after step 2, and saved" in done.stdout, done.stderr[-3000:]
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]


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
def test_killed_in_a_save_it_resumes_from_the_checkpoint_before(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = flags(max_steps=4, save_strategy="steps", save_steps=1)
    main(words)
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
