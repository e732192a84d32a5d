"""The command line: the released flags, in the current spelling of transformers, and a few of ours."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import transformers
from transformers import HfArgumentParser, SchedulerType

from data_utils.errors import MMRoleError, raise_problems
from finetune.data import Order
from finetune.distributed import choose_devices, join_deepspeed

WARMUP_LR = "warmup_lr"  # the schedule of the released scripts; see `finetune.trainer.WarmupRate`
# Features of transformers' Trainer that are not supported, or would be ignored; with what to do.
UNSUPPORTED = {
    **dict.fromkeys(("push_to_hub", "auto_find_batch_size", "save_on_each_node", "fsdp", "fsdp_config"), "remove it"),
    **dict.fromkeys(
        ("hub_model_id", "hub_token", "hub_private_repo", "hub_revision", "hub_always_push"),
        "remove it: nothing is uploaded",
    ),
    **dict.fromkeys(
        ("label_smoothing_factor", "use_liger_kernel", "liger_kernel_config"), "remove it: the loss is fixed"
    ),
    "enable_jit_checkpoint": "remove it: a run saves and stops on SIGTERM by itself",
    "train_sampling_strategy": "remove it: the order of samples is a part of the recipe; --sequential keeps the file's",
    "length_column_name": "remove it: samples are packed, not grouped by length",
    "ignore_data_skip": "remove it: a resumed run continues at its place in the stream of samples",
    "dataloader_drop_last": "remove it: no step is incomplete",
    **dict.fromkeys(
        ("dataloader_in_order", "accelerator_config"), "remove it: the order of samples is a part of the recipe"
    ),
    "average_tokens_across_devices": "remove it: --loss_group says over which tokens the loss is a mean",
    "use_cache": "remove it: training has no use for a cache",
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "remove it: --report_to knows tensorboard and wandb",
    ),
    "parallelism_config": "remove it: training scales with DeepSpeed",
    "neftune_noise_alpha": "remove it",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "remove it: evaluation runs in the precision of training"),
    **dict.fromkeys(
        (
            *("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "eval_accumulation_steps"),
            *("label_names", "eval_do_concat_batches", "eval_use_gather_object"),
        ),
        "remove it: evaluation computes only the loss",
    ),
}
# Spellings of transformers 4 whose successor is in UNSUPPORTED.
GONE = {
    "--group_by_length": "train_sampling_strategy",
    "--fsdp_min_num_params": "fsdp",
    "--hub_strategy": "push_to_hub",
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
_FROM_0 = (*_FROM_0, "resume_save_steps", "eval_split", "early_stopping_patience")
_SHARES = ("lora_dropout", "adam_beta1", "adam_beta2")
# Flag, least value, whether that one is allowed, first value that is too large.
RANGES: dict[str, tuple[float, bool, float]] = {
    **dict.fromkeys(_WHOLE, (1, True, math.inf)),
    **dict.fromkeys(_ABOVE_0, (0, False, math.inf)),
    **dict.fromkeys(_FROM_0, (0, True, math.inf)),
    **dict.fromkeys(_SHARES, (0, True, 1)),
    **dict.fromkeys(("seed", "data_seed"), (0, True, 2**32)),
}
_MOST_LISTED = 16
# Spellings of transformers 4 that transformers 5 has dropped.
RENAMED = {
    "--evaluation_strategy": "--eval_strategy",
    "--warmup_ratio": "--warmup_steps",  # below 1 it means a share of all steps
    "--no_cuda": "--use_cpu",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "--per_device_eval_batch_size",
}
# Flags without effect, with the reason.
RETIRED = {
    **dict.fromkeys(
        ("--do_train", "--do_eval", "--do_predict"), "this program trains, and evaluates by --eval_strategy"
    ),
    "--lazy_preprocess": "samples are always made when they are needed",
    "--cache_dir": "weights are read from the folder that is given",
    "--save_safetensors": "weights are always saved as safetensors",
    "--logging_dir": "tensorboard writes below the output folder",
    "--lora_weight_path": "it had no effect in the released trainer either",
}
# published: the settings of the two released scripts: on 8 GPUs (`fill_to`), micro-batches of 8 and 4 (`loss_group`).
_COMMON = {
    "global_batch_size": 256,
    "learning_rate": 1e-5,
    "lr_scheduler_type": WARMUP_LR,
    "warmup_steps": 0.01,
    "weight_decay": 0.05,
    "decay_all": True,
    "adam_beta2": 0.95,
    "fix_vit": True,
    "save_strategy": "epoch",
    "resume_save_steps": 100,
}
RECIPES = {
    "agent": {**_COMMON, "num_train_epochs": 3.0, "model_max_length": 3072, "loss_group": "8", "fill_to": 64},
    "reward_model": {**_COMMON, "num_train_epochs": 10.0, "model_max_length": 4096, "loss_group": "4", "fill_to": 32},
}
# Options that are not printed: redundant, or without use here.
_NOT_SHOWN = {"accelerator_config", "hub_token", "push_to_hub_token", "train_batch_size", "eval_batch_size"}


@dataclass
class ModelArguments:
    """The model to tune."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint folder to start from; not downloaded."})


