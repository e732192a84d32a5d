"""The processes of one run: which one this is, what they tell each other, and a child of each that may die alone.

They are started by torchrun (`torch.distributed.run`), which says by environment variables who is who, and stops all
processes when one ends badly. So the work is done in a child of each: when a child dies, its parent reports it, and
the others finish. There is no process group: beside the result files, which lie on a file system that all nodes share,
a few words through torchrun's key-value store are enough.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import psutil

from data_utils.console import go_on_unread
from data_utils.errors import MMRoleError, ProblemsError, run_main, shown
from eval.running.console import unshare_progress_bars

if TYPE_CHECKING:
    from torch.distributed import Store

STATUS_FILE, LAUNCHER = "MMROLE_STATUS_FILE", "MMROLE_LAUNCHER"  # as scripts/launch.sh sets them
_MEETING = timedelta(minutes=10)  # until all processes are there
_BEAT = 2.0  # seconds between two signs of life
_LOST_AFTER = 60.0  # seconds without one
_MOST, _LONGEST = 3, 1000  # problems of a child, and characters of each part: a pipe holds so much without a reader
_AGAIN = "run the same command again: everything finished is kept"
USER_ERROR, INTERRUPTED = 2, 130  # exit statuses, as `run_main` has them

Problem = list[str | None]  # an MMRoleError as JSON can hold it: what, value, where, fix


class LostProcessError(Exception):
    """Another process of the run has not been heard of for a minute."""


@dataclass(frozen=True)
class Team:
    """This process's place among those of the run.

    Attributes:
        store: What they tell each other through.
        rank: This process's number; 0 leads.
        size: How many there are.
        local_rank: Its number on its node.
        launcher: The process that started it.
    """

    store: Store
    rank: int
    size: int
    local_rank: int
    launcher: int

    def tell(self, key: str, value: Any) -> None:
        """Tells something to whoever asks for it.

        Raises:
            LostProcessError: If the store is gone.
        """
        from torch.distributed import DistError

        try:
            self.store.set(key, json.dumps(value))
        except DistError as error:
            raise LostProcessError("the store of the run is gone") from error

    def hear(self, key: str, teller: int, *, patience: float | None = None) -> Any:
        """Waits for what another process tells.

        Args:
            key: What.
            teller: Who, by its rank.
            patience: Seconds to wait after its last sign of life; a minute by default.

        Raises:
            LostProcessError: If there was none for so long.
        """
        from torch.distributed import DistError

        sign, since, patience = None, time.monotonic(), patience or _LOST_AFTER
        try:
            while not self.store.check([key]):
                self.store.add(f"signs/{self.rank}", 1)
                latest = self.store.add(f"signs/{teller}", 0)
                if latest != sign:
                    sign, since = latest, time.monotonic()
                elif time.monotonic() - since > patience:
                    raise LostProcessError(f"process {teller} has not been heard of for {patience:.0f} s")
                time.sleep(0.05)
            return json.loads(self.store.get(key))
        except DistError as error:
            raise LostProcessError("the store of the run is gone") from error

    def show_life(self) -> None:
        """Gives a sign of life; nobody may be there to see it."""
        from torch.distributed import DistError

        try:
            self.store.add(f"signs/{self.rank}", 1)
        except DistError:
            return  # told, or not, at the end

    def named(self, rank: int) -> str:
        """A process as the user reads it."""
        return f"process {rank + 1} of {self.size}"


def local_rank() -> int | None:
    """This process's number on its node, which is its GPU's; None if it runs alone.

    Only torchrun says it; what runs a cluster's jobs may set WORLD_SIZE and RANK for each node before.
    """
    place = os.environ.get("LOCAL_RANK")
    return int(place) if place is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def is_first() -> bool:
    """Whether this process looks at what is there of the results: the others may meet files that are being written."""
    return local_rank() is None or os.environ["RANK"] == "0"


def local_size() -> int:
    """How many processes of the run this node has."""
    return 1 if local_rank() is None else int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def join_team() -> Team | None:
    """Meets the other processes of a run that torchrun started; None for a process alone.

    Raises:
        MMRoleError: If they do not come.
    """
    place = local_rank()
    if place is None:
        return None
    launcher, met = os.getppid(), threading.Event()
    threading.Thread(target=_end_with_launcher, args=(launcher, met), daemon=True).start()
    from torch.distributed import DistError, rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=_MEETING))
    except DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        fix = "start the same script on every node, with the same NNODES, MASTER_ADDR and MASTER_PORT"
        raise MMRoleError(f"the processes of this run do not find each other: {error}", address, fix=fix) from error
    finally:
        met.set()
    return Team(store, rank, size, place, launcher)


def _end_with_launcher(launcher: int, met: threading.Event) -> None:
    """Ends this process if its launcher goes before all have met: who waits for them can do nothing else."""
    while not met.wait(_BEAT):
        if _is_gone(launcher):
            os._exit(USER_ERROR)


def _is_gone(launcher: int) -> bool:
    """Whether torchrun is gone, which was this process's parent when it looked; or even before that."""
    named = os.environ.get(LAUNCHER, "")
    return os.getppid() != launcher or (named.isdigit() and not psutil.pid_exists(int(named)))


