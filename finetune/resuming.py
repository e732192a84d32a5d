"""Going on with a run: which checkpoint, and whether it can be gone on with as things are now."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from data_utils.errors import MMRoleError
from finetune.arguments import Options
from finetune.flag_values import resumes
from finetune.saving import checkpoints, recover_published, saved_tensors
from finetune.wholeness import damages, report_of, steps_done, written_as

AUTO = "auto"
FLAG = "--resume_from_checkpoint"
_YES = ("true", "1", "yes")
# What decides the course of the learning rate and may change on the way, if the user knows.
_SCHEDULE = ("learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "weight_decay")


def checkpoint_to_resume(options: Options) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None to begin at the beginning.

    "auto" (and "True", as the released flag was a bool) is the last whole one in the output folder, or none if there is
    none at all. The first process decides for all.

    Raises:
        MMRoleError: There is no such checkpoint, or it is not whole; on every process.
    """
    answer: list[Any] = [None]
    if options.training.process_index == 0:
        try:
            recover_published(Path(options.training.output_dir))
            answer = [_chosen(options)]
        except MMRoleError as error:
            answer = [error]
    if options.training.world_size > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], MMRoleError):
        raise answer[0]
    return answer[0]


def _chosen(options: Options) -> Path | None:
    asked = str(options.training.resume_from_checkpoint or "")
    if not resumes(asked):
        return None
    there = checkpoints(Path(options.training.output_dir))
    if asked.lower() in (AUTO, *_YES):
        return _last_whole(there, options)
    folder = Path(asked)
    found = damages(folder, options.training.world_size)
    if found:
        names = [path.name for path in there if path != folder]
        place = options.training.output_dir
        fix = f"give one of {names} below {place}, or auto for the last" if names else "leave the flag away"
        what = "this checkpoint is not whole" if folder.is_dir() else "no checkpoint to go on with"
        raise MMRoleError(what, found if folder.is_dir() else folder, f"{FLAG} {folder}", fix)
    return folder


def _last_whole(there: list[Path], options: Options) -> Path | None:
    """The newest checkpoint that is whole; tells of those that are newer and are not."""
    passed = []
    for folder in reversed(there):
        found = damages(folder, options.training.world_size)
        if not found:
            for line in passed:
                print(f"{line}; {folder.name} is gone on with", file=sys.stderr)
            return folder
        passed.append(f"{folder.name} is not whole ({', '.join(found)})")
    if passed:
        fix = "give --overwrite_output_dir to begin at the beginning, or another --output_dir"
        raise MMRoleError("no checkpoint of the run is whole", passed, options.training.output_dir, fix)
    return None


def resume_problems(folder: Path, now: Mapping[str, Any]) -> list[MMRoleError]:
    """What keeps a checkpoint from being gone on with.

    Args:
        folder: The checkpoint.
        now: The present run's `identity`.
    """
    found = damages(folder, now["processes"])
    if found:
        fix = "every node needs the checkpoint's files: put the output folder on a file system that they share"
        return [MMRoleError("this checkpoint is not whole", found, folder, fix)]
    there = written_as(folder)
    lines = [f"{key}: {there[key]} there, {now[key]} now" for key in now if key in there and there[key] != now[key]]
    if not lines:
        return []
    fix = "run with the same settings as before (PROCESSES and NNODES give the number of processes)"
    ways = _ways_out(fix, folder, adapter=now["LoRA"] != "no")
    return [MMRoleError("the checkpoint was written under other settings", lines, folder, ways)]


def origin_problems(folder: Path, now: Mapping[str, Mapping[str, str]], *, adapter: bool) -> list[MMRoleError]:
    """Other data or another base than the checkpoint came from.

    Args:
        folder: The checkpoint.
        now: The present run's `finetune.preflight.fingerprints`.
        adapter: It holds LoRA adapters.
    """
    there, problems = report_of(folder), []
    for name, prints in now.items():
        before = there.get(name, prints)
        key = next(key for key in prints if key != "path")
        if before.get(key) != prints[key]:
            both = ((before, "then"), (prints, "now"))
            told = [f"{one.get('path')} ({key} {str(one.get(key))[:16]}) {when}" for one, when in both]
            fix = _ways_out(f"give the {name} that it began with", folder, adapter=adapter)
            problems.append(MMRoleError(f"the checkpoint began with other {name}", told, folder, fix))
    return problems


def schedule_notice(folder: Path, options: Options) -> str | None:
    """A line about a schedule that is not the one that the checkpoint was written with; None if it is.

    Args:
        folder: The checkpoint.
        options: The command line.
    """
    there, now = report_of(folder).get("options", {}), options.resolved()
    changes = [
        f"{key} {there[key]} there, {now[key]} now" for key in _SCHEDULE if key in there and there[key] != now[key]
    ]
    if not changes:
        return None
    kept = "the peak learning rate and the weight decay stay the checkpoint's, the rest follows the flags"
    return f"the schedule is not the checkpoint's: {'; '.join(changes)} ({kept})"


def is_finished(options: Options, resume: Path, steps: int) -> bool:
    """Whether a run has done its steps and saved what it trained; such a run needs no model.

    Args:
        options: The command line.
        resume: The checkpoint to go on with.
        steps: What the run is to do in all.
    """
    answer = [_has_finished(Path(options.training.output_dir), resume, steps)]
    if options.training.world_size > 1:
        dist.broadcast_object_list(answer)  # the first process's: other nodes may have disks of their own
    return answer[0]


def _has_finished(output: Path, resume: Path, steps: int) -> bool:
    try:
        done = min(steps_done(resume), steps_done(output))
        finished = report_of(output).get("state") == "finished" and bool(saved_tensors(output))
    except (OSError, ValueError, SafetensorError, MMRoleError):
        return False
    return finished and done >= steps


def _ways_out(same: str, folder: Path, *, adapter: bool) -> str:
    if adapter:
        anew = f"  scripts/merge_lora.py {folder} MERGED merges it first, then --model_name_or_path MERGED"
    else:
        anew = f"  --model_name_or_path {folder}"
    return (
        f"{same},\nor begin anew from the weights of that checkpoint, its optimizer and schedule left behind:\n"
        f"{anew} --output_dir ANOTHER, without {FLAG}"
    )


def identity(options: Options) -> dict[str, Any]:
    """What must be equal for a checkpoint to be gone on with: what lays out the optimizer's state, or is learned."""
    training, lora, data = options.training, options.lora, options.data
    adapters = {"LoRA alpha": lora.lora_alpha, "LoRA dropout": lora.lora_dropout, "LoRA bias": lora.lora_bias}
    adapters["LoRA base"] = "four bits" if lora.q_lora else "as it is"
    return {
        "processes": training.world_size,
        "ZeRO stage": training.zero_stage,
        "samples a step": training.samples_per_step,
        "loss group": training.group_size,
        "epochs filled to": training.order(1).multiple,
        "weight decay of": "every weight" if training.decay_all else "what transformers chooses",
        "LoRA": f"r {lora.lora_r} on {', '.join(lora.lora_target_modules)}" if training.use_lora else "no",
        **(adapters if training.use_lora else {}),
        "vision tower": "frozen" if training.fix_vit or training.use_lora else "trained",
        "precision": "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32",
        "longest sample": training.model_max_length,
        "system message": "each sample's own" if data.use_sample_system else "the published one",
        "order": "sequential" if training.sequential else f"permuted each epoch by seed {training.order(1).seed}",
    }
