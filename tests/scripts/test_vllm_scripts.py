"""What the scripts for vLLM refuse before anything is downloaded or loaded; needs no vLLM."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Runs a script that must end before it makes or uses the environment: a folder that is not the script's."""
    environ = {**os.environ, "VLLM_VENV": str(tmp_path / "venv"), "MODEL_PATH": str(tmp_path / "venv")}
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "config.json").write_text("{}")

    def run(name: str, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", ROOT / "scripts" / name, *flags]
        return subprocess.run(command, env={**environ, **settings}, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("flags", "settings", "problem"),
    [
        (["--tests"], {}, "unknown option\nvalue:   --tests"),
        ([], {"VLLM_BUILD": "rocm"}, "no such build of vLLM"),
        ([], {"VLLM_VENV": f"{os.devnull}/venv"}, "the folder cannot be made"),
        ([], {}, "not made by this script"),
    ],
    ids=str,
)
def test_the_environment_is_not_made(script: Script, flags: list[str], settings: dict[str, str], problem: str) -> None:
    done = script("vllm_environment.sh", *flags, **settings)
    assert done.returncode == 2
    assert problem in done.stderr
    assert done.stdout == ""


def test_help_names_the_settings(script: Script) -> None:
    done = script("vllm_environment.sh", "--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("--test", "VLLM_BUILD", "VLLM_VENV", "PYTHON_FOR_VENV"))


@pytest.mark.parametrize("port", ["0", "65536", "eight"])
def test_no_port(script: Script, port: str) -> None:
    done = script("serve_vllm.sh", PORT=port)
    assert (done.returncode, "this is no port" in done.stderr) == (2, True)


@pytest.mark.parametrize("flags", [["--port", "8001"], ["--port=8001"]])
def test_the_port_is_a_setting(script: Script, flags: list[str]) -> None:
    """With the flag the script would wait for its own port, and never say that the server is ready."""
    done = script("serve_vllm.sh", *flags, PORT="65535")
    assert (done.returncode, "PORT=8001" in done.stderr) == (2, True)
