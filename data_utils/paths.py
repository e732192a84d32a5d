"""Looks at files and folders. An unreadable folder is an error here; for `Path.glob` it would be an empty one."""

from __future__ import annotations

import errno
import hashlib
import stat
from collections.abc import Callable
from pathlib import Path

from data_utils.errors import MMRoleError

_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class UnreadableError(MMRoleError):
    """A file or folder that cannot be read; the text is the same for everything in a closed folder."""


def is_there(path: Path) -> bool:
    """Return whether a path exists.

    Raises:
        UnreadableError: If a folder above it cannot be read.
    """
    return _is(lambda mode: True, path)


def is_folder(path: Path) -> bool:
    """Return whether there is such a folder.

    Raises:
        UnreadableError: If a folder above it cannot be read.
    """
    return _is(stat.S_ISDIR, path)


def is_file(path: Path) -> bool:
    """Return whether there is such a file.

    Raises:
        UnreadableError: If a folder above it cannot be read.
    """
    return _is(stat.S_ISREG, path)


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the content of a folder in order, without hidden files; nothing if there is no such folder.

    macOS puts a hidden `._x` beside each `x` on foreign disks.

    Args:
        folder: The folder.
        pattern: A pattern for the names.

    Raises:
        UnreadableError: If it cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.match(pattern))
    except OSError as error:
        if error.errno in _ABSENT:
            return []
        raise _unreadable(folder, error) from error


def sha256_of(path: Path) -> str | None:
    """Return the sha256 of a file's content, or None if there is no file.

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
        if error.errno in _ABSENT:
            return False
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UnreadableError:
    return UnreadableError(f"cannot read: {error.strerror}", _closed(path), fix="check its permissions")


def _closed(path: Path) -> Path:
    """Return the unreadable folder above a path, or the path itself."""
    for part in [*reversed(path.parents), path]:
        try:
            part.stat()
        except OSError:
            return part.parent
    return path
