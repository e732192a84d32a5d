"""Checkpoints: saved atomically, verified, resumed from, pruned.

A checkpoint is written into a staging folder, opened again and compared with the model, and only then renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import read_json, write_text
from finetune.arguments import Options, dividing, resumes
from finetune.distributed import from_first
from finetune.report import TRAINING
from qwen_vl import QwenVLImageProcessor, QwenVLProcessor, QwenVLTokenizer
from qwen_vl.checkpoint import VOCAB_FILE, file_damages, missing_files, read_json_file

STAGING = ".saving"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"
LATEST = "latest"  # DeepSpeed's name of its current folder
_SHARD_SIZE = "5GB"
# Loaders read these first, so they are written last and removed first.
_ENTRANCES = ("config.json", "adapter_config.json")
_WEIGHTS = ("model*.safetensors*", "adapter_model*.safetensors*", "pytorch_model*.bin*")
# Only for resuming: DeepSpeed's shards and their names, optimizer, schedule and random states.
_RESUME_STATE = ("latest*", "global_step*", "zero_to_*.py", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "unexpected pos")  # parts of torch.save's messages
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8"}
# Settings of the learning rate that may change during a run, with a notice.
_SCHEDULE = ("learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "weight_decay")
# What decides the stream of samples and can be kept with another number of processes, and the flags that keep it.
_STREAM = {"samples a step": "--global_batch_size", "loss group": "--loss_group", "epochs filled to": "--fill_to"}

Expected = Mapping[str, tuple[list[int], str]]


# ---- save


def expected_tensors(model: torch.nn.Module, dtype: torch.dtype | None = None) -> dict[str, tuple[list[int], str]]:
    """Returns name, shape and dtype (as safetensors names it) of every tensor that a save of the model must hold.

    Args:
        model: A whole model, or one with adapters, of which only what trains is saved.
        dtype: The dtype that floating-point weights are saved in; None for no change.
    """
    adapted = hasattr(model, "peft_config")
    expected = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if adapted and not parameter.requires_grad:
            continue
        shape = list(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves the parameter itself empty
        kind = dtype if dtype and parameter.is_floating_point() else parameter.dtype
        if adapted:  # as peft names it in a file
            name = name.replace(".modules_to_save.default.", ".").replace(".default.", ".")
        expected[name] = (shape, _DTYPES[kind])
    return expected


def save_model(
    model: torch.nn.Module,
    tokenizer: QwenVLTokenizer,
    folder: Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a model, or its adapters, as a folder for `qwen_vl.load`.

    Args:
        model: With adapters, only they are written, with the tokenizer and the base's place.
        tokenizer: Saved along.
        folder: The folder to write.
        state_dict: The weights, if the model itself does not hold them all.
        dtype: The dtype of saved floating-point weights; None for no change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(state_dict) if state_dict is not None else dict(model.state_dict())
    if dtype is not None:
        weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    if hasattr(model, "peft_config"):
        # Whether embeddings are among them is decided by modules_to_save; peft would ask a server to find out.
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card
        # There is no config.json, by which AutoProcessor knows its class in a whole model's folder.
        image_size = model.get_base_model().config.visual["image_size"]
        QwenVLProcessor(QwenVLImageProcessor(image_size), tokenizer).save_pretrained(folder)
    else:
        use_cache, model.config.use_cache = model.config.use_cache, True  # off for training only
        model.save_pretrained(folder, state_dict=weights, max_shard_size=_SHARD_SIZE)
        model.config.use_cache = use_cache
        if dtype is not None:
            _name_dtype(folder / "config.json", dtype)
        tokenizer.save_pretrained(folder)  # and the base's code files
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / VOCAB_FILE).stat().st_mode)  # safetensors makes files readable for the owner only


def _name_dtype(file: Path, dtype: torch.dtype) -> None:
    """Writes the dtype of the saved weights into their config; transformers writes the model's."""
    name = str(dtype).removeprefix("torch.")
    config = read_json_file(file)
    config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_saved(folder: Path, expected: Expected) -> None:
    """Opens a save again and compares it with what it should hold.

    Args:
        folder: The save.
        expected: See `expected_tensors`.

    Raises:
        ProblemsError: Tensors are missing, of another shape or dtype, or a file is cut short.
    """

    def problem(what: str, value: object) -> MMRoleError:
        fix = "look for a full disk or a change of transformers, peft or DeepSpeed; older checkpoints are untouched"
        return MMRoleError(what, value, folder, fix)

    try:
        found = saved_tensors(folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise problem(f"the weights cannot be read again: {error}", folder) from error
    problems = [problem("a tensor is missing from the save", name) for name in expected.keys() - found.keys()]
    problems += [problem("the save has an unexpected tensor", name) for name in found.keys() - expected.keys()]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            (there, kind), (shape, wanted) = found[name], expected[name]
            value = f"{name}: {kind} {there} instead of {wanted} {shape}"
            problems.append(problem("a tensor of the save differs from the trained one", value))
    raise_problems(problems)


def saved_tensors(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Returns name, shape and dtype of every tensor in a folder's safetensors files; no weights are read."""
    indices = list(folder.glob("*.safetensors.index.json"))
    names = {name for index in indices for name in read_json_file(index)["weight_map"].values()}
    found = {}
    for file in [folder / name for name in sorted(names)] or sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                tensor = weights.get_slice(name)
                found[name] = (list(tensor.get_shape()), tensor.get_dtype())
    return found


def copy_model(checkpoint: Path, staged: Path) -> None:
    """Copies the model of a checkpoint, without what belongs to the run that wrote it."""
    left_out = shutil.ignore_patterns(*_RESUME_STATE, STATE, TRAINING, "loss.png")
    shutil.copytree(checkpoint, staged, ignore=left_out)


def publish_folder(staged: Path, target: Path) -> None:
    """Renames a finished folder into place, replacing one of that name."""
    _sync(staged)
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    _sync(target.parent, files=False)


def publish_files(staged: Path, target: Path) -> None:
    """Moves the files of a finished folder into another one; those that make it loadable come last."""
    _sync(staged)
    target.mkdir(parents=True, exist_ok=True)
    fresh = {file.name for file in staged.iterdir()}
    stale = [target / name for name in _ENTRANCES if (target / name).exists()]
    stale += [file for pattern in _WEIGHTS for file in target.glob(pattern) if file.name not in fresh]
    for file in stale:
        file.unlink()
    for file in sorted(staged.iterdir(), key=lambda file: file.name in _ENTRANCES):
        file.replace(target / file.name)
    _sync(target, files=False)
    staged.rmdir()


def _sync(folder: Path, *, files: bool = True) -> None:
    """Waits until a folder and its files are on the disk."""
    paths = [file for file in folder.rglob("*") if file.is_file()] if files else []
    for path in [*paths, folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def writing(staging: Path) -> Iterator[None]:
    """Turns write errors into an MMRoleError, and removes what was written.

    Raises:
        MMRoleError: The disk is full, or it cannot be written there; or as the body raises.
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
        fix = "free some space or correct the folder's permissions, then resume with --resume_from_checkpoint auto"
        what = f"the save cannot be written: {getattr(error, 'strerror', None) or error}"
        raise MMRoleError(what, staging, staging.parent, f"{fix}; older checkpoints are untouched") from error


@contextmanager
def lock(output_dir: Path) -> Iterator[None]:
    """Locks an output folder against other trainings; the lock ends with the process.

    Raises:
        MMRoleError: Another training is running in it.
    """
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for it, stop it, or give another --output_dir (OUTPUT_DIR)"
            raise MMRoleError("another training runs in the output folder", output_dir, "--output_dir", fix) from None
        except OSError:
            pass  # some network file systems cannot lock folders
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # the loader's workers may have the folder open for longer
        os.close(descriptor)


# ---- list and prune


def checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, by step."""
    folders = [path for path in output_dir.iterdir() if path.is_dir()] if output_dir.is_dir() else []
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in folders]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def prune(
    output_dir: Path,
    keep: int | None,
    newest: Path,
    *,
    resume_state_of_newest_only: bool,
    best: Path | None = None,
) -> None:
    """Deletes what newer checkpoints have made superfluous.

    Args:
        output_dir: The run's output folder.
        keep: The number of checkpoints to keep, the newest ones; None keeps all.
        newest: The checkpoint written last. It is kept even if others have later steps, because a run may have been
            resumed from an earlier one.
        best: The checkpoint with the lowest evaluation loss, which is kept too.
        resume_state_of_newest_only: Whether others lose their optimizer state, and are deleted if saved only for it.
    """
    others = [path for path in checkpoints(output_dir) if path != newest]
    if resume_state_of_newest_only:
        for folder in list(others):
            if folder != best and not report_of(folder).get("kept", True):
                shutil.rmtree(folder)
                others.remove(folder)
                continue
            for path in [found for pattern in _RESUME_STATE for found in folder.glob(pattern)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if keep:
        for path in others[: max(len(others) + 1 - keep, 0)]:
            if path != best:
                shutil.rmtree(path)


# ---- verify


def verify(folder: Path, processes: int) -> list[str]:
    """Returns the missing and damaged parts of a checkpoint, one per line; nothing if a run can be resumed from it.

    Sizes and headers are checked, no weights are read.

    Args:
        folder: The checkpoint.
        processes: The present number of processes. If another number wrote it, its random states are not used.
    """
    if not folder.is_dir():
        return ["there is no such folder"]
    try:
        identity = report_of(folder).get("identity", {})
        steps_done(folder)
        found = [f"{name}: missing" for name in missing_files(folder)]
    except (MMRoleError, ValueError) as error:
        where = str(getattr(error, "where", None) or STATE).partition(",")[
            0
        ]  # a JSON error has the line number after it
        return [f"{Path(where).name}: {getattr(error, 'what', error)}"]
    ranks = range(identity.get("processes", 1))
    files = [*sorted(path.name for path in folder.glob("*.safetensors")), "scheduler.pt"]
    if len(ranks) == processes:
        files += ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    stage = identity.get("ZeRO stage", 0)
    if not stage:
        files.append("optimizer.pt")
    elif not (folder / LATEST).is_file():
        files.append(LATEST)
    else:
        shards = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        files += [f"{shards}/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks]
        models = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in ranks] if stage == 3 else ["mp_rank_00"]
        files += [f"{shards}/{name}_model_states.pt" for name in models]
    for name in files:
        there = sorted(folder.glob(name))
        found += [] if there else [f"{Path(name).name.removeprefix('*')}: missing"]
        found += [f"{file.name}: {damage}" for file in there for damage, _ in file_damages(file)]
    return found


def report_of(folder: Path) -> dict[str, Any]:
    """Returns what a checkpoint's `training.json` says; nothing, if another trainer wrote the checkpoint.

    Raises:
        MMRoleError: It cannot be read, or does not hold what a run writes.
    """
    if not (folder / TRAINING).is_file():
        return {}
    content = read_json(folder / TRAINING)
    if isinstance(content, dict):
        identity = content.get("identity", {})
        parts = [identity, *(content.get(name, {}) for name in ("options", "data", "base"))]
        if all(isinstance(part, dict) for part in parts):
            numbers = [identity.get("processes", 1), identity.get("ZeRO stage", 0)]
            if all(isinstance(number, int) for number in numbers):
                return content
    raise MMRoleError("the report of the run has a wrong form", type(content).__name__, folder / TRAINING)


def processes_of(folder: Path, default: int) -> int:
    """Returns the number of processes that wrote a checkpoint.

    Args:
        folder: The checkpoint.
        default: What to return if it does not say.
    """
    return report_of(folder).get("identity", {}).get("processes", default)


def steps_done(folder: Path) -> int:
    """Returns the optimizer steps of the run that wrote a folder.

    Raises:
        ValueError: Its trainer's state is missing, or has a wrong form.
    """
    try:
        steps = TrainerState.load_from_json(str(folder / STATE)).global_step
    except FileNotFoundError:
        raise ValueError("missing") from None
    except (OSError, TypeError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(steps, int):
        raise ValueError("names no step")
    return steps


# ---- resume


def checkpoint_to_resume(options: Options) -> Path | None:
    """Returns the checkpoint for `--resume_from_checkpoint`; None to start from the base.

    "auto" (and "True", as the released flag was a bool) is the newest undamaged one, or none if there is no checkpoint.
    The first process decides for all.

    Raises:
        MMRoleError: There is no such checkpoint, or it is damaged; on every process.
    """
    answer: Any = None
    if options.training.process_index == 0:
        try:
            answer = _chosen(options)
        except MMRoleError as error:
            answer = error
    answer = from_first(answer)
    if isinstance(answer, MMRoleError):
        raise answer
    return answer


def _chosen(options: Options) -> Path | None:
    training = options.training
    asked = str(training.resume_from_checkpoint or "")
    if not resumes(asked):
        return None
    there = checkpoints(Path(training.output_dir))
    if asked.lower() in ("auto", "true", "1", "yes"):
        damaged = []
        for folder in reversed(there):
            if not (found := verify(folder, training.world_size)):
                for line in damaged:
                    print(f"{line}; resuming from the one before, {folder.name}", file=sys.stderr)
                return folder
            damaged.append(f"{folder.name} is damaged or holds no optimizer state ({', '.join(found)})")
        if not damaged:
            return None
        fix = "give --overwrite_output_dir to start from the base, or another --output_dir"
        raise MMRoleError("the run has no checkpoint to resume from", damaged, training.output_dir, fix)
    folder = Path(asked)
    if found := verify(folder, training.world_size):
        names = [path.name for path in there if path != folder]
        fix = f"give one of {names} below {training.output_dir}, or auto for the last" if names else "leave the flag"
        what = "this checkpoint is damaged or holds no optimizer state" if folder.is_dir() else "no such checkpoint"
        raise MMRoleError(what, found if folder.is_dir() else folder, f"--resume_from_checkpoint {folder}", fix)
    return folder


def identity(options: Options) -> dict[str, Any]:
    """Returns what must be equal to resume from a checkpoint (but for the processes): what decides what is learned."""
    training, lora, data = options.training, options.lora, options.data
    adapters = {"LoRA alpha": lora.lora_alpha, "LoRA dropout": lora.lora_dropout, "LoRA bias": lora.lora_bias}
    adapters["LoRA base"] = "four bits" if lora.q_lora else "as it is"
    order = training.order(1)
    return {
        "processes": training.world_size,
        "ZeRO stage": training.zero_stage,
        "samples a step": training.samples_per_step,
        "loss group": training.group_size,
        "epochs filled to": order.multiple,
        "weight decay of": "every weight" if training.decay_all else "what transformers chooses",
        "LoRA": f"r {lora.lora_r} on {', '.join(lora.lora_target_modules)}" if training.use_lora else "no",
        **(adapters if training.use_lora else {}),
        "vision tower": "frozen" if training.fix_vit or training.use_lora else "trained",
        "precision": "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32",
        "longest sample": training.model_max_length,
        "system message": "each sample's own" if data.use_sample_system else "the published one",
        "held out for evaluation": data.eval_split,
        "order": "sequential" if training.sequential else f"permuted each epoch by seed {order.seed}",
    }


def resume_problems(folder: Path, options: Options) -> list[MMRoleError]:
    """Returns the reasons why a run cannot be resumed from a checkpoint.

    Args:
        folder: The checkpoint.
        options: The command line.
    """
    now = identity(options)
    if found := verify(folder, now["processes"]):
        fix = "every node needs the checkpoint's files: put the output folder on a file system that they share"
        return [MMRoleError("this checkpoint is damaged", found, folder, fix)]
    there = report_of(folder).get("identity", {})
    changed = [key for key in now if key != "processes" and key in there and there[key] != now[key]]
    if not changed:
        return []
    fix = "run with the same settings as before"
    if flags := [f"{flag} {there[key]}" for key, flag in _STREAM.items() if key in changed]:
        fix = f"run with the same samples a step as before: {' '.join(flags)}"
        micro = options.training.per_device_train_batch_size
        batch = there.get("samples a step", now["samples a step"])
        if batch % (micro * now["processes"]):
            fix += f"; that divides with {' or '.join(dividing(batch, micro, now['processes']))}"
    lines = [f"{key}: {there[key]} there, {now[key]} now" for key in changed]
    ways = _ways_out(fix, folder, adapter=now["LoRA"] != "no")
    return [MMRoleError("the checkpoint was written under other settings", lines, folder, ways)]


def origin_problems(folder: Path, now: Mapping[str, Mapping[str, str]], *, adapter: bool) -> list[MMRoleError]:
    """Returns a problem for other data or another base than the checkpoint came from.

    Args:
        folder: The checkpoint.
        now: The present run's `finetune.preflight.Checked.fingerprints`.
        adapter: Whether it holds LoRA adapters.
    """
    there, problems = report_of(folder), []
    for name, prints in now.items():
        before = there.get(name, prints)
        key = next(key for key in prints if key != "path")
        if before.get(key) != prints[key]:
            both = ((before, "then"), (prints, "now"))
            lines = [f"{one.get('path')} ({key} {str(one.get(key))[:16]}) {when}" for one, when in both]
            fix = _ways_out(f"give the {name} that it began with", folder, adapter=adapter)
            problems.append(MMRoleError(f"the checkpoint began with other {name}", lines, folder, fix))
    return problems


def schedule_notice(folder: Path, options: Options) -> str | None:
    """Returns a line about a schedule that differs from the checkpoint's; None if it does not.

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
    kept = "the checkpoint's peak learning rate and weight decay are kept, the rest follows the flags"
    return f"the schedule is not the checkpoint's: {'; '.join(changes)} ({kept})"


def is_finished(output: Path, resume: Path, steps: int) -> bool:
    """Returns whether a run has done its steps, or stopped early, and saved what it trained; such a run needs no model.

    Args:
        output: The output folder.
        resume: The checkpoint to resume from.
        steps: The steps of the whole run.
    """
    try:
        done = min(steps_done(resume), steps_done(output))
        told = report_of(output)
        finished = told.get("state") == "finished" and bool(saved_tensors(output))
    except (OSError, ValueError, SafetensorError, MMRoleError):
        return False
    return finished and (done >= steps or bool(told.get("stopped_early")))


def _ways_out(same: str, folder: Path, *, adapter: bool) -> str:
    if adapter:
        anew = f"  scripts/merge_lora.py {folder} MERGED merges it first, then --model_name_or_path MERGED"
    else:
        anew = f"  --model_name_or_path {folder}"
    return (
        f"{same},\nor begin again from the weights of that checkpoint, without its optimizer and schedule:\n"
        f"{anew} --output_dir ANOTHER, without --resume_from_checkpoint"
    )
