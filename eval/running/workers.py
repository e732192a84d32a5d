"""Worker processes: each has a backend on one device, and completes rows for the parent process.

Workers are spawned, each with a separate pipe, so that a killed one leaves no lock behind. A worker gets many rows at
once, so that its batches are large, but only half of a fair share of the rest, so that all workers end together.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from data_utils.console import ignore_lost_output
from data_utils.errors import MMRoleError, first_of, raise_problems
from eval.backends.backend import Backend, Completion, MakeBackend, Prompt

Rows = deque[list[Prompt]]  # rows to complete; the prompts of a row stay together
_LEAST = 512  # texts that a worker gets at once, if there are so many: the engine's largest batch
_AGAIN = "run the same command again: everything finished is kept"


def complete_here(rows: Rows, backend: Backend) -> Iterator[Completion]:
    """Complete rows in this process, rows that are added meanwhile included.

    Raises:
        MMRoleError: The backend cannot complete anything, or leaves prompts without a completion.
    """
    while rows:
        prompts = [prompt for row in rows for prompt in row]
        rows.clear()
        yield from _run(backend, prompts)


class Workers:
    """The workers of a run, as a context manager that ends them.

    Args:
        make_backend: Makes the backend of a worker from the flags; the worker imports it by name.
        options: The flags.
        devices: The device of each worker.
        report: Shows a line to the user.
    """

    def __init__(
        self,
        make_backend: MakeBackend,
        options: argparse.Namespace,
        devices: Sequence[str],
        report: Callable[[str], None],
    ) -> None:
        self._report = report
        self._lost: Rows = deque()  # rows of workers that died
        self._lost_once: set[str] = set()
        self._problems: list[MMRoleError] = []
        self.summaries: dict[str, str] = {}
        self._workers: list[_Worker] = []
        for number, device in enumerate(devices):
            name = f"worker {number + 1} of {len(devices)} ({device})"
            theirs = argparse.Namespace(**{**vars(options), "device": device, "workers": len(devices)})
            self._workers.append(_Worker.start(name, make_backend, theirs))

    def complete(self, rows: Rows) -> Iterator[Completion]:
        """Complete rows, rows that are added meanwhile included.

        A row whose worker dies goes to another worker, once. If no worker is left, the rest is not completed.

        Raises:
            MMRoleError: No worker is left, and a backend has reported why.
        """
        while True:
            for worker in self._workers:
                if not worker.busy and (share := self._share(rows)):
                    worker.take(share)
            busy = {worker.connection: worker for worker in self._workers if worker.busy}
            if not busy:
                break
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    yield from self._died(worker, rows)
                    continue
                if isinstance(message, Completion):
                    worker.held.pop(message.id)
                    yield message
                elif isinstance(message, MMRoleError):
                    self._problems.append(message)
                    self._report(f"{worker.name} has ended:\n{message}")
                    rows.extend(worker.rows())
                    self._remove(worker)
                else:
                    self.summaries[worker.name] = message
                    worker.busy = False
        if rows or self._lost:
            raise_problems({str(problem): problem for problem in self._problems}.values())

    def _share(self, rows: Rows) -> list[Prompt]:
        """Return the next rows for a worker; a row of a worker that died is handed out alone."""
        if not rows:
            return self._lost.popleft() if self._lost else []
        return [prompt for _ in range(share_size(rows, len(self._workers))) for prompt in rows.popleft()]

    def _died(self, worker: _Worker, rows: Rows) -> Iterator[Completion]:
        worker.process.join()
        code = worker.process.exitcode
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended with status {code}"
        hint = "; an unexpected kill often means a lack of memory" if code == -signal.SIGKILL else ""
        self._report(f"{worker.name} {how}{hint}")
        self._remove(worker)
        for row in worker.rows():
            if row[0].row not in self._lost_once:
                self._lost_once.add(row[0].row)
                self._lost.append(row)
                continue
            for prompt in row:
                yield Completion(prompt.id, "", "two workers died while they worked on this row")

    def _remove(self, worker: _Worker) -> None:
        worker.end()
        self._workers.remove(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()


def share_size(rows: Rows, workers: int) -> int:
    """Return how many rows a worker gets: half of a fair share, but at least a batch, and at most a fair share."""
    fair = len(rows) / workers
    return math.ceil(min(max(fair / 2, _LEAST / len(rows[0])), fair))


@dataclass
class _Worker:
    """The parent's view of a worker.

    Attributes:
        name: Its name for the user.
        process: The process.
        connection: The pipe to the worker.
        held: Its uncompleted prompts, by id.
        busy: Whether it still has prompts, or its summary of them is missing.
    """

    name: str
    process: BaseProcess
    connection: Connection
    held: dict[str, Prompt] = field(default_factory=dict)
    busy: bool = False

    @classmethod
    def start(cls, name: str, make_backend: MakeBackend, options: argparse.Namespace) -> _Worker:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        process = context.Process(target=_work, args=(make_backend, options, theirs), name=name, daemon=True)
        process.start()
        theirs.close()
        return cls(name, process, connection)

    def take(self, prompts: list[Prompt]) -> None:
        """Send prompts; if the worker is gone, reading its next message shows it."""
        self.held, self.busy = {prompt.id: prompt for prompt in prompts}, True
        try:
            self.connection.send(prompts)
        except OSError:
            return

    def rows(self) -> list[list[Prompt]]:
        """Return its uncompleted prompts by rows."""
        found: dict[str, list[Prompt]] = {}
        for prompt in self.held.values():
            found.setdefault(prompt.row, []).append(prompt)
        return list(found.values())

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(make_backend: MakeBackend, options: argparse.Namespace, connection: Connection) -> None:
    """Run a worker: receive prompts, send their completions and a summary, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ignore_lost_output()
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // options.workers, 1)))  # before torch is imported
    try:
        backend = make_backend(options)
        while True:
            for completion in _run(backend, connection.recv()):
                connection.send(completion)
            connection.send(backend.summary())
    except MMRoleError as error:
        connection.send(error)
    except EOFError:
        return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker only"
    wait([parent.sentinel])
    os._exit(1)


def _run(backend: Backend, prompts: Sequence[Prompt]) -> Iterator[Completion]:
    waiting = {prompt.id: prompt for prompt in prompts}
    for completion in backend.run(prompts):
        del waiting[completion.id]
        yield completion
    if waiting:
        what = f"the backend ended without a text for {len(waiting)} prompt(s)"
        raise MMRoleError(what, first_of([prompt.key for prompt in waiting.values()]), fix=_AGAIN)
