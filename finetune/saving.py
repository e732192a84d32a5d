"""Saves that are whole or not there: written aside, opened again and checked, then renamed into place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import write_error, write_text
from finetune.report import TRAINING
from qwen_vl import QwenVLTokenizer
from qwen_vl.checkpoint import VOCAB_FILE, read_json_file

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
