"""Writes files of more rows than memory holds, one row after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for count, row in enumerate(rows, 1):
                file.write(b"[\n    " if count == 1 else b",\n    ")
                file.write(_row_bytes(row))
            file.write(b"\n]" if count else b"[]")
            raise_problems(first_problems(check))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise write_error(path, error, "what was there before is unchanged") from error
    finally:
        discard(temporary)
    return count


def first_problems(problems: Sequence[MMRoleError]) -> list[MMRoleError]:
    """The problems, or the first of very many and how many more there are."""
    more = len(problems) - _MOST_PROBLEMS
    rest = [MMRoleError(f"{more:,} more problems", fix="python -m data_utils.check shows all")] if more > 0 else []
    return [*problems[:_MOST_PROBLEMS], *rest]


def _row_bytes(row: Row) -> bytes:
    text = json.dumps(row, ensure_ascii=False, indent=4)
    try:
        return text.replace("\n", "\n    ").encode("utf-8")
    except UnicodeEncodeError:
        fix = "remove or replace that character in the data"
        raise MMRoleError("a text holds half of a surrogate pair", None, f"sample {row['id']}", fix) from None
