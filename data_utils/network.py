"""Checks the environment variables for proxies and mirrors before anything uses them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from data_utils.errors import MMRoleError, raise_problems

PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "https_proxy", "http_proxy")
SOCKS_PACKAGES = '"httpx[socks]" "requests[socks]"'
_SOCKS_MODULES = ("socksio", "socks")  # of httpx (the Hugging Face Hub, OpenAI), and of requests


def check_network_settings(addresses: Sequence[str] = ()) -> None:
    """Refuse proxy and mirror variables that cannot work.

    Args:
        addresses: Names of the variables that hold the address of a server, such as "HF_ENDPOINT".

    Raises:
        ProblemsError: Variables are wrong; every one is reported.
    """
    raise_problems([problem for name in (*PROXIES, *addresses) if (problem := _problem(name))])


def _problem(name: str) -> MMRoleError | None:
    value = os.environ.get(name, "")
    scheme = value.partition("://")[0].lower() if "://" in value else ""
    if not value:
        return None
    if name not in PROXIES:
        if scheme in ("http", "https") and urlsplit(value).hostname:
            return None
        return MMRoleError("this is not the address of a server", value, name, f"set {name}=https://HOST, or unset it")
    if scheme not in ("", "http", "https", "socks5", "socks5h"):
        return MMRoleError(
            "proxies of this kind are not supported", value, name,
            f"set {name} to http://HOST:PORT or socks5://HOST:PORT, or unset it",
        )  # fmt: skip
    if scheme.startswith("socks") and not all(importlib.util.find_spec(module) for module in _SOCKS_MODULES):
        return MMRoleError(
            "a SOCKS proxy needs packages that are not installed", value, name,
            f"pip install {SOCKS_PACKAGES}, or unset {name}",
        )  # fmt: skip
    return None
