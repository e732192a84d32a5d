"""Processes that leave nothing behind: one that dies at a given moment, and commands with all they start."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil


def killed_at(moment: int, main: Callable[[], int]) -> int:
    """Runs `main` in a child that dies in the middle of a write; see `kill_at`. Returns its status, as `subprocess`."""
    child = os.fork()
    if not child:
        try:
            with Path(os.devnull).open("w") as nowhere:
                sys.stdout = sys.stderr = nowhere
                kill_at(moment)
                os._exit(main())
        finally:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(count: int) -> None:
    """Lets this process die at its `count`-th write, temporary file or renaming, what it writes being half done."""
    left = [count]
    write, replace, fsync = os.write, Path.replace, os.fsync

    def die_in_time() -> bool:
        left[0] -= 1
        return left[0] == 0

    def dying_write(descriptor: int, data: Any) -> int:
        if die_in_time():
            write(descriptor, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    def dying_replace(path: Path, target: Path) -> Path:
        if die_in_time():
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    def dying_fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".tmp" and die_in_time():
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.write, Path.replace, os.fsync = dying_write, dying_replace, dying_fsync


@contextlib.contextmanager
def reserved_port() -> Iterator[str]:
    """A port of loopback at which a server may listen, and which the system gives to nobody else in the meantime."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield str(held.getsockname()[1])


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """kill -9, or another signal; the process may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def run_group(command: Sequence[object], seconds: float, **more: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run`, after which nothing runs on, also where it takes too long: `timeout` ends the launcher only."""
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True, **more}
    with subprocess.Popen([str(word) for word in command], **more) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        finally:
            _end(process)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _end(process: subprocess.Popen[str]) -> None:
    """Of the group, and of what torchrun starts, which is in groups of its own."""
    started = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
