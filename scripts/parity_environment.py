"""Makes the released code's environment, `.venv-reference`; quick when nothing changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_utils.errors import MMRoleError, run_main

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements-reference.txt"
FOLDER = ROOT / ".venv-reference"
CANDIDATES = ("python3.11", "python3.10", "python3", sys.executable)
SETTING = "PYTHON_FOR_REFERENCE"
# transformers 4.32's tokenizers has wheels up to Python 3.11; this project starts at 3.10.
FITS = "import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))"


def find_python(candidates: Sequence[str] | None = None) -> str:
    """Return the first Python 3.10 or 3.11 among `candidates` (default: `PYTHON_FOR_REFERENCE`, else the usual names).

    Raises:
        MMRoleError: There is none.
    """
    if candidates is None:
        candidates = os.environ.get(SETTING, "").split() or CANDIDATES
    for candidate in candidates:
        program = shutil.which(candidate)
        # pyenv puts names on the PATH that only report a missing Python, so each is tried.
        if program and not subprocess.run([program, "-c", FITS], capture_output=True, check=False).returncode:  # noqa: S603
            return program
    raise MMRoleError(
        "the released code needs Python 3.10 or 3.11, and neither was found",
        "tried: " + ", ".join(candidates),
        "your PATH",
        f"install Python 3.11, or name one: {SETTING}=/path/to/python3.11 bash scripts/parity.sh ...",
    )


def ensure_environment(folder: Path = FOLDER, requirements: Path = REQUIREMENTS) -> Path:
    """Return the interpreter of the environment in `folder`, which is made if it does not match `requirements`.

    Raises:
        MMRoleError: There is no suitable Python, or the packages cannot be installed.
    """
    python, stamp = folder / "bin" / "python", folder / "made-from.txt"
    if python.exists() and stamp.is_file() and stamp.read_text() == requirements.read_text():
        return python
    base = find_python()
    print(f"[parity] making {folder} with {base}: the released code's own packages, once", file=sys.stderr, flush=True)
    _run([base, "-m", "venv", "--clear", str(folder)], "on Debian or Ubuntu: sudo apt install python3-venv")
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    _run(
        [*install, "-r", str(requirements)],
        "connect to a network, or name a mirror or a folder of wheels (PIP_INDEX_URL, PIP_FIND_LINKS); then run the "
        "same command again",
    )
    stamp.write_text(requirements.read_text())
    return python


def _run(command: list[str], fix: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if subprocess.run(command, env=environ, stdout=sys.stderr, check=False).returncode:  # noqa: S603 - a list
        raise MMRoleError(
            "the released code's environment could not be made (the lines above say why)",
            " ".join(command),
            "requirements-reference.txt",
            fix,
        )


def main() -> None:
    """Print the interpreter of the environment."""
    print(ensure_environment())


if __name__ == "__main__":
    sys.exit(run_main(main))
