"""Reads JSON files and writes files atomically: at any moment the old or the whole new content is in place."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError
from data_utils.paths import UnreadableError

Row = dict[str, Any]  # a record of a data file
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_json(path: str | Path, *, nan: bool = False) -> Any:
    """Return the content of a JSON file; a file of JSON lines gives the list of their values.

    A byte order mark, which Windows editors write, is skipped.

    Args:
        path: The file.
        nan: Also accept NaN and Infinity, which Python writes although JSON does not have them.

    Raises:
        UnreadableError: If the file is missing, not readable, not UTF-8 or not JSON (with line and column).
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return _parse(text, float if nan else _no_constant)
    except OSError as error:
        raise UnreadableError(
            f"cannot read the file: {error.strerror}", path, fix="check the path and its permissions"
        ) from None
    except UnicodeDecodeError as error:
        raise UnreadableError(
            "the file is not UTF-8 text", f"byte {error.object[error.start]:#04x}", f"{path}, byte {error.start}",
            "save it as UTF-8",
        ) from None  # fmt: skip
    except json.JSONDecodeError as error:
        line = error.doc.split("\n")[error.lineno - 1]
        near = line[max(0, error.colno - 30) : error.colno + 10]
        near = near if error.doc[error.pos :].strip() else "the file ends here"
        raise UnreadableError(
            f"the file is not valid JSON: {error.msg}", near, f"{path}, line {error.lineno}, column {error.colno}",
            "correct it there, or download or build the file again",
        ) from None  # fmt: skip
    except (ValueError, RecursionError) as error:
        fix = "download or build the file again"
        raise UnreadableError(f"the file is not valid JSON: {error}", path, fix=fix) from None


def _parse(text: str, constant: Callable[[str], Any]) -> Any:
    try:
        return json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        try:
            return [json.loads(line, parse_constant=constant) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError:
            raise error from None  # not JSON lines either


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def published_json(rows: Any) -> bytes:
    """Return the bytes of a published file: indented by four, not ASCII-escaped, no newline at the end.

    Raises:
        MMRoleError: If a text holds half of a surrogate pair, which no UTF-8 file can.
    """
    return _encoded(json.dumps(rows, ensure_ascii=False, indent=4), None)  # published: all files are written so


def _encoded(text: str, where: str | None) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 40) : error.start + 10]
        fix = "remove or replace that character in the data"
        raise MMRoleError("a text holds half of a surrogate pair", near, where, fix) from None


def write_json(path: str | Path, rows: Any) -> None:
    """Write rows in the published format, atomically; see `write_bytes`."""
    write_bytes(path, published_json(rows))


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically, newlines as they are; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file atomically and make its folder if needed.

    Raises:
        MMRoleError: If it cannot be written (disk full, no permission); the old content is then unchanged.
    """
    _write_chunks(Path(path), [data])


def write_rows(path: Path, rows: Iterable[Row], *, as_lines: bool = False) -> int:
    """Write more rows than memory holds in the published format, atomically; the bytes are those of `published_json`.

    Args:
        path: The file; its folder is made if needed.
        rows: Samples. An error that they raise leaves the old file unchanged.
        as_lines: Writes JSON lines instead, one row a line.

    Returns:
        The number of rows.

    Raises:
        MMRoleError: If the file or a text cannot be written; the old content is then unchanged.
    """
    count = 0

    def chunks() -> Iterator[bytes]:
        nonlocal count
        for count, row in enumerate(rows, 1):
            where = f"sample {row['id']}" if "id" in row else f"row {count}"
            if as_lines:
                yield _encoded(json.dumps(row, ensure_ascii=False) + "\n", where)
            else:
                text = json.dumps(row, ensure_ascii=False, indent=4).replace("\n", "\n    ")
                yield (b"[\n    " if count == 1 else b",\n    ") + _encoded(text, where)
        if not as_lines:
            yield b"\n]" if count else b"[]"

    _write_chunks(path, chunks())
    return count


def _write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error, "what was there before is unchanged") from error
    finally:
        _discard(temporary)


def make_folder(folder: Path, kept: str) -> None:
    """Make a folder and those above it.

    Args:
        folder: The folder.
        kept: What is not lost if it cannot be made, for the message.

    Raises:
        MMRoleError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error, kept) from error


def _discard(temporary: Path) -> None:
    """Remove a temporary file if there is one; failing to do so is no error."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def write_error(path: Path, error: OSError, kept: str) -> MMRoleError:
    """Return the four-part error for a file that could not be written."""
    fix = "free some space" if error.errno in _FULL else "check the folder and its permissions"
    return MMRoleError(f"cannot write: {error.strerror}", path, fix=f"{fix}, then run the same command again; {kept}")


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
