"""The flags that answering and judging share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError
from data_utils.flag_types import positive
from data_utils.schema import Row
from eval.backends.backend import Backend, Decoding, add_backend_flags, misplaced_flags
from eval.running.inputs import Selection
from eval.running.journal import Settings
from eval.running.task import Task

ROOT = Path(__file__).resolve().parents[2]


def add_run_flags(parser: argparse.ArgumentParser, *, model_path: Path) -> None:
    """Add the flags of both scripts; the released ones keep their names."""
    flag = parser.add_argument
    flag("--model_path", type=Path, help=f"checkpoint folder, or a LoRA adapter's ({model_path})")
    add_backend_flags(parser)
    flag("--data_root", type=Path, default=ROOT, help="folder of data/ and images/ (%(default)s)")
    flag("--eval_dir", type=Path, default=ROOT / "eval", help="folder of the answers and reviews (%(default)s)")
    flag("--image_dir", type=Path, help="folder of the images (<data_root>/images)")
    flag("--input_dir", type=Path, help="read the .json files of this folder only; needs --output_dir")
    flag("--input_file", help="read this file of --input_dir only")
    flag("--output_dir", type=Path, help="the results of --input_dir are written here")
    flag("--processes", type=positive, help="worker processes (PROCESSES, else one per GPU)")
    flag("--limit", type=positive, help="at most so many rows of each file; a later run may continue with more")
    flag("--missing_image", choices=["error", "skip"], default="error", help="rows without image (%(default)s)")
    flag("--follow_links", action="store_true", help="allow links in the image folder that lead out of it")
    flag("--overwrite", action="store_true", help="discard existing results and start again")


def resolved(options: argparse.Namespace, *, model_path: Path) -> argparse.Namespace:
    """Return the flags with the defaults that depend on others filled in, and all paths absolute."""
    if not options.endpoint or options.as_qwen_vl:
        options.model_path = options.model_path or model_path
    options.image_dir = options.image_dir or options.data_root / "images"
    for name, value in vars(options).items():
        if isinstance(value, Path):
            setattr(options, name, value.absolute())
    return options


def flag_problems(options: argparse.Namespace) -> list[MMRoleError]:
    """Return contradictory flags and unusable variables; fills in PROCESSES."""
    problems = [*_variable_problems(options), *misplaced_flags(options)]
    if options.input_dir and not options.output_dir:
        fix = "give --output_dir for the results, or leave out --input_dir to use both test sets"
        return [*problems, MMRoleError("--input_dir needs --output_dir", options.input_dir, "--output_dir", fix)]
    if options.input_dir and options.agent:
        fix = "leave out --agent (AGENT): --output_dir says where the results go"
        problems.append(MMRoleError("--agent has no effect with --input_dir", options.agent, "--agent", fix))
    sampling = [name for name in ("temperature", "top_p") if getattr(options, name) is not None]
    if options.no_random and sampling and not getattr(options, "retries", 0):
        fix = "leave out one or the other"
        problems.append(MMRoleError("sampling flags have no effect in greedy decoding", sampling, "--no_random", fix))
    fix = "give --input_dir too, or --eval_dir for both test sets"
    return problems + [
        MMRoleError(f"{name} needs --input_dir", value, name, fix)
        for name, value in (("--input_file", options.input_file), ("--output_dir", options.output_dir))
        if value and not options.input_dir
    ]


def _variable_problems(options: argparse.Namespace) -> list[MMRoleError]:
    problems = []
    if (nodes := os.environ.get("NNODES", "1")) not in ("", "1"):
        fix = (
            "unset NNODES, and run a part of the files on each machine (--input_dir, --input_file, --output_dir), or "
            "serve the model on each and ask these endpoints"
        )
        problems.append(MMRoleError("answering and judging run on one machine", nodes, "NNODES", fix))
    if options.processes is None and (text := os.environ.get("PROCESSES")):
        try:
            options.processes = positive(text)
        except argparse.ArgumentTypeError:
            fix = "set it to such a number, or leave it out"
            problems.append(MMRoleError("this must be a whole number above 0", text, "PROCESSES", fix))
    return problems


def selection(options: argparse.Namespace, needs_image: Callable[[Row], bool]) -> Selection:
    """Return the rows that the flags select."""
    return Selection(
        image_dir=options.image_dir,
        skip_missing=options.missing_image == "skip",
        limit=options.limit,
        follow_links=options.follow_links,
        needs_image=needs_image,
        overwrite=options.overwrite,
    )


def run_settings(options: argparse.Namespace, task: Task, backend: Backend) -> Settings:
    """Return the settings of a run, from the flags and a backend without problems."""
    compared = {"task": task.name, "seed": options.seed, **Decoding.of(options).identity(), **backend.identity()}
    info = {
        "names": {"model": backend.describe()["model at"]},
        "options": {name: plain(value) for name, value in vars(options).items()},
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("torch", "transformers", "mmrole")},
    }
    return Settings(compared, info)


def plain(value: Any) -> Any:
    """Return a flag's value as a JSON value."""
    return str(value) if isinstance(value, Path) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
