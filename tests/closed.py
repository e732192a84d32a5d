"""Folders without permission, which root has to make believe."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest


def close(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Lets `pathlib` meet a folder as `chmod 000` leaves it for all but root."""

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
