"""The command line: the released flags, in today's spelling of transformers, and the few that are ours."""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, NoReturn

import torch
import transformers
from transformers import HfArgumentParser

from data_utils.errors import MMRoleError, raise_problems
from finetune.batch_size import accumulation_steps
from finetune.data import Order
from finetune.early import given_values
from finetune.flag_values import WARMUP_LR, flag_problems

# Spellings of transformers 4 that today's no longer knows.
RENAMED = {
    "--evaluation_strategy": "--eval_strategy",
    "--warmup_ratio": "--warmup_steps",  # below 1 it means a share of all steps
    "--no_cuda": "--use_cpu",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "--per_device_eval_batch_size",
}
# Flags that once decided something and no longer do, with why.
RETIRED = {
    "--lazy_preprocess": "samples are always made when they are needed",
    "--cache_dir": "weights are read from the folder that is given",
    "--save_safetensors": "weights are always saved as safetensors",
    "--logging_dir": "tensorboard writes below the output folder",
    "--lora_weight_path": "it had no effect in the released trainer either",
}
# published: what the two released scripts train with: on 8 GPUs (`fill_to`), micro-batches of 8 and 4 (`loss_group`).
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
# What says nothing to people: values that others give already, or that are of no use here.
_UNTOLD = {"accelerator_config", "hub_token", "push_to_hub_token", "train_batch_size", "eval_batch_size"}


@dataclass
class ModelArguments:
    """Which model is tuned."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint folder to start from; not downloaded."})


@dataclass
class DataArguments:
    """What it is tuned on."""

    data_path: str = field(metadata={"help": "Training samples, a JSON file."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Samples for --eval_strategy steps or epoch."})
    data_root: str = field(
        default=".", metadata={"help": "Folder from which the image paths in the samples count (working directory)."}
    )
    use_sample_system: bool = field(
        default=False, metadata={"help": "Use each sample's own system message instead of the published one."}
    )


@dataclass
class LoraArguments:
    """How adapters are made, with `--use_lora`."""

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
    packing: bool = field(
        default=True, metadata={"help": "Samples of a micro-batch one after the other, without padding."}
    )
    sequential: bool = field(default=False, metadata={"help": "Samples in the order of the file, not shuffled."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints of an earlier run in the output folder."}
    )

    def __post_init__(self) -> None:
        if self.global_batch_size is not None:
            # Before anything reads it: the DeepSpeed config is filled in from it below.
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            self.gradient_accumulation_steps = accumulation_steps(
                self.global_batch_size, self.per_device_train_batch_size, processes
            )
        schedule, self.train_sampling_strategy = self.lr_scheduler_type, "sequential"  # of the stream's positions
        if schedule == WARMUP_LR:
            self.lr_scheduler_type = "constant"  # what transformers knows and reads nothing into
        if hasattr(self, "activation_checkpointing") and self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)  # the newer name of the same
        self.remove_unused_columns = False  # sample ids travel with a batch, to be named in errors
        self.logging_nan_inf_filter = False  # a loss that is not finite stops the run instead
        self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        _settle_devices(self)
        super().__post_init__()
        if schedule == WARMUP_LR:
            self.lr_scheduler_type = schedule
        if self.samples_per_step % self.group_size:
            raise _group_error(self.samples_per_step, self.group_size)
        if self.use_cpu and self.deepspeed:
            _join_deepspeed()
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

    def order(self, samples: int) -> Order:
        """The stream in which so many samples train."""
        return Order(
            samples,
            multiple=self.fill_to or self.per_device_train_batch_size * self.world_size,
            step=self.samples_per_step,
            epochs=self.num_train_epochs,
            max_steps=self.max_steps,
            seed=None if self.sequential else self.seed if self.data_seed is None else self.data_seed,
        )

    def recipe_used(self) -> dict[str, Any]:
        """The released script whose settings these are, and which of them are others."""
        if self.recipe is None:
            return {"name": None}
        now = {name: getattr(self, name) for name in RECIPES[self.recipe]}
        now = {name: getattr(value, "value", value) for name, value in now.items()}
        changed = {name: now[name] for name, value in RECIPES[self.recipe].items() if now[name] != value}
        return {"name": self.recipe, **({"changed": changed} if changed else {})}


@dataclass(frozen=True)
class Options:
    """Everything the command line says."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments

    def resolved(self) -> dict[str, Any]:
        """All options by name, as JSON can hold them."""
        return {**vars(self.model), **vars(self.data), **vars(self.lora), **self.training.to_sanitized_dict()}

    def told(self) -> dict[str, Any]:
        """The options that are not transformers' defaults, for people."""
        theirs = {f.name: str(_default(f)) for f in fields(transformers.TrainingArguments)}
        resolved = {name: str(value) for name, value in self.resolved().items()}
        return {
            name: value
            for name, value in resolved.items()
            if value not in ("None", "[]", theirs.get(name)) and name not in _UNTOLD
        }


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MMRoleError(message, where="the command line", fix="see --help")


def parse_arguments(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The options, and what is to be told about old spellings. Joins the other processes of a distributed run.

    Raises:
        MMRoleError: A flag is unknown, missing, or its value cannot be.
        ProblemsError: Several such.
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
    """The flags that `--recipe` stands for; what the user gives comes after them and counts."""
    names = [word for word in given_values(words, "--recipe") if word in RECIPES]
    return [word for name in names for flag, value in RECIPES[name].items() for word in (f"--{flag}", str(value))]


def modern_spelling(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line of the released scripts in today's spelling, and a line about each change."""
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
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
        fix = f"did you mean {near[0]}?" if near else "see --help for all flags"
        problems.append(MMRoleError("no such flag, or a value too many", word, "the command line", fix))
    return problems


def _group_error(step: int, group: int) -> MMRoleError:
    below = step // group * group
    fits = [str(size) for size in (below, below + group) if size > 0]
    return MMRoleError(
        "the global batch is no multiple of the loss group",
        f"global batch {step}, groups of {group} samples",
        "--global_batch_size (GLOBAL_BATCH), --loss_group",
        f"give a global batch of {' or '.join(fits)}, or --loss_group step",
    )


def _settle_devices(arguments: TrainingArguments) -> None:
    """CPU and gloo where there is no GPU; and a group of one where DeepSpeed runs without a launcher."""
    if not torch.cuda.is_available():
        arguments.use_cpu = True
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it finds that out itself
    if arguments.deepspeed and "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    if arguments.use_cpu and "RANK" in os.environ:
        arguments.ddp_backend = "gloo"
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or accelerate warns


def _join_deepspeed() -> None:
    """Lets DeepSpeed know of the group of CPU processes, which transformers joins without it."""
    import deepspeed

    # DeepSpeed would compile an exchange of its own; gloo's is there without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
