"""Checks of scripts/parity.py before a model is loaded: the checkpoint, the code in it, and the report's path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_utils.errors import MMRoleError, four_parts, raise_problems
from qwen_vl.checkpoint import adapter_base, checkpoint_problems, is_adapter, read_json_file

CODE = {"config.json": ("AutoConfig", "AutoModelForCausalLM"), "tokenizer_config.json": ("AutoTokenizer",)}
AGAIN = "put the .py and .json files that came with the weights (of Qwen/Qwen-VL-Chat) beside them"


def check(folder: Path, *, code: bool, report: Path | None) -> None:
    """Report everything that would stop a run, at once.

    Args:
        folder: The checkpoint.
        code: Whether the released code in it will run.
        report: The file for a report, if any.

    Raises:
        ProblemsError: There is at least one problem.
    """
    problems = [] if report is None else _report_problems(report)
    incomplete = four_parts(checkpoint_problems(folder, flag="CHECKPOINT"))
    problems += incomplete
    if code and not incomplete:
        problems += code_problems(model_folder(folder))
    raise_problems(problems)


def model_folder(folder: Path) -> Path:
    """Return the folder with the model and its code: the given one, or an adapter's base.

    Raises:
        CheckpointError: The adapter does not name its base.
    """
    return adapter_base(folder) if is_adapter(folder) else folder


def code_problems(folder: Path) -> list[MMRoleError]:
    """Yield what is missing of the released code in `folder`: a file that names it, or the code itself."""
    return [problem for file, names in CODE.items() for problem in _missing_code(folder, file, names)]


def _missing_code(folder: Path, file: str, names: Sequence[str]) -> Iterator[MMRoleError]:
    try:
        auto_map = read_json_file(folder / file).get("auto_map") if (folder / file).is_file() else None
    except (OSError, ValueError) as error:
        yield MMRoleError("the released code cannot be found: the file names none", str(error), folder / file, AGAIN)
        return
    for name in names:
        reference = auto_map.get(name) if isinstance(auto_map, dict) else None
        reference = reference[0] if isinstance(reference, list) and reference else reference
        module = f"{reference.partition('.')[0]}.py" if isinstance(reference, str) else None
        if module is None or not (folder / module).is_file():
            what = "there is no released code to compare with in this folder"
            yield MMRoleError(what, f"{name}: {reference or 'not named'}", folder / (module or file), AGAIN)


def _report_problems(report: Path) -> list[MMRoleError]:
    place = Path(os.path.realpath(report))
    if place.exists() and not place.is_file():
        what = "the report must be a file"
    elif not place.parent.is_dir():
        what = "the report's folder does not exist"
    elif not os.access(place.parent, os.W_OK | os.X_OK):
        what = "the report's folder cannot be written to"
    else:
        return []
    return [MMRoleError(what, report, "--report", "name a file in an existing folder with write permission")]
