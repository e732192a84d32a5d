"""Resuming a sharded run with another number of processes, through DeepSpeed's universal checkpoints.

DeepSpeed's converter writes one beside the shards. It serves one resume and is removed as soon as all processes have
loaded it, so that the rest of a killed conversion is never used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from data_utils.errors import MMRoleError
from data_utils.files import write_text
from finetune.checkpoints import LATEST, processes_of
from finetune.distributed import from_first, raise_together
from finetune.report import size

if TYPE_CHECKING:
    from finetune.arguments import TrainingArguments

LATEST_UNIVERSAL = "latest_universal"  # DeepSpeed's note of which converted folder counts
CONVERTER = "deepspeed.checkpoint.ds_to_universal"
_ADAMW = ("adamw_torch", "adamw_torch_fused")  # the optimizers whose state the converter knows
_MOST_WORKERS = 4


def is_needed(checkpoint: Path, training: TrainingArguments) -> bool:
    """Returns whether a checkpoint must be converted to be resumed from with the present number of processes."""
    return training.zero_stage > 0 and processes_of(checkpoint, training.world_size) != training.world_size


def problems(checkpoint: Path, training: TrainingArguments) -> list[MMRoleError]:
    """Returns the reasons why a checkpoint cannot be converted."""
    optimizer, found = str(getattr(training.optim, "value", training.optim)), []
    before = processes_of(checkpoint, training.world_size)
    if optimizer not in _ADAMW:
        fix = f"resume with {before} process(es); only the state of {' and '.join(_ADAMW)} can be converted"
        what = "the state of this optimizer cannot be spread over another number of processes"
        found.append(MMRoleError(what, optimizer, "--optim", fix))
    needed, free = _bytes_needed(checkpoint, training.zero_stage), shutil.disk_usage(checkpoint).free
    if free < needed:
        fix = f"free some space, or resume with {before} process(es), which needs no conversion"
        what = f"the disk has no room to convert the checkpoint from {before} to {training.world_size} process(es)"
        found.append(MMRoleError(what, f"{size(needed)} are needed, {size(free)} are free", checkpoint, fix))
    return found


def _bytes_needed(checkpoint: Path, stage: int) -> int:
    """Returns the disk space of a conversion: the optimizer's state in pieces and merged, and the model's state."""
    shards = _shards(checkpoint)
    optimizer, model = (
        sum(file.stat().st_size for file in shards.glob(f"*_{kind}_states.pt")) for kind in ("optim", "model")
    )
    # Of ZeRO-2 the converter writes what is frozen in float32 too.
    return 2 * optimizer + (1 if stage == 3 else 3) * model


def _shards(checkpoint: Path) -> Path:
    return checkpoint / (checkpoint / LATEST).read_text(encoding="utf-8").strip()


def convert(checkpoint: Path, training: TrainingArguments) -> None:
    """Converts a checkpoint in the first process, and lets DeepSpeed load the result; all processes must call it.

    The other processes poll for its end, because a collective would time out.

    Args:
        checkpoint: A checkpoint without `problems`.
        training: The training flags, whose DeepSpeed config is changed.

    Raises:
        ProblemsError: The converter failed.
    """
    first, partial, found = training.process_index == 0, None, []
    if first:
        partial = Path(tempfile.mkdtemp(prefix=f"{_shards(checkpoint).name}.", dir=checkpoint))
    partial = from_first(partial)
    if first:
        try:
            _convert(checkpoint, training, partial)
        except MMRoleError as error:
            found = [error]
        finally:
            shutil.rmtree(partial)
    while partial.exists():
        time.sleep(1)
    raise_together(found)
    training.hf_deepspeed_config.config.setdefault("checkpoint", {})["load_universal"] = True


def _convert(checkpoint: Path, training: TrainingArguments, partial: Path) -> None:
    before, now, began = processes_of(checkpoint, 1), training.world_size, time.perf_counter()
    space = size(_bytes_needed(checkpoint, training.zero_stage))
    print(f"converting {checkpoint} from {before} to {now} process(es): up to {space} on its disk", flush=True)
    shards, converted = _shards(checkpoint).resolve(), partial.resolve() / "converted"
    # A worker holds one process's file and a copy of a part of it.
    largest = max(file.stat().st_size for file in shards.glob("*_optim_states.pt"))
    workers = min(_MOST_WORKERS, os.cpu_count() or 1, psutil.virtual_memory().available // (2 * largest))
    workers = str(max(1, workers))
    command = [sys.executable, "-m", CONVERTER, "--input_folder", shards, "--output_folder", converted]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    errors = None if sys.stderr.isatty() else subprocess.PIPE  # progress bars
    done = subprocess.run(  # noqa: S603 - a list, no shell
        [str(word) for word in command],
        cwd=partial,  # empty, because the user's folder may hold a module of that name
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=errors,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stderr or "").strip().splitlines()[-1:] or ["see above"]
        fix = f"look for a full disk or too little memory, or resume with {before} process(es)"
        what = f"DeepSpeed's converter of checkpoints ended with status {done.returncode}"
        raise MMRoleError(what, said[0], checkpoint, fix)
    target = checkpoint / f"{shards.name}.universal"
    converted.rename(target)
    write_text(checkpoint / LATEST_UNIVERSAL, target.name)
    taken = size(sum(file.stat().st_size for file in target.rglob("*") if file.is_file()))
    print(f"converted in {time.perf_counter() - began:.0f} seconds; {taken}, removed once they are loaded", flush=True)


def remove(checkpoint: Path) -> None:
    """Removes what a conversion made, or left when it was killed."""
    (checkpoint / LATEST_UNIVERSAL).unlink(missing_ok=True)
    for folder in checkpoint.glob("global_step*.*"):
        shutil.rmtree(folder)


def mend(optimizer: torch.optim.Optimizer) -> None:
    """Restores what DeepSpeed lets all groups share when it loads a universal checkpoint into ZeRO-3.

    They have one counter of steps, which each would increment, and the weight decay of the first.

    Args:
        optimizer: The one inside DeepSpeed's.
    """
    for group in optimizer.param_groups[1:]:
        group["weight_decay"] = 0.0  # transformers' second group is of the weights that do not decay
    on_device = any(optimizer.param_groups[0].get(name) for name in ("fused", "capturable"))
    for parameter, state in optimizer.state.items():
        state["step"] = state["step"].to(parameter.device if on_device else "cpu", copy=True)
