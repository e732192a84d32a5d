"""All shell scripts run under `sh` too, and from any directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_house import SHELL, SOURCED, name_of

SCRIPTS = [path for path in SHELL if path.name not in SOURCED]
needs_dash = pytest.mark.skipif(shutil.which("dash") is None, reason="no dash here, the `sh` of Debian and Ubuntu")


@needs_dash
@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_sh_runs_a_script_with_bash(script: Path, tmp_path: Path) -> None:
    bash = tmp_path / "bash"
    bash.write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\n')
    bash.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["dash", script, "--a flag", "b"]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert result.stdout == f"<{script}>\n<--a flag>\n<b>\n"


@pytest.mark.parametrize("script", ["build_data.sh", "check_data.sh", "download_data.sh", "download_weights.sh"])
def test_another_data_utils_where_the_user_is_does_not_matter(script: str, tmp_path: Path) -> None:
    (tmp_path / "data_utils").mkdir()
    (tmp_path / "data_utils" / "__init__.py").write_text("raise SystemExit('another data_utils')")
    environ = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    environ.pop("PYTHONPATH", None)
    command = ["bash", ROOT / "scripts" / script, "--help"]
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: python -m data_utils." in result.stdout


def test_no_file_of_a_tool_hides_a_package() -> None:
    """The tools are started by path, so that Python looks into their folder first."""
    names = {path.stem for path in ROOT.glob("data_utils/*/*.py") if not path.stem.startswith("__")}
    assert not names & (sys.stdlib_module_names | packages_distributions().keys())


def test_tools_of_the_data_start_without_torch() -> None:
    """It takes seconds to import, and few of their settings need it."""
    tools = ["build", "characters", "check", "download", "export", "grow", "stats"]
    code = f"import sys, importlib\nfor tool in {tools}: importlib.import_module(f'data_utils.{{tool}}.__main__')\n"
    subprocess.run([sys.executable, "-c", f"{code}assert 'torch' not in sys.modules"], cwd=ROOT, check=True)
