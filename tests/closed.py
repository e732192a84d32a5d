"""Simulates unreadable folders, because root can read everything."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest


def close(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make `pathlib` treat a folder as after `chmod 000`."""

    def guard(name: str, *, itself: bool) -> None:
        real = getattr(Path, name)

        def guarded(path: Path, *arguments: Any, **more: Any) -> Any:
            if folder in path.parents or (itself and path == folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *arguments, **more)

        monkeypatch.setattr(Path, name, guarded)

    guard("stat", itself=False)
    guard("open", itself=False)
    guard("iterdir", itself=True)
