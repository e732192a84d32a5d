"""How scripts/parity.py keeps the released code off the network: by the kernel where it can, else by Python alone."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OPTIONS = ("--user", "--map-root-user", "--net")
NAMESPACE = "/proc/self/ns/net"
# Run in there. Root of another user namespace may be refused what root could read: then it is of no use.
TRIAL = f"""
import os, sys
outside, *files = sys.argv[1:]
for file in files:
    open(file, "rb").close()
sys.exit("it is the network of this machine" if os.readlink({NAMESPACE!r}) == outside else 0)
"""
BY_KERNEL = "the released code has none: the kernel holds it in a network namespace of its own, with nothing in it"
BY_PYTHON = (
    "ONLY A HOOK IN PYTHON keeps the released code off it, and code that goes around Python (ctypes, torch's own "
    "sockets) is not stopped: no network namespace can be had here ({reason})"
)


@dataclass(frozen=True)
class Guard:
    """What keeps a program off the network.

    Attributes:
        launcher: What its command begins with; empty where the kernel does nothing.
        told: A line on who keeps it off, for people.
    """

    launcher: tuple[str, ...]
    told: str


def find_guard(python: str, files: Sequence[Path]) -> Guard:
    """The best guard that works on this machine, found by a trial.

    Args:
        python: The interpreter that is to run behind it.
        files: What has to be readable there.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        return Guard((), BY_PYTHON.format(reason="there is no program `unshare`"))
    launcher = (unshare, *OPTIONS)
    outside = str(Path(NAMESPACE).readlink())
    trial = subprocess.run(  # noqa: S603 - a list, no shell
        [*launcher, python, "-I", "-c", TRIAL, outside, *map(str, files)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if trial.returncode:
        lines = trial.stderr.strip().splitlines() or [f"exit status {trial.returncode}"]
        return Guard((), BY_PYTHON.format(reason=lines[-1]))
    return Guard(launcher, BY_KERNEL)
