"""Going on with a run: which checkpoint, and whether it can be gone on with as things are now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError
from data_utils.files import read_json
from finetune.arguments import Options
from finetune.report import TRAINING
from finetune.saving import checkpoints

AUTO = "auto"
STATE = "trainer_state.json"
_YES, _NO = ("true", "1", "yes"), ("false", "0", "no", "none", "")


def checkpoint_to_resume(options: Options) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None to begin at the beginning.

    "auto" (and "True", as the released flag was a bool) is the last one in the output folder, or none if there is none.

    Raises:
        MMRoleError: There is no such checkpoint, or it is not whole.
    """
    asked = str(options.training.resume_from_checkpoint or "")
    if asked.lower() in _NO:
        return None
    if asked.lower() in (AUTO, *_YES):
        found = checkpoints(Path(options.training.output_dir))
        return found[-1] if found else None
    folder = Path(asked)
    if not (folder / STATE).is_file():
        there = [path.name for path in checkpoints(Path(options.training.output_dir))]
        fix = f"give one of {there} below {options.training.output_dir}, or auto for the last" if there else "leave it"
        raise MMRoleError("no checkpoint to go on with", folder, "--resume_from_checkpoint", fix)
    return folder


def resume_problems(folder: Path, now: Mapping[str, Any]) -> list[MMRoleError]:
    """What keeps a checkpoint from being gone on with.

    Args:
        folder: The checkpoint.
        now: The present run's `identity`.
    """
    there = _report(folder).get("identity", {})
    lines = [f"{key}: {there[key]} there, {now[key]} now" for key in now if key in there and there[key] != now[key]]
    if not lines:
        return []
    fix = "run with the same settings as before (PROCESSES and NNODES give the number of processes)"
    return [MMRoleError("the checkpoint was written under other settings", lines, folder, _ways_out(fix, folder))]


def origin_problems(folder: Path, now: Mapping[str, Mapping[str, str]]) -> list[MMRoleError]:
    """Other data or another base than the checkpoint came from.

    Args:
        folder: The checkpoint.
        now: The present run's `finetune.preflight.fingerprints`.
    """
    there, problems = _report(folder), []
    for name, prints in now.items():
        before = there.get(name, prints)
        key = next(key for key in prints if key != "path")
        if before[key] != prints[key]:
            told = [
                f"{one['path']} ({key} {one[key][:16]}) {when}" for one, when in ((before, "then"), (prints, "now"))
            ]
            fix = _ways_out(f"give the {name} that it began with", folder)
            problems.append(MMRoleError(f"the checkpoint began with other {name}", told, folder, fix))
    return problems


def _report(folder: Path) -> dict[str, Any]:
    """What the checkpoint says of itself; nothing, if another trainer wrote it."""
    return read_json(folder / TRAINING) if (folder / TRAINING).is_file() else {}


def _ways_out(same: str, folder: Path) -> str:
    return (
        f"{same},\nor begin anew from the weights of that checkpoint, its optimizer and schedule left behind:\n"
        f"  --model_name_or_path {folder} --output_dir ANOTHER, without --resume_from_checkpoint"
    )


def identity(options: Options) -> dict[str, Any]:
    """What must be equal for a checkpoint to be gone on with; the optimizer's state is laid out by it."""
    training, lora = options.training, options.lora
    return {
        "processes": training.world_size,
        "ZeRO stage": training.zero_stage,
        "micro-batch": training.per_device_train_batch_size,
        "accumulation": training.gradient_accumulation_steps,
        "LoRA": f"r {lora.lora_r} on {', '.join(lora.lora_target_modules)}" if training.use_lora else "no",
        "vision tower": "frozen" if training.fix_vit or training.use_lora else "trained",
        "order": "sequential" if training.sequential else f"shuffled by seed {training.data_seed or training.seed}",
    }
