"""Checkpoints: written aside, checked and renamed into place; verified and chosen to resume from; pruned."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import read_json, write_error, write_text
from finetune.arguments import Options, resumes
from finetune.report import TRAINING
from qwen_vl import QwenVLTokenizer
from qwen_vl.checkpoint import VOCAB_FILE, CheckpointError, file_damages, missing_files, read_json_file

STAGING = ".saving"
_ASIDE = ".old"
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "unexpected pos")  # parts of what torch.save says
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
SHARD_SIZE = "5GB"
# Read first by whoever loads a folder; so they are put there last and taken away first.
_ENTRANCES = ("config.json", "adapter_config.json")
_WEIGHTS = ("model*.safetensors*", "adapter_model*.safetensors*", "pytorch_model*.bin*")
# What only a resume reads: DeepSpeed's shards and its note of them, optimizer, schedule and random states.
_RESUME_STATE = ("latest", "global_step*", "zero_to_fp32.py", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8"}

Expected = Mapping[str, tuple[list[int], str]]


def expected_tensors(model: torch.nn.Module, dtype: torch.dtype | None = None) -> dict[str, tuple[list[int], str]]:
    """Name, shape and dtype (as safetensors names it) of every tensor that a save of the model must hold.

    Args:
        model: A whole model, or one with adapters, of which only what trains is saved.
        dtype: What floating-point weights are cast to when they are saved; None for what they are.
    """
    adapted = hasattr(model, "peft_config")
    expected = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if adapted and not parameter.requires_grad:
            continue
        shape = list(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves the parameter itself empty
        kind = dtype if dtype and parameter.is_floating_point() else parameter.dtype
        expected[_saved_name(name) if adapted else name] = (shape, _DTYPES[kind])
    return expected


def _saved_name(name: str) -> str:
    """The name that peft gives an adapter's parameter in a file."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def save_model(
    model: torch.nn.Module,
    tokenizer: QwenVLTokenizer,
    folder: Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a model, or its adapters, as a folder that `qwen_vl.load` takes as it is.

    Args:
        model: With adapters, only they are written, with the tokenizer and the base's place.
        tokenizer: Saved along.
        folder: Where to.
        state_dict: The weights, where the model itself does not hold them all.
        dtype: What to cast floating-point weights to; None for what they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(state_dict) if state_dict is not None else dict(model.state_dict())
    if dtype is not None:
        weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    if hasattr(model, "peft_config"):
        # Whether embeddings are among them is decided by modules_to_save; peft would ask a server to find out.
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card
    else:
        use_cache, model.config.use_cache = model.config.use_cache, True  # off for training only
        model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
        model.config.use_cache = use_cache
        if dtype is not None:
            _name_dtype(folder / "config.json", dtype)
    tokenizer.save_pretrained(folder)  # and the base's code files
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / VOCAB_FILE).stat().st_mode)  # safetensors lets only the owner read


