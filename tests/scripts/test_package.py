"""pyproject.toml: `pip install .` gives the packages whole."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import ROOT

PACKAGES = ("qwen_vl", "data_utils", "finetune", "eval", "web")


def test_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    """All but the shell scripts, which need the repository around them."""
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    settings = tmp_path / "setup.cfg"  # so that nothing is written into the repository
    settings.write_text(f"[build]\nbuild_base = {tmp_path}/build\n[egg_info]\negg_base = {tmp_path}\n")
    environ = {"DIST_EXTRA_CONFIG": str(settings), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".sh")
    }
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        requirements = archive.read(metadata).decode()
    results = ("eval/in-test_", "eval/out-test_", "eval/report/")
    assert inside == {name for name in files if not name.startswith(results)}
    assert "Requires-Dist: torch<2.14,>=2.11" in requirements
    assert "Provides-Extra: train" in requirements
