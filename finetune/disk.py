"""The output folder before a run: whether another run is in it, it can be written, and a save fits."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from data_utils.errors import MMRoleError
from finetune.arguments import Options, TrainingArguments
from finetune.flag_values import resumes
from finetune.lora import adapter_weights, is_chat_model
from finetune.model import freeze, parameter_counts, weight_dtype
from finetune.saving import checkpoints
from qwen_vl import QwenVLForCausalLM

FLAG = "--output_dir"
_ADAM, _ADAM_AND_COPY = 8, 12  # bytes a weight: two moments, and DeepSpeed's own copy in float32


@dataclass(frozen=True)
class Room:
    """Bytes that a run's saves take, and that are free.

    Attributes:
        checkpoint: A checkpoint takes, 0 if none is written.
        finished: The finished model takes.
        free: There are; an earlier run's checkpoints that are to be deleted count.
    """

    checkpoint: int
    finished: int
    free: int

    def told(self) -> str:
        """One line for people."""
        saves = f"a checkpoint takes about {_size(self.checkpoint)}, " if self.checkpoint else ""
        return f"{saves}the finished model {_size(self.finished)}; {_size(self.free)} are free"


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def output_problems(training: TrainingArguments) -> list[MMRoleError]:
    """An output folder that cannot be written, or has another run in it unless the flags say what to do with that.

    Args:
        training: Its flags.
    """
    folder = Path(training.output_dir)
    problems = _writing_problems(folder)
    there = checkpoints(folder)
    if there and not training.overwrite_output_dir and not resumes(training.resume_from_checkpoint):
        fix = "give --resume_from_checkpoint auto to go on with it, another --output_dir, or --overwrite_output_dir"
        problems.append(MMRoleError("the output folder has a run in it already", there[-1].name, folder, fix))
    return problems


def room(options: Options, model: QwenVLForCausalLM) -> Room:
    """What the run's saves will take at least, by the sizes of what trains, and what there is.

    Args:
        options: The command line.
        model: The base's `finetune.base_checks.outline`; what is frozen is marked in it.
    """
    training, kind = options.training, weight_dtype(options.training)
    if training.use_lora:
        trained = adapter_weights(model, options.lora) + _whole_modules(options, model)
        weights = finished = trained * (kind.itemsize if training.deepspeed else torch.float32.itemsize)
    else:
        freeze(model, training)
        trained, total = parameter_counts(model)
        weights, finished = total * kind.itemsize, total * (torch.bfloat16 if training.bf16 else kind).itemsize
    state = _ADAM_AND_COPY if training.deepspeed else _ADAM
    adam = str(getattr(training.optim, "value", training.optim)).startswith("adamw_torch")
    checkpoint = weights + trained * state * adam * (not training.save_only_model)
    saves = str(getattr(training.save_strategy, "value", training.save_strategy)) != "no"
    return Room(checkpoint * saves, finished, _free(training))


def room_problems(found: Room, output_dir: str) -> list[MMRoleError]:
    """A disk on which a first checkpoint and the finished model do not fit.

    Args:
        found: See `room`.
        output_dir: The output folder.
    """
    if found.free >= found.checkpoint + found.finished:
        return []
    fix = f"free some space, give another {FLAG}, or write less with --save_only_model or --save_strategy no"
    return [MMRoleError("the disk has no room for what the run saves", found.told(), output_dir, fix)]


def _whole_modules(options: Options, model: QwenVLForCausalLM) -> int:
    """Weights of embedding and head, where LoRA trains them whole."""
    if options.lora.q_lora or is_chat_model(options.model.model_name_or_path):
        return 0
    return model.transformer.wte.weight.numel() + model.lm_head.weight.numel()


def _writing_problems(folder: Path) -> list[MMRoleError]:
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"\0")
    except OSError as error:
        told = f"nothing can be written there: {error.strerror}"
        return [MMRoleError(told, folder, place, f"see to the folder and its permissions, or give another {FLAG}")]
    return []


def _free(training: TrainingArguments) -> int:
    folder = Path(training.output_dir)
    old = [file for path in checkpoints(folder) for file in path.rglob("*")] if training.overwrite_output_dir else []
    freed = sum(file.stat().st_size for file in old if file.is_file())
    return shutil.disk_usage(_existing(folder)).free + freed


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next((path for path in (folder, *folder.resolve().parents) if path.exists()), Path.cwd())
