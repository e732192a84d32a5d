"""The server on loopback that downloads come from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.data_utils.loopback import Site, serving, stay_at_home


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as found:
        yield found


@pytest.fixture
def hub_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    stay_at_home(monkeypatch)
