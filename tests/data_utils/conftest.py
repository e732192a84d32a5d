"""The server on loopback that downloads come from, and a data root to build from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_utils.demo.world import draw_world, write_world
from tests.data_utils.loopback import Site, serving, stay_at_home


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as found:
        yield found


@pytest.fixture
def hub_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    stay_at_home(monkeypatch)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A made-up data root, whose training samples are still to be built."""
    root = tmp_path / "world"
    write_world(draw_world(3), root)
    (root / "data/train/train_85k.json").unlink()
    return root