def run_script(main: Callable[[], int | None]) -> int:
    """Runs an entry script's main as `run_main` does, and leaves the exit status for the shell script that asks for it.

    From torchrun it is hidden then: that makes every status a 1 and adds a page of its own, also where only a review
    could not be read. Nobody needs to read what is printed.
    """
    go_on_unread()
    try:
        status = run_main(main)
    except SystemExit as error:  # argparse's
        status = error.code if isinstance(error.code, int) else USER_ERROR
    path = os.environ.get(STATUS_FILE)
    if not path:
        return status
    if os.environ.get("LOCAL_RANK") == "0":
        with open(path, "w", encoding="ascii") as file:  # noqa: PTH123 - a pipe or file of the caller's
            file.write(str(status))
    return 0


def in_child(work: Callable[[], None], meanwhile: Callable[[], None], name: str, launcher: int) -> list[Problem]:
    """Does something in a child process, which ends when this one does.

    Args:
        work: What.
        meanwhile: Called every two seconds until it is done.
        name: Who this is, for the message if it dies.
        launcher: The process that started this one; when that is gone, nothing is gone on with.

    Returns:
        What went wrong; empty if it ended well.
    """
    context = multiprocessing.get_context("fork")  # quick, and `work` need not be pickled
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(work, sender), daemon=True)
    _flush()
    child.start()
    sender.close()
    try:
        while not wait([child.sentinel], _BEAT):
            meanwhile()
            if _is_gone(launcher):
                raise MMRoleError("the launcher is gone", name, fix=_AGAIN)
        child.join()
        told = _received(receiver)
    finally:
        child.kill()
        receiver.close()
    return told or ([] if child.exitcode == 0 else [_death(name, child.exitcode)])


def as_problems(error: MMRoleError) -> list[Problem]:
    """An error's single problems in a form that can be told."""
    singles = error.problems if isinstance(error, ProblemsError) else [error]
    parts = [(e.what, shown(e.value) or None, shown(e.where) or None, e.fix) for e in singles]
    return [[part and part[:_LONGEST] for part in four] for four in parts]


def as_errors(problems: list[Problem]) -> list[MMRoleError]:
    """The errors again, each once."""
    return [MMRoleError(*four) for four in dict.fromkeys(map(tuple, problems))]


def lost(name: str) -> Problem:
    """The problem that a process, or its node, is gone."""
    return [f"{name} has not been heard of for {_LOST_AFTER:.0f} s", None, None, _AGAIN]


def _death(name: str, exitcode: int | None) -> Problem:
    how = f"was killed by signal {-exitcode}" if exitcode and exitcode < 0 else f"ended with status {exitcode}"
    hint = "; a kill that nobody asked for is often a lack of memory" if exitcode == -9 else ""
    return [f"{name} {how}{hint}", None, None, _AGAIN]


def _child(work: Callable[[], None], sender: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    unshare_progress_bars()
    try:
        work()
    except MMRoleError as error:
        _send(sender, as_problems(error))
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a child only"
    wait([parent.sentinel])
    os._exit(1)


def _send(sender: Connection, problems: list[Problem]) -> None:
    sender.send_bytes(json.dumps(problems[:_MOST], ensure_ascii=False).encode("utf-8", "backslashreplace"))


def _received(receiver: Connection) -> list[Problem]:
    try:
        return json.loads(receiver.recv_bytes())
    except EOFError:
        return []


def _flush() -> None:
    """What stands in buffers now would be written by the child as well."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the caller has closed it
        stream.flush()
