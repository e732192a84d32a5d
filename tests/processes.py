"""Processes that leave nothing behind: several of one run, forked from the test, and commands with all they start."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from eval.running.console import unshare_progress_bars
from eval.running.team import run_script


class Processes:
    """`main`, run once in each of `size` processes that know each other; what they print goes to a file each.

    They are started as torchrun would, but without its seconds of imports.

    Args:
        main: What each of them does.
        size: How many.
        folder: Where their output goes.
    """

    def __init__(self, main: Callable[[], int], size: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / f"{rank}.txt" for rank in range(size)]
        names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        environment = dict(zip(names, (str(size), str(size), "127.0.0.1", free_port(), "1"), strict=True))
        # They and their children hold the other end of a pipe, which is at its end when the last of them is gone.
        self._last, held = multiprocessing.Pipe(duplex=False)
        self.pids = [self._start(main, rank, environment) for rank in range(size)]
        held.close()

    def children(self) -> list[int]:
        """The processes that do the work: the child of each of them that has one."""
        found = []
        for pid in self.pids:
            try:
                found += [child.pid for child in psutil.Process(pid).children()]
            except psutil.NoSuchProcess:
                continue
        return found

    def kill_all(self) -> None:
        """kill -9 of everything that has to do with this run, of which nothing is left then."""
        for pid in self.pids:
            kill(pid, signal.SIGSTOP)  # or it starts a child that is not seen here
        for pid in [*self.pids, *self.children()]:
            kill(pid)
        assert self._last.poll(60), "kill -9 does not end them"

    def wait(self, seconds: float = 60) -> list[int]:
        """The exit statuses, minus the signal where one was killed; once their children, who hold locks, are gone."""
        end = time.monotonic() + seconds
        statuses: dict[int, int] = {}
        while len(statuses) < len(self.pids) or not self._last.poll():
            for pid in self.pids:
                if pid not in statuses and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    statuses[pid] = os.waitstatus_to_exitcode(ended[1])
            if time.monotonic() > end:
                self.kill_all()
                raise AssertionError(f"still running after {seconds} s:\n{self.output()}")
            time.sleep(0.005)
        return [statuses[pid] for pid in self.pids]

    def output(self) -> str:
        """What all of them have printed, one after the other."""
        return "\n".join(path.read_text(errors="replace") for path in self._outputs)

    def _start(self, main: Callable[[], int], rank: int, environment: dict[str, str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 70
        try:
            output = os.open(self._outputs[rank], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            unshare_progress_bars()  # torchrun's processes share nothing with each other
            status = run_script(main)
        finally:
            if sys.exc_info()[0]:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def free_port() -> str:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


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
