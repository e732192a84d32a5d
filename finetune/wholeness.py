"""Whether a checkpoint holds all that a run needs to go on as if it had not been stopped."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerState

from data_utils.errors import MMRoleError
from data_utils.files import read_json
from finetune.report import TRAINING
from qwen_vl.checkpoint import CheckpointError, file_damages, missing_files

STATE = "trainer_state.json"
_PARTS = ("identity", "options", "data", "base")
LATEST = "latest"  # DeepSpeed's note of which of its folders counts
_ONE_PROCESS = "rng_state.pth"
_SHARD = "*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
_MODEL_SHARD = "zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
_MODEL_WHOLE = "mp_rank_00_model_states.pt"


def damages(folder: Path, processes: int) -> list[str]:
    """What of a checkpoint is missing or broken, a line each; empty if it can be gone on with.

    Sizes and headers are looked at, no weight is read.

    Args:
        folder: The checkpoint.
        processes: How many there are now. If others wrote it, their own files are not looked for: it cannot be gone on
            with in any case.
    """
    if not folder.is_dir():
        return ["there is no such folder"]
    try:
        identity = written_as(folder)
    except MMRoleError as error:
        return [f"{TRAINING}: {error.what}"]
    if identity.get("processes", processes) != processes:
        processes = 0
    found = [*_state_damages(folder), *_model_damages(folder), *_file_damages(folder, ["scheduler.pt"])]
    found += _file_damages(folder, _random_states(processes))
    return found + _optimizer_damages(folder, processes, identity.get("ZeRO stage", 0))


def report_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint's `training.json` says; nothing, if another trainer wrote the checkpoint.

    Raises:
        MMRoleError: It cannot be read, or is no object.
    """
    if not (folder / TRAINING).is_file():
        return {}
    content = read_json(folder / TRAINING)
    if not isinstance(content, dict) or any(not isinstance(content.get(part, {}), dict) for part in _PARTS):
        raise MMRoleError("the report of the run is not as it was written", type(content).__name__, folder / TRAINING)
    return content


def written_as(folder: Path) -> dict[str, Any]:
    """Under which settings a checkpoint was written, as `finetune.resuming.identity` names them.

    Raises:
        MMRoleError: As `report_of`; or it says no number of processes.
    """
    identity = report_of(folder).get("identity", {})
    numbers = (identity.get("processes", 1), identity.get("ZeRO stage", 0))
    if not all(isinstance(number, int) for number in numbers):
        raise MMRoleError("the report of the run is not as it was written", numbers, folder / TRAINING)
    return identity


def steps_done(folder: Path) -> int:
    """Optimizer steps of the run that wrote a folder.

    Raises:
        ValueError: Its trainer's state is not there, or not as it was written.
    """
    try:
        steps = TrainerState.load_from_json(str(folder / STATE)).global_step
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{STATE}: {'missing' if isinstance(error, FileNotFoundError) else error}") from error
    if not isinstance(steps, int):
        raise ValueError(f"{STATE}: says no step")
    return steps


def _state_damages(folder: Path) -> list[str]:
    try:
        steps_done(folder)
    except ValueError as error:
        return [str(error)]
    return []


def _model_damages(folder: Path) -> list[str]:
    try:
        missing = missing_files(folder)
    except CheckpointError as error:
        return [f"{error.where}: {error.what}"]
    weights = sorted(folder.glob("*.safetensors"))
    return [f"{name}: missing" for name in missing] + _broken(weights)


def _random_states(processes: int) -> list[str]:
    return [_ONE_PROCESS] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]


def _optimizer_damages(folder: Path, processes: int, stage: int) -> list[str]:
    """Of the optimizer's state: one file, or with DeepSpeed a shard of every process."""
    if not stage and not (folder / LATEST).is_file():
        return _file_damages(folder, ["optimizer.pt"])
    try:
        shards = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return [f"{LATEST}: missing or unreadable"]
    models = [_MODEL_SHARD.format(rank=rank) for rank in range(processes)] if stage == 3 else [_MODEL_WHOLE]
    return _file_damages(shards, [*(_SHARD.format(rank=rank) for rank in range(processes)), *models])


def _file_damages(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Of files that must be there, each named by a pattern that matches it alone."""
    found = []
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        if not files:
            found.append(f"{pattern.replace('*', '')}: missing")
        found += _broken(files)
    return found


def _broken(files: Iterable[Path]) -> list[str]:
    return [f"{file.name}: {damage}" for file in files for damage, _ in file_damages(file)]
