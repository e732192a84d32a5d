"""Tiny wheels, and a build backend that makes one: real pip can be run on them without a network."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path


def write_wheel(folder: Path, name: str, version: str, *headers: str) -> str:
    """Writes a wheel with one empty module; `headers` are further lines of its METADATA. Returns the file's name."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *headers, ""]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: stub\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    wheel = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder) / wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def build_editable(wheel_directory: str, config_settings: object = None, metadata_directory: object = None) -> str:
    """PEP 660: what pip calls for `-e .`; reads the packages as `scripts/setup.sh` does, one a line."""
    headers, extra = [], ""
    for line in Path("pyproject.toml").read_text().splitlines():
        if found := re.match(r"(\w+) = \[$", line):
            extra = "" if found[1] == "dependencies" else found[1]
            headers += [f"Provides-Extra: {extra}"] if extra else []
        elif found := re.match(r' +"(.+)",$', line):
            headers.append(f"Requires-Dist: {found[1]}" + (f'; extra == "{extra}"' if extra else ""))
    return write_wheel(Path(wheel_directory), "mmrole", "0.1.0", *headers)
