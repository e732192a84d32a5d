"""Fetching files over HTTP so that nothing that came is lost: many at once, each gone on with where it stopped.

What came so far of a file lies in a `.part` file, which a later try, and a later run, goes on with by a `Range`
request. The file gets its name when it is whole and verified. huggingface_hub's own downloads begin anew each time they
are stopped, which for weights of many gigabytes is no resuming.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import requests

from data_utils.errors import MMRoleError
from data_utils.files import write_error

PIECE = 2**13  # bytes; of a piece that the line dropped in, nothing is kept
PATIENCE = 1.0  # seconds that stopped threads are given to put down what they do
_AGAIN = {408, 425, 429}  # and all from 500
_LONGEST_WAIT = 60.0
_TIMEOUT = (10, 30)  # seconds to connect, and between two pieces
_OF_THREAD = threading.local()

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Retries:
    """How often something is tried without progress, and how long is waited: nothing, then twice as long each time."""

    attempts: int = 5
    first_wait: float = 1.0

    def wait(self, attempt: int) -> float:
        """Seconds before attempt number `attempt` (from 0)."""
        return min(self.first_wait * 2 ** (attempt - 1), _LONGEST_WAIT) if attempt else 0.0


@dataclass(frozen=True)
class Source:
    """Where a file is fetched from.

    Attributes:
        url: Its address.
        headers: Sent with each request; the Authorization among them to this host alone.
        size: Its bytes, if they are known.
        largest: Bytes from which it cannot be it, if they are not.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    largest: int | None = None


class StoppedError(Exception):
    """The work was told to stop."""


class _AgainError(Exception):
    """A try failed in a way that the next may not."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


class _LostError(Exception):
    """A try failed in a way that the next will too."""


def in_parallel(
    work: Callable[[Item, threading.Event], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Does the work for each item in threads, and gives item and result as they end.

    Close the iterator (`contextlib.closing`) to stop the work: then no item is begun any more, and the event that the
    work is given is set. A thread that does not heed it within `PATIENCE` (a server may say nothing for long) is left
    behind and ends with the process.

    Args:
        work: What is done; raises StoppedError soon after its event is set.
        items: What it is done for.
        workers: How many threads.

    Raises:
        Exception: The first that the work raised; the rest is stopped.
    """
    todo, stop = deque(items), threading.Event()
    ended: queue.SimpleQueue[tuple[Item, Future[Result]]] = queue.SimpleQueue()

    def run() -> None:
        while not stop.is_set():
            try:
                item = todo.popleft()
            except IndexError:
                return
            ended.put((item, _outcome(work, item, stop)))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, len(items)))]
    try:
        for thread in threads:
            thread.start()
        for _ in items:
            item, outcome = ended.get()
            yield item, outcome.result()
    finally:
        stop.set()
        deadline = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def failures(
    ended: Iterable[tuple[Item, str | None]], give_up_after: int, unreachable: Callable[[str], MMRoleError]
) -> dict[Item, str]:
    """The problem of each item that has one.

    Raises:
        MMRoleError: `unreachable` of the last problem, when so many failed in a row that it cannot be the items.
    """
    failed, in_a_row = {}, 0
    for item, problem in ended:
        in_a_row = in_a_row + 1 if problem else 0
        if problem:
            failed[item] = problem
            if in_a_row == give_up_after:
                raise unreachable(problem)
    return failed


def fetch_file(
    source: Source,
    target: Path,
    part: Path,
    problem_of: Callable[[Path], str | None],
    *,
    retries: Retries,
    stop: threading.Event,
    moved: Callable[[int], object] = lambda _: None,
) -> str | None:
    """Fetches one file, of which some may be there already.

    Args:
        source: Where it comes from.
        target: Its name when it is whole and verified.
        part: Its name until then, in the same folder; stays when the file could not be finished.
        problem_of: Why what came is not right, or None. What is wrong is thrown away and fetched anew.
        retries: How often it is tried without anything more having come, and after which waits.
        stop: When this is set, it ends within a piece.
        moved: Told of each change of the bytes that are there; fewer than 0 if some were thrown away.

    Returns:
        Why the file could not be fetched, if so.

    Raises:
        MMRoleError: The disk does not take it, or another process is fetching it.
        StoppedError: It was told to stop.
    """
    with _Part(part, moved) as growing:
        problem = _fill(source, growing, problem_of, retries, stop)
        if problem is None:
            with _writing(target):
                part.replace(target)
    return problem


class _Part:
    """A file that grows to be another, by one process at a time. Without anything in it, it goes when it is left."""

    def __init__(self, path: Path, moved: Callable[[int], object]) -> None:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _opened(path)
        self.path, self._moved = path, moved
        self.size = os.fstat(self._file.fileno()).st_size

    def add(self, piece: bytes) -> None:
        """Appends; killing the process then loses nothing of it."""
        view = memoryview(piece)
        while view:
            with _writing(self.path):
                written = self._file.write(view)
            self.size += written
            self._moved(written)
            view = view[written:]

    def clear(self) -> None:
        """Throws away all of it."""
        if self.size:
            with _writing(self.path):
                self._file.truncate(0)
            self._moved(-self.size)
            self.size = 0

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        with _writing(self.path), self._file:
            if not self.size:
                self.path.unlink(missing_ok=True)


