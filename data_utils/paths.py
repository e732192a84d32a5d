"""What is there. What may not be looked at is an error here, and not, as for `Path.glob`, the same as nothing there."""

from __future__ import annotations

import errno
import hashlib
import stat
from collections.abc import Callable
from pathlib import Path

from data_utils.errors import MMRoleError

SHOWN = "[!.]*"  # macOS puts a hidden ._x beside each x on foreign disks
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class UnreadableError(MMRoleError):
    """A folder or file that may not be read; its text is the same for all that lies in a closed folder."""


def is_there(path: Path) -> bool:
    """Whether there is anything of that name.

    Raises:
        UnreadableError: If that may not be seen.
    """
    return _is(lambda mode: True, path)


def is_folder(path: Path) -> bool:
    """Whether there is such a folder.

    Raises:
        UnreadableError: If that may not be seen.
    """
    return _is(stat.S_ISDIR, path)


def is_file(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        UnreadableError: If that may not be seen.
    """
    return _is(stat.S_ISREG, path)


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder, in order; nothing if there is no such folder.

    Args:
        folder: Which.
        pattern: What the names must match.

    Raises:
        UnreadableError: If it may not be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.match(pattern))
    except OSError as error:
        if error.errno in _NOT_THERE:
            return []
        raise _unreadable(folder, error) from error


def sha256_of(path: Path) -> str | None:
    """The sha256 of a file's content, or None where there is no file.

    Raises:
        MMRoleError: If it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except _NO_FILE:
        return None
    except OSError as error:
        raise MMRoleError(f"cannot read the file: {error.strerror}", path, fix="check its permissions") from error


def _is(kind: Callable[[int], bool], path: Path) -> bool:
    try:
        return kind(path.stat().st_mode)
    except ValueError:  # a name with a null byte
        return False
    except OSError as error:
        if error.errno in _NOT_THERE:
            return False
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UnreadableError:
    return UnreadableError(f"cannot read: {error.strerror}", _closed(path), fix="check its permissions")


def _closed(path: Path) -> Path:
    """The folder on the way to a path that nobody may enter, or the path itself."""
    for part in [*reversed(path.parents), path]:
        try:
            part.stat()
        except OSError:
            return part.parent
    return path
