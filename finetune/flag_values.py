"""Which values of flags cannot be, alone or together; all are found before anything is made of them."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers import SchedulerType

from data_utils.errors import MMRoleError

WARMUP_LR = "warmup_lr"  # a schedule; see finetune.arguments
# What the transformers Trainer offers and this one does not, with the value that leaves it off.
UNSUPPORTED = {
    "push_to_hub": False,
    "load_best_model_at_end": False,
    "auto_find_batch_size": False,
    "save_on_each_node": False,
    "fsdp": None,
}
INSTEAD_OF_BLOCKS = {
    "scheduler": "remove the block and give --lr_scheduler_type (warmup_lr is DeepSpeed's WarmupLR), --warmup_steps "
    "and --learning_rate",
    "optimizer": "remove the block and give --optim, --learning_rate, --weight_decay, --adam_beta1, --adam_beta2 "
    "and --decay_all",
}
_NO = ("false", "0", "no", "none", "")
_WHOLE = ("lora_r", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_WHOLE = (*_WHOLE, "fill_to", "global_batch_size", "model_max_length", "dataloader_prefetch_factor")
_ABOVE_0 = ("lora_alpha", "num_train_epochs", "adam_epsilon", "save_steps", "eval_steps", "logging_steps")
_FROM_0 = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers")
_FROM_0 = (*_FROM_0, "resume_save_steps")
_SHARES = ("lora_dropout", "adam_beta1", "adam_beta2")
# Flag, least value, whether that one itself can be, first value that is too large.
RANGES: dict[str, tuple[float, bool, float]] = {
    **dict.fromkeys(_WHOLE, (1, True, math.inf)),
    **dict.fromkeys(_ABOVE_0, (0, False, math.inf)),
    **dict.fromkeys(_FROM_0, (0, True, math.inf)),
    **dict.fromkeys(_SHARES, (0, True, 1)),
}


def flag_problems(flags: Namespace) -> list[MMRoleError]:
    """Flags that cannot be, or not together; before a process group or a DeepSpeed config is made of them.

    Args:
        flags: What the command line says, each value of its type.
    """
    problems = [
        MMRoleError("this flag is not supported here", f"--{name} {getattr(flags, name)}", f"--{name}", "leave it")
        for name, off in UNSUPPORTED.items()
        if getattr(flags, name, off) not in (off, "", [], None)
    ]
    problems += [problem for name in RANGES if (problem := _range_problem(name, getattr(flags, name, None)))]
    return problems + _folder_problems(flags) + _recipe_problems(flags) + _contradictions(flags)


def resumes(asked: object) -> bool:
    """Whether a value of `--resume_from_checkpoint` asks to go on with a run, and not to begin at the beginning."""
    return str(asked or "").lower() not in _NO


def _range_problem(name: str, value: Any) -> MMRoleError | None:
    if not isinstance(value, int | float):
        return None  # not given, or not read yet
    least, itself, end = RANGES[name]
    if least < value < end or (itself and value == least):
        return None
    told = f"{'from' if itself else 'above'} {least:g}" + (f" to below {end:g}" if end < math.inf else "")
    return MMRoleError("a flag has a value that cannot be", f"--{name} {value}", f"--{name}", f"give a number {told}")


def _folder_problems(flags: Namespace) -> list[MMRoleError]:
    problems = []
    if flags.output_dir is None:
        problems.append(MMRoleError("no output folder is given", None, "--output_dir", "say where checkpoints go"))
    if isinstance(flags.deepspeed, str) and not Path(flags.deepspeed).is_file():
        fix = "use finetune/ds_config_zero2.json, ds_config_zero3.json or ds_config_zero3_offload.json"
        problems.append(MMRoleError("no such DeepSpeed config", flags.deepspeed, "--deepspeed", fix))
    return problems


def _recipe_problems(flags: Namespace) -> list[MMRoleError]:
    problems = []
    if (flags.loss_group not in ("micro", "step") and not flags.loss_group.isdecimal()) or flags.loss_group == "0":
        fix = "give a number from 1, 'micro' or 'step'"
        problems.append(MMRoleError("a flag has a value that cannot be", flags.loss_group, "--loss_group", fix))
    schedules = [WARMUP_LR, *(kind.value for kind in SchedulerType)]
    if flags.lr_scheduler_type not in schedules:
        fix = f"use one of {', '.join(schedules)}"
        problems.append(MMRoleError("no such schedule", flags.lr_scheduler_type, "--lr_scheduler_type", fix))
    if isinstance(flags.deepspeed, str) and Path(flags.deepspeed).is_file():
        problems += _deepspeed_problems(Path(flags.deepspeed))
    return problems


def _deepspeed_problems(config: Path) -> list[MMRoleError]:
    """Blocks of a DeepSpeed config that would make transformers ignore flags without a word."""
    try:
        blocks = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [MMRoleError(f"the DeepSpeed config cannot be read: {error}", config, "--deepspeed", "correct it")]
    return [
        MMRoleError(f"a {name} block of a DeepSpeed config overrides this program's flags", blocks[name], config, fix)
        for name, fix in INSTEAD_OF_BLOCKS.items()
        if isinstance(blocks, dict) and name in blocks
    ]


def _contradictions(flags: Namespace) -> list[MMRoleError]:
    problems = []
    goes_on = resumes(flags.resume_from_checkpoint)

    def add(what: str, value: str, fix: str) -> None:
        problems.append(MMRoleError(what, value, "the command line", fix))

    if flags.fp16 and not flags.use_lora:
        add("full tuning in float16 overflows", "--fp16", "use --bf16 True, or neither for float32")
    if flags.overwrite_output_dir and goes_on:
        add("a run cannot be gone on with and deleted", "--overwrite_output_dir", "give one of the two")
    if flags.save_only_model and goes_on:
        fix = "leave --save_only_model away: its checkpoints hold no optimizer state and cannot be gone on with"
        add("a run that is gone on with must be able to go on again", "--save_only_model", fix)
    if str(getattr(flags.save_strategy, "value", flags.save_strategy)) == "best":
        add("there is no best checkpoint here", "--save_strategy best", "give steps, epoch or no")
    return problems