def _opened(path: Path) -> BinaryIO:
    """Opens a part for appending, and locks it, where the file system can."""
    file = path.open("ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise _in_use(path) from None
    except OSError:
        return file  # a file system without locks
    if not _is_still(path, file):  # the other process has just finished it
        file.close()
        raise _in_use(path)
    return file


def _is_still(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _in_use(path: Path) -> MMRoleError:
    return MMRoleError(
        "another process is fetching the same file",
        path,
        fix="wait until it has ended, then run the same command again",
    )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses into an error that stops everything: no other try or file would fare better."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error, "what came so far is kept") from error


def _outcome(work: Callable[[Item, threading.Event], Result], item: Item, stop: threading.Event) -> Future[Result]:
    outcome: Future[Result] = Future()
    try:
        outcome.set_result(work(item, stop))
    except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
        outcome.set_exception(error)
    return outcome


def _fill(
    source: Source, part: _Part, problem_of: Callable[[Path], str | None], retries: Retries, stop: threading.Event
) -> str | None:
    """Tries until the part is right; gives the last problem if it never is."""
    problem, asked_wait, tries, most = "", 0.0, 0, part.size
    while tries < retries.attempts:
        if stop.wait(max(retries.wait(tries), asked_wait)):
            raise StoppedError
        asked_wait = 0.0
        try:
            _receive(source, part, stop)
            problem = problem_of(part.path) or ""
            if not problem:
                return None
            part.clear()
        except _AgainError as error:
            problem, asked_wait = str(error), error.wait
        except _LostError as error:
            return str(error)
        except OSError as error:  # of the network, as requests' are; the disk's are MMRoleErrors by now
            problem = f"{type(error).__name__}: {first_line(error)}"
        tries = 1 if part.size > most else tries + 1
        most = max(most, part.size)
    return problem


def _receive(source: Source, part: _Part, stop: threading.Event) -> None:
    """Fetches what is missing of a part; returns when it has as many bytes as are known of, or announced."""
    most = source.largest if source.size is None else source.size
    if most is not None and part.size > most:
        part.clear()
    if part.size == source.size:
        return
    asked_range = {"Range": f"bytes={part.size}-"} if part.size else {}
    with _session().get(
        source.url, headers={**source.headers, "Accept-Encoding": "identity", **asked_range},
        stream=True, timeout=_TIMEOUT, auth=_as_given,
    ) as response:  # fmt: skip
        if _is_all_there(response, part):
            return
        start = part.size
        for piece in response.iter_content(PIECE):
            if stop.is_set():
                raise StoppedError
            part.add(piece)
            if most is not None and part.size > most:
                part.clear()
                raise _AgainError(f"over {most:,} bytes")
    _check_length(part.size, source.size, start, response.headers.get("Content-Length", ""))


def _is_all_there(response: requests.Response, part: _Part) -> bool:
    """Whether the server has no more than the part; if it has, the part is what its answer is to be put behind.

    Raises:
        _AgainError, _LostError: The answer is none that a file comes with.
    """
    status, content_range = response.status_code, response.headers.get("Content-Range", "")
    if status == 416:
        if part.size and content_range == f"bytes */{part.size}":
            return True
        part.clear()
        raise _AgainError("the server has not the rest of it")
    if status in _AGAIN or status >= 500:
        raise _AgainError(_named(response), _seconds(response.headers.get("Retry-After")))
    if status not in (200, 206):
        raise _LostError(_named(response))
    if status == 200:  # it does not do ranges
        part.clear()
    elif not content_range.startswith(f"bytes {part.size}-"):
        part.clear()
        raise _AgainError("the server sent another part than asked for")
    return False


def _check_length(there: int, size: int | None, start: int, announced: str) -> None:
    """Raises if fewer bytes are there than are known of, or, behind the first `start`, were announced."""
    whole = start + int(announced) if size is None and announced.isdigit() else size
    if whole is not None and there < whole:
        raise _AgainError(f"{there:,} of {whole:,} bytes came")


def _named(response: requests.Response) -> str:
    reason = response.headers.get("X-Error-Message", "")  # the hub's, of a repository whose terms must be accepted, say
    return f"status {response.status_code}{reason and f' ({reason})'}"


def _seconds(text: str | None) -> float:
    """What a Retry-After header asks for, within reason; a date counts as nothing."""
    return min(float(text), _LONGEST_WAIT) if text and text.strip().isdigit() else 0.0


def _as_given(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Leaves the Authorization as it is: requests would put what ~/.netrc has for the host in its place."""
    return request


def _session() -> requests.Session:
    """A session for each thread, which keeps its connection open from file to file."""
    if not hasattr(_OF_THREAD, "session"):
        _OF_THREAD.session = requests.Session()
    return _OF_THREAD.session


def first_line(error: BaseException) -> str:
    """An error's message, as far as it fits one line."""
    return (str(error).strip() or repr(error)).split("\n")[0]
