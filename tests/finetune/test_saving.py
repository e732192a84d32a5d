"""A save is whole or not there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import qwen_vl
from data_utils.errors import MMRoleError
from finetune.saving import (
    STAGING,
    check_saved,
    checkpoints,
    drop_checkpoints,
    expected_tensors,
    publish_files,
    publish_folder,
    recover_published,
    save_model,
    writing,
)
from finetune.trainer import SupervisedTrainer


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
    told = str(caught.value)
    for part in ("transformer.ln_f.weight", "lm_head.weight: F32 [0] instead of F32 [512, 128]", "BF16", "more"):
        assert part in told


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


def test_a_checkpoint_is_there_at_every_moment_of_its_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, target = tmp_path / STAGING / "checkpoint-2", tmp_path / "checkpoint-2"
    for folder, text in ((staged, "new"), (target, "old")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
    rename, done = Path.rename, []

    def killed(self: Path, to: Path) -> Path:
        if done:
            raise KeyboardInterrupt
        done.append(rename(self, to))
        return done[0]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        publish_folder(staged, target)
    assert checkpoints(tmp_path) == []
    recover_published(tmp_path)
    assert (target / "config.json").read_text() == "old"
    publish_folder(staged, target)
    assert (target / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [STAGING, "checkpoint-2"]
    done[0].mkdir()  # killed after the new one is there
    recover_published(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [STAGING, "checkpoint-2"]


def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, sees: bool) -> SupervisedTrainer:
    """The trainer of another node's first process, which sees what the first process of all writes, or does not."""
    trainer = SupervisedTrainer.__new__(SupervisedTrainer)
    out = str(tmp_path)
    trainer.args = SimpleNamespace(process_index=8, local_process_index=0, world_size=16, output_dir=out)
    trainer.accelerator = SimpleNamespace(wait_for_everyone=lambda: None)
    staging = tmp_path / STAGING

    def name(token: list[str]) -> None:
        token[0] = "token"
        if sees:
            staging.mkdir()
            (staging / token[0]).touch()

    monkeypatch.setattr("torch.distributed.broadcast_object_list", name)
    trainer._begin_staging()
    (staging / "checkpoint-2").mkdir()
    return trainer


def test_a_node_of_a_shared_disk_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = node(tmp_path, monkeypatch, sees=True)
    target = tmp_path / "checkpoint-2"
    target.mkdir()
    (target / "config.json").write_text("published by the first process")
    # The staged folder seems to be there still: what a network file system remembers may be old.
    trainer._publish(tmp_path / STAGING / "checkpoint-2", target)
    assert (target / "config.json").read_text() == "published by the first process"


def test_a_node_with_a_disk_of_its_own_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = node(tmp_path, monkeypatch, sees=False)
    trainer._publish(tmp_path / STAGING / "checkpoint-2", tmp_path / "checkpoint-2")
    assert (tmp_path / "checkpoint-2").is_dir()
    assert not (tmp_path / STAGING / "checkpoint-2").exists()


def test_only_errors_of_writing_are_told_as_such(tmp_path: Path) -> None:
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
    drop_checkpoints(tmp_path, None)
    drop_checkpoints(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    drop_checkpoints(tmp_path, 1, tmp_path / "checkpoint-10")  # gone on with from an earlier one
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10"]
    (tmp_path / "checkpoint-100").mkdir()
    assert checkpoints(tmp_path / "nowhere") == []
    (tmp_path / ".saving" / "a").mkdir()
    publish_folder(tmp_path / ".saving" / "a", tmp_path / "checkpoint-100")
    assert len(checkpoints(tmp_path)) == 2
