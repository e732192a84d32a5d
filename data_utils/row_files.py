"""Writes files of more rows than memory holds, one row after the other, and several files that belong together."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import discard, write_error
from data_utils.schema import Row

_MOST_PROBLEMS = 100


def write_rows(path: Path, rows: Iterable[Row], check: Sequence[MMRoleError] = ()) -> int:
    """Writes rows one by one in the published format, atomically: the bytes are those of `files.published_json`.

    Args:
        path: The file; its folder is made.
        rows: Samples; they need not fit into memory.
        check: Looked at before the file appears: if it holds problems by then, they are raised instead.

    Returns:
        How many rows there are.

    Raises:
        MMRoleError: The file cannot be written, or a text cannot; what was there before is unchanged.
    """
    path = Path(os.path.realpath(path))
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        count = _write(temporary, rows, check)
        temporary.replace(path)
    except OSError as error:
        raise write_error(path, error, "what was there before is unchanged") from error
    finally:
        discard(temporary)
    return count


def write_row_files(folder: Path, files: Mapping[str, Iterable[Row]]) -> int:
    """Writes files that belong together, as `write_rows` does: none of them appears before all are written.

    Args:
        folder: Where; it is made.
        files: Their rows by their names below it.

    Returns:
        How many rows there are in all.

    Raises:
        MMRoleError: They cannot be written, or a text cannot; a folder that was not there is still not there.
    """
    folder = Path(os.path.realpath(folder))
    # A folder that is there may be a disk of its own, or lie where one may not write.
    inside = folder.is_dir() and (folder.is_mount() or not os.access(folder.parent, os.W_OK))
    place = folder / folder.name if inside else folder
    staged = _temporary(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place)
        count = 0
        for name, rows in files.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            count += _write(staged / name, rows)
        if not folder.exists():
            staged.rename(folder)
            return count
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).replace(folder / name)
    except OSError as error:
        raise write_error(folder, error, "each file there is the old one or the whole new one") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return count


def first_problems(problems: Sequence[MMRoleError]) -> list[MMRoleError]:
    """The problems, or the first of very many and how many more there are."""
    more = len(problems) - _MOST_PROBLEMS
    rest = [MMRoleError(f"{more:,} more problems", fix="python -m data_utils.check shows all")] if more > 0 else []
    return [*problems[:_MOST_PROBLEMS], *rest]


def _write(path: Path, rows: Iterable[Row], check: Sequence[MMRoleError] = ()) -> int:
    count = 0
    with path.open("wb") as file:
        for count, row in enumerate(rows, 1):
            file.write(b"[\n    " if count == 1 else b",\n    ")
            file.write(_row_bytes(row))
        file.write(b"\n]" if count else b"[]")
        raise_problems(first_problems(check))
        file.flush()
        os.fsync(file.fileno())
    return count


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes left half-written of a file or folder."""
    form = re.compile(rf"\.{re.escape(path.name)}\.([1-9]\d*)\.tmp")
    with suppress(OSError):  # where they cannot be seen they can stay
        for other in path.parent.iterdir():
            found = form.fullmatch(other.name)
            if not found or _lives(int(found[1])):
                continue
            if other.is_dir() and not other.is_symlink():
                shutil.rmtree(other, ignore_errors=True)
            else:
                discard(other)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; or a number that is no process's
        return True
    return True


def _row_bytes(row: Row) -> bytes:
    text = json.dumps(row, ensure_ascii=False, indent=4)
    try:
        return text.replace("\n", "\n    ").encode("utf-8")
    except UnicodeEncodeError:
        fix = "remove or replace that character in the data"
        raise MMRoleError("a text holds half of a surrogate pair", None, f"sample {row['id']}", fix) from None