@dataclass
class DataArguments:
    """The data."""

    data_path: str = field(metadata={"help": "Training samples, a JSON file."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Samples for --eval_strategy steps or epoch."})
    eval_split: float = field(
        default=0,
        metadata={
            "help": "Evaluate on so many samples of the training file (below 1: a share of it), drawn by the seed, "
            "and do not train on them."
        },
    )
    data_root: str = field(
        default=".", metadata={"help": "Folder from which the image paths in the samples count (working directory)."}
    )
    use_sample_system: bool = field(
        default=False, metadata={"help": "Use each sample's own system message instead of the published one."}
    )


@dataclass
class LoraArguments:
    """The adapters, with `--use_lora`."""

    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = field(default_factory=lambda: ["c_attn", "attn.c_proj", "w1", "w2"])
    lora_bias: str = field(default="none", metadata={"choices": ["none", "all", "lora_only"]})
    q_lora: bool = field(default=False, metadata={"help": "Adapters on a base in 4 bits (NF4, bitsandbytes, GPU)."})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments with this project's defaults, and the released trainer's own."""

    output_dir: str | None = None
    per_device_train_batch_size: int = 1
    logging_steps: float = 1
    report_to: list[str] = field(default_factory=lambda: ["none"])
    dataloader_num_workers: int = field(
        default=2, metadata={"help": "Processes that tokenize samples and decode images, for each training process."}
    )
    model_max_length: int = field(default=3072, metadata={"help": "Tokens to keep of a sample."})
    use_lora: bool = False
    fix_vit: bool = field(default=True, metadata={"help": "Freeze the vision tower, all but its resampler."})
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Samples of one optimizer step; the accumulation follows from it."}
    )
    recipe: str | None = field(
        default=None,
        metadata={"help": "Settings of a released training script; other flags override them.", "choices": [*RECIPES]},
    )
    loss_group: str = field(
        default="micro",
        metadata={
            "help": "Consecutive samples whose supervised tokens' mean is one term of the loss: a number, 'micro' (the "
            "micro-batch of one process) or 'step' (all samples of an update)."
        },
    )
    fill_to: int | None = field(
        default=None,
        metadata={
            "help": "Every epoch is filled up to a multiple of this (by default what the processes take at once)."
        },
    )
    lr_scheduler_type: str = field(
        default="linear",
        metadata={
            "help": f"{WARMUP_LR} (DeepSpeed's logarithmic warm-up of the released configs, then constant), or one of "
            "transformers' (cosine, linear, constant, ...)."
        },
    )
    decay_all: bool = field(
        default=False,
        metadata={"help": "Weight decay for every trained weight, not only for those that transformers chooses."},
    )
    resume_save_steps: int = field(
        default=0,
        metadata={
            "help": "Save a checkpoint to resume from every so many updates, of which the newest stays; other "
            "checkpoints keep their weights and lose their optimizer state once there is a newer one. 0: no."
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "End after so many evaluations without a lower loss; needs --load_best_model_at_end."},
    )
    packing: bool = field(
        default=True, metadata={"help": "Samples of a micro-batch one after the other, without padding."}
    )
    sequential: bool = field(default=False, metadata={"help": "Samples in the order of the file, not shuffled."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints of an earlier run in the output folder."}
    )

    def __post_init__(self) -> None:
        if self.global_batch_size is not None:
            # First: the DeepSpeed config is filled in from it below.
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            self.gradient_accumulation_steps = accumulation_steps(
                self.global_batch_size,
                self.per_device_train_batch_size,
                processes,
                self._loss_group_number,
            )
        schedule, self.train_sampling_strategy = self.lr_scheduler_type, "sequential"  # of the stream's positions
        if schedule == WARMUP_LR:
            self.lr_scheduler_type = "constant"  # what transformers knows and reads nothing into
        if hasattr(self, "activation_checkpointing") and self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)  # the newer name of the same
        self.remove_unused_columns = False  # sample ids travel with a batch, to be named in errors
        self.logging_nan_inf_filter = False  # a loss that is not finite stops the run instead
        self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every weight takes part in every step
        choose_devices(self)
        super().__post_init__()
        if schedule == WARMUP_LR:
            self.lr_scheduler_type = schedule
        if self.samples_per_step % self.group_size:
            raise self._group_error()
        if self.use_cpu and self.deepspeed:
            join_deepspeed()
        self._n_gpu = min(self._n_gpu, 1)  # one process a GPU; never torch's DataParallel

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 without DeepSpeed."""
        if not self.deepspeed:
            return 0
        return int(self.hf_deepspeed_config.config.get("zero_optimization", {}).get("stage", 0))

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def group_size(self) -> int:
        """Consecutive samples of the stream whose supervised tokens' mean is one term of the loss."""
        named = {"micro": self.per_device_train_batch_size, "step": self.samples_per_step}
        return named.get(self.loss_group) or int(self.loss_group)

    @property
    def _loss_group_number(self) -> int:
        return int(self.loss_group) if self.loss_group.isdecimal() else 1

    @property
    def batch_unit(self) -> int:
        """What the samples of an optimizer step must be a multiple of, with these micro-batches and processes."""
        return math.lcm(self.per_device_train_batch_size * self.world_size, self._loss_group_number)

    def _group_error(self) -> MMRoleError:
        fits = " or ".join(map(str, _multiples(self.samples_per_step, self.batch_unit)))
        return MMRoleError(
            "the global batch is no multiple of the loss group",
            f"global batch {self.samples_per_step}, groups of {self.group_size} samples",
            "--global_batch_size (GLOBAL_BATCH), --loss_group",
            f"give a global batch of {fits}, or --loss_group step",
        )

    def order(self, samples: int) -> Order:
        """Returns the stream in which so many samples train."""
        return Order(
            samples,
            multiple=self.fill_to or self.per_device_train_batch_size * self.world_size,
            step=self.samples_per_step,
            epochs=self.num_train_epochs,
            max_steps=self.max_steps,
            seed=None if self.sequential else self.seed if self.data_seed is None else self.data_seed,
        )

    def recipe_used(self) -> dict[str, Any]:
        """Returns the recipe's name, and its settings that other flags have changed."""
        if self.recipe is None:
            return {"name": None}
        now = {name: getattr(self, name) for name in RECIPES[self.recipe]}
        now = {name: getattr(value, "value", value) for name, value in now.items()}
        changed = {name: now[name] for name, value in RECIPES[self.recipe].items() if now[name] != value}
        return {"name": self.recipe, **({"changed": changed} if changed else {})}


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments

    def resolved(self) -> dict[str, Any]:
        """Returns all options by name, as JSON values."""
        return {**vars(self.model), **vars(self.data), **vars(self.lora), **self.training.to_sanitized_dict()}

    def changed(self) -> dict[str, Any]:
        """Returns the options that differ from transformers' defaults, for printing."""
        theirs = {name: str(value) for name, value in _THEIRS.items()}
        resolved = {name: str(value) for name, value in self.resolved().items()}
        return {
            name: value
            for name, value in resolved.items()
            if value not in ("None", "[]", theirs.get(name)) and name not in _NOT_SHOWN
        }


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


_THEIRS = {option.name: _default(option) for option in fields(transformers.TrainingArguments)}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MMRoleError(message, where="the command line", fix="see --help")


def parse_arguments(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Returns the options, and notices about old spellings. Joins the other processes of a distributed run.

    Raises:
        MMRoleError: A flag is unknown or missing, or has an invalid value.
        ProblemsError: Several such problems.
    """
    words, notices = modern_spelling(argv)
    words = [*recipe_flags(words), *words]
    kinds = (ModelArguments, DataArguments, TrainingArguments, LoraArguments)
    parser = _Parser(kinds, allow_abbrev=False, description=__doc__)
    namespace, unknown = parser.parse_known_args(words)
    raise_problems([*_unknown_flags(unknown, parser), *flag_problems(namespace)])
    try:
        parsed = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except (ValueError, NotImplementedError) as error:
        raise MMRoleError(str(error), where="the command line", fix="change the flag it names") from error
    return Options(*parsed), notices


def recipe_flags(words: Sequence[str]) -> list[str]:
    """Returns the flags of `--recipe`, which the user's flags override."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    recipe = RECIPES.get(parser.parse_known_args(list(words))[0].recipe, {})
    return [word for flag, value in recipe.items() for word in (f"--{flag}", str(value))]


def modern_spelling(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns a command line of the released scripts in current spelling, and a line about each change."""
    words: list[str] = []
    notices: list[str] = []
    skipping = False
    for word in argv:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            if not skipping:
                words.append(word)
            continue
        skipping = name in RETIRED
        if skipping:
            notices.append(f"{name} has no effect: {RETIRED[name]}")
        elif name in RENAMED:
            notices.append(f"{name} is now {RENAMED[name]}")
            words.append(RENAMED[name] + equals + value)
        else:
            words.append(word)
    return words, notices


def _unknown_flags(unknown: Sequence[str], parser: HfArgumentParser) -> list[MMRoleError]:
    known = [option for action in parser._actions for option in action.option_strings]
    problems = []
    for word in unknown:
        if successor := GONE.get(word.partition("=")[0]):
            fix = UNSUPPORTED[successor]
            problems.append(MMRoleError("this flag is not supported here", word, f"--{successor} today", fix))
            continue
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
        fix = f"did you mean {near[0]}?" if near else "see --help for all flags"
        problems.append(MMRoleError("no such flag, or a value too many", word, "the command line", fix))
    return problems


def flag_problems(flags: Namespace) -> list[MMRoleError]:
    """Returns the problems of flags, alone or together, before they are used.

    Args:
        flags: The flags of the command line, each value of its type.
    """
    problems = [
        MMRoleError("this flag is not supported here", f"--{name} {getattr(flags, name)}", f"--{name}", fix)
        for name, fix in UNSUPPORTED.items()
        if (value := getattr(flags, name, None)) not in (_THEIRS.get(name), "", [], None)
        and (value or _THEIRS.get(name) is True)
    ]
    problems += [problem for name in RANGES if (problem := _range_problem(name, getattr(flags, name, None)))]
    return problems + _folder_problems(flags) + _recipe_problems(flags) + _contradictions(flags)


def resumes(asked: object) -> bool:
    """Returns whether a value of `--resume_from_checkpoint` asks to resume."""
    return str(asked or "").lower() not in _NO


def _range_problem(name: str, value: Any) -> MMRoleError | None:
    if not isinstance(value, int | float):
        return None  # not given, or not parsed yet
    least, itself, end = RANGES[name]
    if least < value < end or (itself and value == least):
        return None
    range_ = f"{'from' if itself else 'above'} {least:g}" + (f" to below {end:g}" if end < math.inf else "")
    return MMRoleError("a flag has an invalid value", f"--{name} {value}", f"--{name}", f"give a number {range_}")


def _folder_problems(flags: Namespace) -> list[MMRoleError]:
    problems = []
    if flags.output_dir is None:
        problems.append(
            MMRoleError("no output folder is given", None, "--output_dir", "give the folder for checkpoints")
        )
    if isinstance(flags.deepspeed, str) and not Path(flags.deepspeed).is_file():
        fix = "use finetune/ds_config_zero2.json, ds_config_zero3.json or ds_config_zero3_offload.json"
        problems.append(MMRoleError("no such DeepSpeed config", flags.deepspeed, "--deepspeed", fix))
    return problems


def _recipe_problems(flags: Namespace) -> list[MMRoleError]:
    problems = []
    group = flags.loss_group
    if group not in ("micro", "step") and not (group.isdecimal() and int(group)):
        fix = "give a number from 1, 'micro' or 'step'"
        problems.append(MMRoleError("a flag has an invalid value", group, "--loss_group", fix))
    schedules = [WARMUP_LR, *(kind.value for kind in SchedulerType)]
    if flags.lr_scheduler_type not in schedules:
        fix = f"use one of {', '.join(schedules)}"
        problems.append(MMRoleError("no such schedule", flags.lr_scheduler_type, "--lr_scheduler_type", fix))
    if isinstance(flags.deepspeed, str) and Path(flags.deepspeed).is_file():
        problems += _deepspeed_problems(Path(flags.deepspeed))
    return problems


def _deepspeed_problems(config: Path) -> list[MMRoleError]:
    """Returns the blocks of a DeepSpeed config that would make transformers ignore flags silently."""
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
    resuming = resumes(flags.resume_from_checkpoint)

    def add(what: str, value: str, fix: str) -> None:
        problems.append(MMRoleError(what, value, "the command line", fix))

    if flags.fp16 and not flags.use_lora:
        add("full tuning in float16 overflows", "--fp16", "use --bf16 True, or neither for float32")
    if flags.overwrite_output_dir and resuming:
        add("a run cannot be both resumed and deleted", "--overwrite_output_dir", "give one of the two")
    if flags.save_only_model and resuming:
        fix = "leave out --save_only_model: its checkpoints hold no optimizer state and cannot be resumed from"
        add("a resumed run must be resumable again", "--save_only_model", fix)
    if flags.save_only_model and flags.resume_save_steps:
        fix = "give --resume_save_steps 0, or leave --save_only_model away"
        add("a checkpoint to resume from needs the optimizer's state", "--save_only_model", fix)
    if flags.eval_split and flags.eval_data_path:
        add("there are two sources of evaluation samples", "--eval_split and --eval_data_path", "give one of the two")
    given = "--eval_split" if flags.eval_split else "--eval_data_path"
    if (flags.eval_split or flags.eval_data_path) and not (_evaluates(flags) or flags.eval_on_start):
        add("there are samples to evaluate on, and no evaluation", given, "add --eval_strategy epoch, or remove it")
    if flags.early_stopping_patience and not flags.load_best_model_at_end:
        fix = "add --load_best_model_at_end True, with equal --eval_strategy and --save_strategy"
        add("early stopping has no best model to return", "--early_stopping_patience", fix)
    if flags.metric_for_best_model not in (None, "loss", "eval_loss") or flags.greater_is_better:
        value = f"--metric_for_best_model {flags.metric_for_best_model} --greater_is_better {flags.greater_is_better}"
        add("the best model is the one with the lowest loss", value, "remove the two")
    if flags.lr_scheduler_type == WARMUP_LR and flags.lr_scheduler_kwargs:
        add(f"{WARMUP_LR} has no further settings", "--lr_scheduler_kwargs", "remove it")
    if not flags.use_lora:
        changed = [f"--{one.name}" for one in fields(LoraArguments) if getattr(flags, one.name) != _default(one)]
        if changed and not flags.q_lora:  # which `q_lora_problems` reports
            add("settings of LoRA without --use_lora", ", ".join(changed), "add --use_lora True, or remove them")
    elif not flags.fix_vit:
        add("the vision tower cannot train beside adapters", "--fix_vit False", "remove it")
    if str(getattr(flags.save_strategy, "value", flags.save_strategy)) == "best":
        add("there is no best checkpoint here", "--save_strategy best", "give steps, epoch or no")
    return problems


def _evaluates(flags: Namespace) -> bool:
    return str(getattr(flags.eval_strategy, "value", flags.eval_strategy)) != "no"


def accumulation_steps(global_batch: int, micro_batch: int, processes: int, group: int = 1) -> int:
    """Returns the micro-batches that each process accumulates before an optimizer step.

    Args:
        global_batch: Samples of one optimizer step, over all processes.
        micro_batch: Samples of one forward pass of one process.
        processes: Processes, one a GPU.
        group: Samples of a loss group, of which the global batch must be a multiple.

    Raises:
        MMRoleError: The first three do not divide; says which values would.
    """
    at_once = micro_batch * processes
    if min(global_batch, micro_batch, processes) > 0 and global_batch % at_once == 0:
        return global_batch // at_once
    raise MMRoleError(
        "the global batch does not divide into whole micro-batches",
        f"global batch {global_batch}, micro-batch {micro_batch}, {processes} process(es)",
        "--global_batch_size (GLOBAL_BATCH), --per_device_train_batch_size (MICRO_BATCH), number of GPUs (PROCESSES)",
        "\n".join(_ways_out(global_batch, micro_batch, processes, group)),
    )


def _ways_out(global_batch: int, micro_batch: int, processes: int, group: int) -> list[str]:
    """Returns the changes that make it divide, one per line."""
    if min(global_batch, micro_batch, processes) <= 0:
        return ["give whole numbers above 0"]
    ways = dividing(global_batch, micro_batch, processes) if global_batch % group == 0 else []
    near = map(str, _multiples(global_batch, math.lcm(micro_batch * processes, group)))
    ways.append(f"global batch {' or '.join(near)} with both unchanged (no longer the paper's)")
    return ["any one of these divides:", *(f"  {way}" for way in ways)]


def dividing(global_batch: int, micro_batch: int, processes: int) -> list[str]:
    """Returns the micro-batches and the numbers of processes that divide a global batch; see `accumulation_steps`."""
    ways = []
    if global_batch % processes == 0:
        ways.append(f"micro-batch {_listed(_divisors(global_batch // processes))} with these {processes} process(es)")
    if global_batch % micro_batch == 0:
        ways.append(f"{_listed(_divisors(global_batch // micro_batch))} process(es) with this micro-batch")
    return ways or [f"{_listed(_divisors(global_batch))} process(es) and another micro-batch"]


def _multiples(size: int, unit: int) -> list[int]:
    """Returns the multiples of a number that are next to a size, those above 0."""
    below = size // unit * unit
    return [number for number in (below, below + unit) if number > 0]


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_MOST_LISTED]))
    return shown + (", …" if len(numbers) > _MOST_LISTED else "")
