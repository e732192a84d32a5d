"""The output folder before a run, and a disk that is full in the middle of one."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_utils.errors import MMRoleError
from finetune.arguments import parse_arguments
from finetune.base_checks import outline
from finetune.disk import room
from finetune.finetune import main
from finetune.lora import adapter_weights
from finetune.saving import STAGING
from tests.conftest import ROOT
from tests.finetune.conftest import run

Flags = Callable[..., list[str]]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Lets no file grow larger, as a full disk would not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def size_of(folder: Path, *patterns: str) -> int:
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))


def test_an_output_folder_that_cannot_be_written(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/nowhere/out")):
        with pytest.raises(MMRoleError, match="nothing can be written there") as caught:
            main(flags(output_dir=folder, data_path=tmp_path / "gone.json", eval_strategy="steps"))
        assert "--output_dir" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_another_run_is_seen_where_the_flag_says_no(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(MMRoleError, match="has a run in it already"):
        main(flags(resume_from_checkpoint="False"))  # as the scripts say it


def test_a_disk_without_room(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.model.load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=6_000_000))
    with pytest.raises(MMRoleError, match="no room") as caught:
        main(flags(save_strategy="steps"))
    assert "a checkpoint takes about 6.2 MB, the finished model 2.2 MB; 6.0 MB are free" in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(pytest.fail.Exception):
        main(flags())  # without checkpoints there is room


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_estimate_is_near(flags: Flags, base: Path, tmp_path: Path, lora: bool) -> None:
    words = flags(save_strategy="steps", max_steps=1, use_lora=lora)
    main(words)
    found = room(parse_arguments(words)[0], outline(base))
    kinds = ("*.safetensors", "optimizer.pt")
    assert found.checkpoint == pytest.approx(size_of(tmp_path / "out" / "checkpoint-1", *kinds), rel=0.05)
    assert found.finished == pytest.approx(size_of(tmp_path / "out", "*.safetensors"), rel=0.05)
    assert not lora or adapter_weights(outline(base), parse_arguments(words)[0].lora) * 4 == found.finished


@pytest.mark.parametrize("size", [1_000_000, 3_000_000], ids=["weights", "optimizer"])
def test_a_full_disk_in_a_save(flags: Flags, tmp_path: Path, size: int) -> None:
    out = tmp_path / "out"
    main(flags(max_steps=1, save_strategy="steps"))
    kept = {path: path.read_bytes() for path in (out / "checkpoint-1").rglob("*") if path.is_file()}
    with pytest.raises(MMRoleError, match="cannot be written") as caught, files_up_to(size):
        main(flags(max_steps=2, save_strategy="steps", resume_from_checkpoint="auto"))
    assert "free some space" in str(caught.value)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert {path: path.read_bytes() for path in kept} == kept
    assert not (out / STAGING).exists()
    main(flags(max_steps=2, save_strategy="steps", resume_from_checkpoint="auto"))


@pytest.mark.slow
def test_a_full_disk_under_several_processes(flags: Flags, tmp_path: Path) -> None:
    config = ROOT / "finetune" / "ds_config_zero3.json"
    with files_up_to(1_000_000):
        done = run(flags(max_steps=1, save_strategy="steps", deepspeed=config), processes=2)
    assert done.returncode != 0
    assert done.stderr.count("the save cannot be written") == 1
    assert "Connection closed" not in done.stderr
    assert not (tmp_path / "out" / STAGING).exists()