def _name_dtype(file: Path, dtype: torch.dtype) -> None:
    """Lets a config name the dtype of the weights beside it; transformers writes the model's own."""
    name = str(dtype).removeprefix("torch.")
    config = read_json_file(file)
    config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_saved(folder: Path, expected: Expected) -> None:
    """Opens a save again and compares it with what should be in it.

    Args:
        folder: The save.
        expected: See `expected_tensors`.

    Raises:
        ProblemsError: Tensors are missing, of another shape or dtype, or a file is cut short.
    """
    try:
        found = saved_tensors(folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise_problems([_broken(f"the weights cannot be read again: {error}", folder, folder)])
    problems = [_broken("a tensor is missing from the save", name, folder) for name in expected.keys() - found.keys()]
    problems += [_broken("the save has a tensor too many", name, folder) for name in found.keys() - expected.keys()]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            told = f"{name}: {_told(found[name])} instead of {_told(expected[name])}"
            problems.append(_broken("a tensor of the save is not what was trained", told, folder))
    raise_problems(problems)


def saved_tensors(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Name, shape and dtype of every tensor in a folder's safetensors files; no weight is read."""
    indices = list(folder.glob("*.safetensors.index.json"))
    names = {name for index in indices for name in read_json_file(index)["weight_map"].values()}
    found = {}
    for file in [folder / name for name in sorted(names)] or sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                tensor = weights.get_slice(name)
                found[name] = (list(tensor.get_shape()), tensor.get_dtype())
    return found


def publish_folder(staged: Path, target: Path) -> None:
    """Puts a finished folder into place; one of that name is kept aside until it is there."""
    sync_files(staged)
    aside = _aside(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    staged.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover_published(output_dir: Path) -> None:
    """Puts checkpoints back that a run was killed in the middle of replacing.

    Raises:
        MMRoleError: It cannot be written there.
    """
    for aside in [path for path in _folders(output_dir) if path.name.endswith(_ASIDE)]:
        target = aside.with_name(aside.name.removeprefix(".").removesuffix(_ASIDE))
        if not CHECKPOINT.fullmatch(target.name) or aside != _aside(target):
            continue
        try:
            if target.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(target)
        except OSError as error:
            raise write_error(target, error, "the checkpoint lies beside it, in a hidden folder") from error


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}{_ASIDE}")


@contextmanager
def writing(staging: Path) -> Iterator[None]:
    """Tells what keeps a save from being written, and takes away what was written of it.

    Raises:
        MMRoleError: The disk is full, or it cannot be written there; or as what is done raises.
    """
    try:
        yield
    except MMRoleError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _TORCH_CANNOT_WRITE):
            raise
        shutil.rmtree(staging, ignore_errors=True)
        fix = "free some space or see to the folder's permissions, then go on with --resume_from_checkpoint auto"
        what = f"the save cannot be written: {getattr(error, 'strerror', None) or error}"
        raise MMRoleError(what, staging, staging.parent, f"{fix}; the checkpoints before are untouched") from error


def publish_files(staged: Path, target: Path) -> None:
    """Moves the files of a finished folder into one that holds other things too; what makes it loadable comes last."""
    sync_files(staged)
    target.mkdir(parents=True, exist_ok=True)
    fresh = {file.name for file in staged.iterdir()}
    stale = [target / name for name in _ENTRANCES if (target / name).exists()]
    stale += [file for pattern in _WEIGHTS for file in target.glob(pattern) if file.name not in fresh]
    for file in stale:
        file.unlink()
    for file in sorted(staged.iterdir(), key=lambda file: file.name in _ENTRANCES):
        file.replace(target / file.name)
    sync_folder(target)
    staged.rmdir()


def sync_files(folder: Path) -> None:
    """Waits until the files of a folder are on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, by step."""
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in _folders(output_dir)]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def drop_checkpoints(output_dir: Path, keep: int | None, last: Path | None = None) -> None:
    """Deletes the oldest checkpoints, all but so many.

    Args:
        output_dir: The run's output folder.
        keep: How many stay; None keeps all.
        last: What was written last. It stays, even if some are of later steps: a run may go on from an earlier one.
    """
    if keep is None or keep <= 0:
        return
    others = [path for path in checkpoints(output_dir) if path != last]
    for path in others[: max(len(others) - keep + bool(last), 0)]:
        shutil.rmtree(path)


def drop_resume_state(output_dir: Path, newest: Path) -> None:
    """Leaves optimizer state in the newest checkpoint only; deletes older ones that were saved to resume from.

    Args:
        output_dir: The run's output folder.
        newest: The checkpoint written last.
    """
    for folder in checkpoints(output_dir):
        if folder == newest:
            continue
        if not read_json_file(folder / TRAINING).get("kept", True):
            shutil.rmtree(folder)
            continue
        for file in [found for pattern in _RESUME_STATE for found in folder.glob(pattern)]:
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def _folders(folder: Path) -> Iterable[Path]:
    return (path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()


def _told(tensor: tuple[list[int], str]) -> str:
    return f"{tensor[1]} {tensor[0]}"


def _broken(what: str, value: object, folder: Path) -> MMRoleError:
    fix = "look for a full disk or a change of transformers, peft or DeepSpeed; the checkpoints before are untouched"
    return MMRoleError(what, value, folder, fix)


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
    """Under which settings a checkpoint was written, as `identity` names them.

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
    return [f"{name}: missing" for name in missing] + _file_list_damages(weights)


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
        found += _file_list_damages(files)
    return found


def _file_list_damages(files: Iterable[Path]) -> list[str]:
    return [f"{file.name}: {damage}" for file in files for damage, _ in file_damages(file)]


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
