"""Several processes of one run, started as torchrun would, but forked from the test: without its seconds of imports."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil

from eval.progress import unshare_progress_bars
from eval.team import run_script


class Processes:
    """`main`, run once in each of `size` processes that know each other; what they print goes to a file each.

    Args:
        main: What each of them does.
        size: How many.
        folder: Where their output goes.
    """

    def __init__(self, main: Callable[[], int], size: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / f"{rank}.txt" for rank in range(size)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        environment = dict(zip(names, (str(size), str(size), "127.0.0.1", str(port), "1"), strict=True))
        self.pids = [self._start(main, rank, environment) for rank in range(size)]

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
        """kill -9 of everything that has to do with this run."""
        for pid in [*self.pids, *self.children()]:
            kill(pid)

    def wait(self, seconds: float = 60) -> list[int]:
        """The exit statuses; minus the signal for one that was killed."""
        end = time.monotonic() + seconds
        statuses: dict[int, int] = {}
        while len(statuses) < len(self.pids):
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


def kill(pid: int) -> None:
    """kill -9; the process may be gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
