"""Proxies and mirrors that cannot work are named before anything is fetched."""

from __future__ import annotations

import importlib.util

import pytest

from data_utils.errors import MMRoleError
from data_utils.network import PROXIES, check_network_settings

pytestmark = pytest.mark.usefixtures("at_home")


@pytest.mark.parametrize("name", PROXIES)
def test_socks_proxy_names_the_packages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("socks", "socksio") else find_spec(n))
    monkeypatch.setenv(name, "socks5://127.0.0.1:1080")
    with pytest.raises(MMRoleError) as error:
        check_network_settings()
    for part in (name, "socks5://127.0.0.1:1080", 'pip install "httpx[socks]" "requests[socks]"'):
        assert part in str(error.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    check_network_settings()


def test_all_that_is_wrong_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("https_proxy", "ftp://proxy"), ("HF_ENDPOINT", "hf-mirror.com"), ("COCO_URL", "http://")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTP_PROXY", "proxy:3128")  # no scheme: every client takes it as http
    with pytest.raises(MMRoleError, match="3 problem") as error:
        check_network_settings(["HF_ENDPOINT", "COCO_URL"])
    assert all(name in str(error.value) for name in ("https_proxy", "HF_ENDPOINT=https://", "COCO_URL"))
    assert "HTTP_PROXY" not in str(error.value)
