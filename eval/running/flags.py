"""What answering and judging share at the command line: flags, settings, and the report at the end."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError, ProblemsError, four_parts, raise_problems, shown
from data_utils.schema import Row
from eval.backends.backend import Backend
from eval.backends.native import NativeBackend
from eval.backends.preflight import device_problems, generation_problems
from eval.running.flag_types import positive
from eval.running.inputs import Input, Selection
from eval.running.result_files import FileReport, ResultFile, Settings, State, inspect
from eval.running.team import is_first, local_rank, local_size
from qwen_vl.checkpoint import (
    CheckpointError,
    adapter_base,
    checkpoint_fingerprint,
    checkpoint_problems,
    is_adapter,
    weight_problems,
)

ROOT = Path(__file__).resolve().parents[2]
_SHOWN = 5  # reasons and samples of failures that are printed; the journal holds all
BackendFactory = Callable[[argparse.Namespace], Backend]


def add_run_flags(parser: argparse.ArgumentParser, *, model_path: Path) -> None:
    """Adds the flags that both scripts have; the released ones keep their names."""
    flag = parser.add_argument
    flag("--model_path", type=Path, default=model_path, help="checkpoint folder, or a LoRA adapter's (%(default)s)")
    flag(
        "--use_lora", action="store_true", help="the checkpoint must be a LoRA adapter (found out by itself otherwise)"
    )
    flag("--no_random", action="store_true", help="greedy decoding instead of sampling as the checkpoint says")
    flag("--data_root", type=Path, default=ROOT, help="folder of data/ and images/ (%(default)s)")
    flag("--eval_dir", type=Path, default=ROOT / "eval", help="folder of the answers and reviews (%(default)s)")
    flag("--image_dir", type=Path, help="folder of the images (<data_root>/images)")
    flag("--input_dir", type=Path, help="read the .json files of this folder only; needs --output_dir")
    flag("--input_file", help="read this file of --input_dir only")
    flag("--output_dir", type=Path, help="where the results of --input_dir go")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (%(default)s)")
    flag("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="(%(default)s: as stored)")
    flag(
        "--batch_size",
        type=positive,
        help="texts that each process writes at once (512 on a GPU, 256 on a CPU); in float32 it does not change them. "
        "In bfloat16 a batch rounds its products otherwise: 1, slow, is faithful to the bit to texts made one by one",
    )
    flag(
        "--max_batch_tokens",
        type=positive,
        help="tokens that each process holds in memory at once (what there is room for); changes no more than that",
    )
    flag("--max_new_tokens", type=positive, help="longest text in tokens (as the checkpoint says)")
    flag("--seed", type=int, default=0, help="every text's own seed is derived from it (%(default)s)")
    flag("--limit", type=positive, help="at most so many rows of each file; a later run may go on with more")
    flag("--missing_image", choices=["error", "skip"], default="error", help="rows without image (%(default)s)")
    flag("--follow_links", action="store_true", help="allow links in the image folder that lead out of it")
    flag("--overwrite", action="store_true", help="throw away what is there and begin anew")


def resolved(options: argparse.Namespace) -> argparse.Namespace:
    """Flags with the defaults that depend on others filled in, and all paths absolute."""
    options.image_dir = options.image_dir or options.data_root / "images"
    for name, value in vars(options).items():
        if isinstance(value, Path):
            setattr(options, name, value.absolute())
    return options


def native_backend(options: argparse.Namespace) -> Backend:
    """The engine that the flags ask for."""
    return NativeBackend(
        options.model_path,
        device=options.device,
        dtype=options.dtype,
        max_batch_tokens=options.max_batch_tokens,
        batch_size=options.batch_size,
        local_rank=local_rank(),
        local_size=local_size(),
    )


def flag_problems(options: argparse.Namespace) -> list[MMRoleError]:
    """Flags that do not go together."""
    if options.input_dir and not options.output_dir:
        fix = "say where the results go with --output_dir, or leave --input_dir away for both test sets"
        return [MMRoleError("--input_dir needs --output_dir", options.input_dir, "--output_dir", fix)]
    return [
        MMRoleError(f"{name} needs --input_dir", value, name, "give --input_dir too, or --eval_dir for both test sets")
        for name, value in (("--input_file", options.input_file), ("--output_dir", options.output_dir))
        if value and not options.input_dir
    ]


def selection(options: argparse.Namespace, needs_image: Callable[[Row], bool] = lambda row: True) -> Selection:
    """Which rows the flags ask for."""
    return Selection(
        image_dir=options.image_dir,
        skip_missing=options.missing_image == "skip",
        limit=options.limit,
        follow_links=options.follow_links,
        needs_image=needs_image,
        overwrite=options.overwrite,
    )


def run_settings(
    options: argparse.Namespace,
    task: str,
    *,
    attempts: int = 1,
    complaint: Callable[[str], str | None] = lambda text: None,
) -> Settings:
    """How texts are made, from the flags and the checkpoint, which must be complete.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
    """
    compared = {
        "task": task,
        "model": checkpoint_fingerprint(options.model_path),
        "decoding": "greedy" if options.no_random else "as the checkpoint says",
        "max_new_tokens": options.max_new_tokens or "as the checkpoint says",
        "dtype": options.dtype,
        "seed": options.seed,
    }
    info = {
        "names": {"model": str(options.model_path.resolve())},
        "options": {name: plain(value) for name, value in vars(options).items()},
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("torch", "transformers", "mmrole")},
    }
    do_sample = False if options.no_random else None
    return Settings(compared, info, options.seed, do_sample, options.max_new_tokens, attempts, complaint)


def check_run(
    options: argparse.Namespace,
    problems: list[MMRoleError],
    make_settings: Callable[[], Settings],
    files: Sequence[ResultFile],
) -> tuple[Settings, list[FileReport]]:
    """The last checks before a model is loaded: device and checkpoint; by the first process what is there of results.

    Args:
        options: The flags.
        problems: What was found wrong before.
        make_settings: Makes the settings; called only for a complete checkpoint.
        files: What is to be made.

    Raises:
        ProblemsError: If anything is wrong, with everything that is.
    """
    incomplete = four_parts(checkpoint_problems(options.model_path, use_lora=options.use_lora))
    wrong = [*problems, *device_problems(options.device), *incomplete]
    if incomplete:
        raise_problems(wrong)
    try:
        wrong += four_parts(weight_problems(options.model_path))
        wrong += generation_problems(
            options.model_path,
            greedy=options.no_random and not getattr(options, "retries", 0),  # what is asked again is sampled
            limit=options.max_new_tokens,
            batched=options.batch_size != 1,
        )
        settings = make_settings()
    except (MMRoleError, CheckpointError) as error:
        raise ProblemsError([*wrong, *four_parts([error])]) from error
    reports, conflicts = inspect(files, settings, overwrite=options.overwrite or not is_first())
    raise_problems([*wrong, *conflicts])
    return settings, reports


def print_options(options: argparse.Namespace, settings: Settings) -> None:
    """Prints the resolved options once."""
    told = {**settings.info["options"], "model fingerprint": settings.compared["model"]}
    if is_adapter(options.model_path):
        told["base model"] = str(adapter_base(options.model_path))
    for name, value in told.items():
        print(f"  {name}: {json.dumps(value, ensure_ascii=False)}", flush=True)


def print_report(
    reports: Sequence[FileReport],
    inputs: Sequence[Input],
    settings: Settings,
    *,
    notes: Callable[[FileReport], str],
    advice: str,
) -> int:
    """Tells what was made, where, and what failed.

    Args:
        reports: What became of each file.
        inputs: The inputs they were made from, in the same order.
        settings: How they were made.
        notes: What is to be told of a finished file beside its counts.
        advice: What to do about failures.

    Returns:
        The exit status: 0, or 1 if anything failed.
    """
    failed = 0
    for report, source in zip(reports, inputs, strict=True):
        failures = report.failures(settings)
        failed += len(failures)
        print(f"{report.file.target}: {_told(report, source, failures, notes)}")
        _print_failures(failures)
    if failed:
        print(f"{failed} failed: {advice}", file=sys.stderr)
    return 1 if failed else 0


def _print_failures(failures: Sequence[tuple[str, str]]) -> None:
    for reason, count in Counter(reason for _, reason in failures).most_common(_SHOWN):
        keys = [key for key, why in failures if why == reason]
        names = ", ".join(map(shown, keys[:_SHOWN])) + (", ..." if count > _SHOWN else "")
        print(f"  {count} failed: {shown(reason)}: {names}", file=sys.stderr)


def _told(
    report: FileReport, source: Input, failures: list[tuple[str, str]], notes: Callable[[FileReport], str]
) -> str:
    if report.state not in (State.OPEN, State.FINISHED):
        return report.state.value
    parts = [report.state.value] if report.state is State.FINISHED else []
    parts.append(f"{len(source.rows)} of {len(source.ids)} rows")
    if source.skipped:
        parts.append(f"{len(source.skipped)} left out for want of their image")
    if report.missing:
        parts.append(f"unfinished: {report.missing} of {len(report.file.units)} texts are missing")
    told = notes(report)
    return ", ".join([*parts, *([told] if told else []), f"{len(failures)} failed"])


def plain(value: Any) -> Any:
    """A flag's value as JSON can hold it."""
    return str(value) if isinstance(value, Path) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
