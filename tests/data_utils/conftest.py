"""The server on loopback that tests download from and chat with, and a data root to build from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_utils.layout import TRAIN_FILE
from tests.data_utils.loopback import Site, serving, stay_at_home


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    stay_at_home(monkeypatch)


@pytest.fixture
def site(at_home: None) -> Iterator[Site]:
    with serving() as found:
        yield found


@pytest.fixture
def world(demo: Path, tmp_path: Path) -> Path:
    """A copy of the demo, whose training samples are still to be built."""
    root = Path(shutil.copytree(demo, tmp_path / "world"))
    (root / TRAIN_FILE).unlink()
    return root
