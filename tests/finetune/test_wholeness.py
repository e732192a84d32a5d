"""A checkpoint is gone on with whole, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_utils.errors import MMRoleError
from finetune.arguments import parse_arguments
from finetune.finetune import main
from finetune.resuming import checkpoint_to_resume
from finetune.wholeness import damages
from tests.finetune.conftest import Data

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
    assert damages(out / "checkpoint-4", 1) == []
    assert damages(out / "checkpoint-4", 2) == []  # that others wrote it is told in other words


@pytest.mark.parametrize(("name", "cut"), [*((name, False) for name in LOST), *((name, True) for name in CUT)])
def test_a_damaged_one_is_passed_over_or_refused(
    flags: Flags, out: Path, capsys: pytest.CaptureFixture[str], name: str, cut: bool
) -> None:
    file = out / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:-100]) if cut else file.unlink()
    (damage,) = damages(out / "checkpoint-4", 1)
    assert damage.startswith((f"{name}: ", f"the weights ({name.partition('.')[0]}"))
    options = parse_arguments(flags(resume_from_checkpoint="auto"))[0]
    assert checkpoint_to_resume(options) == out / "checkpoint-2"
    told = capsys.readouterr().err
    assert f"checkpoint-4 is not whole ({damage})" in told
    assert "checkpoint-2 is gone on with" in told
    options = parse_arguments(flags(resume_from_checkpoint=out / "checkpoint-4"))[0]
    with pytest.raises(MMRoleError, match="not whole") as caught:
        checkpoint_to_resume(options)
    assert "checkpoint-2" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "content"),
    [("training.json", "[]"), ("training.json", '{"identity": []}'), ("trainer_state.json", '{"steps": 2}')],
)
def test_files_that_hold_something_else(out: Path, name: str, content: str) -> None:
    (out / "checkpoint-4" / name).write_text(content)
    assert [line.split(":")[0] for line in damages(out / "checkpoint-4", 1)] == [name]


def test_none_is_whole(flags: Flags, out: Path) -> None:
    for step in (2, 4):
        (out / f"checkpoint-{step}" / "optimizer.pt").unlink()  # as --save_only_model leaves them
    with pytest.raises(MMRoleError, match="no checkpoint of the run is whole") as caught:
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
    assert damages(folder, 2) == []
    (shards / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    model = next(shards.glob("*mp_rank_00_model_states.pt"))
    model.write_bytes(model.read_bytes()[:-10])
    (folder / "rng_state_1.pth").unlink()
    found = damages(folder, 2)
    assert found[:2] == ["rng_state_1.pth: missing", "zero_pp_rank_1_mp_rank_00_optim_states.pt: missing"]
    assert found[2].startswith(f"{model.name}: is cut off")
    (folder / "latest").unlink()
    assert "latest: missing or unreadable" in damages(folder, 2)
