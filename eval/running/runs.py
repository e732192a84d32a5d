"""From planned requests to result files: every finished one is journalled, a run that ended early goes on."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from data_utils.errors import MMRoleError
from data_utils.files import make_folder, published_json, write_bytes
from data_utils.journal import Journal
from data_utils.paths import sha256_of
from eval.backends.backend import Backend, Request, Result
from eval.running.console import Progress
from eval.running.journal import (
    FILE_KEY,
    TIMES,
    known_of,
    part_journal,
    remove_older,
    times_after_this,
    times_begun_anew,
    times_in,
)
from eval.running.result_files import FileReport, Outcome, ResultFile, Settings, State, Unit, outcomes_of
from eval.running.sharing import Missing

_NAMED = 10  # units that an error names; more are counted


def derive_seed(*parts: object) -> int:
    """A seed, 0 to 2**63 - 1, that depends on the parts and on nothing else."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def run_files(
    reports: Sequence[FileReport], settings: Settings, backend: Backend, *, unit_name: str, overwrite: bool = False
) -> list[FileReport]:
    """Makes all result files that `inspect` found open, in this process alone.

    Each text is journalled before the next one is waited for; each file appears at once and whole when its last text
    has come. The backend is asked for nothing if nothing is missing.

    Args:
        reports: What `inspect` found.
        settings: How.
        backend: Who answers.
        unit_name: What one text is called in the progress bar.
        overwrite: Makes all of them anew.

    Returns:
        The reports, those of the files that were made with their outcomes.

    Raises:
        MMRoleError: If a file or journal cannot be written or read, or another process is writing it.
    """
    with Works(reports, settings, overwrite=overwrite) as works:
        missing = works.missing()
        works.finish(set(works.files) - {text.file for text in missing})
        run_texts(missing, works.by_number, settings, backend, unit_name=unit_name)
        return works.reports()


def run_share(
    share: Sequence[Missing],
    files: Mapping[int, ResultFile],
    settings: Settings,
    backend: Backend,
    *,
    times: Mapping[int, int],
    process: int,
    unit_name: str,
) -> None:
    """Gets one process's share of the texts into its own journals; the first process makes the files of them.

    Args:
        share: What this process is to get.
        files: The files they are for, by number.
        settings: How.
        backend: Who answers.
        times: How often each file was begun anew, by number.
        process: The number of this process; the first one shows how far it is.
        unit_name: What one text is called in the progress bar.

    Raises:
        MMRoleError: If a journal cannot be written or read, or another process is writing it.
    """
    with ExitStack() as stack:
        parts = {
            number: stack.enter_context(_Part(files[number], settings, times[number], process))
            for number in sorted({text.file for text in share})
        }
        own = f"process {process + 1}'s {unit_name}"
        run_texts(share, parts, settings, backend, unit_name=own, shown=process == 0)


def run_texts(
    missing: Sequence[Missing],
    recorders: Mapping[int, _Recorder],
    settings: Settings,
    backend: Backend,
    *,
    unit_name: str,
    shown: bool = True,
) -> None:
    """Sends texts through the backend in rounds: each asks again for what the one before left unreadable."""
    tasks = [_Task(recorders[number], recorders[number].file.units[unit], attempt) for number, unit, attempt in missing]
    runner = _Runner(tasks, settings, backend)
    with Progress(len(tasks), unit_name, shown=shown) as progress:
        while tasks:
            tasks = runner.round(tasks, progress)


class Works:
    """The result files that a run makes: their journals, locked against other runs, and what is known of each.

    Args:
        reports: What `inspect` found; files that are not open are left alone.
        settings: How they are made.
        overwrite: Throws away what is there of each file as soon as its first text has come.

    Raises:
        MMRoleError: If a journal cannot be written or read, or another process is writing it.
    """

    def __init__(self, reports: Sequence[FileReport], settings: Settings, *, overwrite: bool) -> None:
        self._reports = reports
        self._settings = settings
        self.by_number: dict[int, _Work] = {}
        with ExitStack() as stack:
            for number, report in enumerate(reports):
                if report.state is State.OPEN:
                    work = stack.enter_context(_Work(report.file, settings, overwrite=overwrite))
                    self.by_number[number] = work
            self._stack = stack.pop_all()

    @property
    def files(self) -> dict[int, ResultFile]:
        """The files by their numbers in the reports."""
        return {number: work.file for number, work in self.by_number.items()}

    @property
    def times(self) -> dict[int, int]:
        """How often each file was begun anew, by number."""
        return {number: work.times for number, work in self.by_number.items()}

    def missing(self) -> list[Missing]:
        """All texts that are to be got, in the order of the files."""
        return [
            Missing(number, index, attempt)
            for number, work in self.by_number.items()
            for index, unit in enumerate(work.file.units)
            if (attempt := self._settings.next_attempt(work.outcomes.get(unit.key))) is not None
        ]

    def finish(self, numbers: set[int]) -> None:
        """Writes these result files."""
        for number in sorted(numbers):
            self.by_number[number].finish()

    def gather(self) -> None:
        """Reads what all processes have journalled, and writes every result file of which all is there."""
        for work in self.by_number.values():
            work.read()
            if all(self._is_there(work.outcomes.get(unit.key)) for unit in work.file.units):
                work.finish()

    def reports(self) -> list[FileReport]:
        """The reports, those of the files that are made here with their outcomes."""
        return [
            FileReport(report.file, report.state, self.by_number[number].outcomes)
            if number in self.by_number
            else report
            for number, report in enumerate(self._reports)
        ]

    def _is_there(self, outcome: Outcome | None) -> bool:
        """Whether the run was done with a text: also an error counts, which only the next run tries again."""
        return outcome is not None and (outcome.error is not None or self._settings.next_attempt(outcome) is None)

    def __enter__(self) -> Works:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class _Recorder:
    """Takes down what comes of a result file's units, in a journal that is locked and open.

    A journal that no longer counts, because the file has been begun anew since, is replaced when the first text comes.
    """

    def __init__(self, file: ResultFile, path: Path, settings: Settings, times: int) -> None:
        self.file, self.times = file, times
        self._settings = settings
        make_folder(path.parent, "nothing was started")
        info = {**settings.info, "replaces": sha256_of(file.target), TIMES: times}
        there = times_begun_anew(path)
        outdated = there is not None and there < times
        self._journal = Journal.open(path, settings.compared, info, overwrite=outdated, at_once=not outdated)
        self.outcomes: dict[str, Outcome] = {}

    def read(self) -> None:
        """Takes in what all journals know."""
        known = known_of(self.file.target, self._settings.compared, self._settings.info, since=self.times)
        self.outcomes = outcomes_of(self.file, known) if known else {}

    def record(self, unit: Unit, result: Result, attempt: int) -> Outcome:
        """Journals a result; half surrogate pairs, which no file can hold, become question marks.

        If another attempt ends in an error, the text before it, which could not be read, is kept beside that.
        """
        before = self.outcomes.get(unit.key)
        error = result.error and result.error.encode("utf-8", "replace").decode("utf-8")
        text = result.text.encode("utf-8", "replace").decode("utf-8")
        if error:
            text = before.text if before and attempt else ""
        told = {**({"text": text} if text or not error else {}), **({"error": error} if error else {})}
        self._journal.add(unit.key, {"prompt": unit.prompt, "attempt": attempt, **told})
        self.outcomes[unit.key] = Outcome(text, error or None, attempt)
        return self.outcomes[unit.key]

    def finish(self) -> None:
        """Called when the last text that was asked for has come."""

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()


class _Part(_Recorder):
    """One process's own journal of a result file that several make together."""

    def __init__(self, file: ResultFile, settings: Settings, times: int, process: int) -> None:
        super().__init__(file, part_journal(file.target, process), settings, times)
        self.read()


class _Work(_Recorder):
    """A result file in the making, its main journal, and what all journals know of its units."""

    def __init__(self, file: ResultFile, settings: Settings, *, overwrite: bool) -> None:
        known = None if overwrite else known_of(file.target, settings.compared, settings.info)
        times = times_after_this(file.target) if overwrite else times_in(known.info) if known else 0
        super().__init__(file, file.journal, settings, times)
        self.read()

    def finish(self) -> None:
        """Writes the result file; the journal knows of it first, so that no crash makes it look like someone else's."""
        data = published_json(self.file.assemble(self.outcomes))
        known = self._journal.entries.get(FILE_KEY, {"sha256": []})["sha256"]
        digest = hashlib.sha256(data).hexdigest()
        self._journal.add(FILE_KEY, {"sha256": [*known, digest], "rows": self.file.rows})
        self._journal.sync()
        remove_older(self.file.target, self.times)
        for leftover in self.file.target.parent.glob(f".{glob.escape(self.file.target.name)}.*.tmp"):
            leftover.unlink()  # of a killed run: the lock says that nobody else is writing this file
        write_bytes(self.file.target, data)


@dataclass(frozen=True)
class _Task:
    recorder: _Recorder
    unit: Unit
    attempt: int


class _Runner:
    """Sends tasks through the backend, and tells each file when its last text has come."""

    def __init__(self, tasks: list[_Task], settings: Settings, backend: Backend) -> None:
        self._settings = settings
        self._backend = backend
        self._missing: dict[int, int] = {}
        for task in tasks:
            self._missing[id(task.recorder)] = self._missing.get(id(task.recorder), 0) + 1

    def round(self, tasks: list[_Task], progress: Progress) -> list[_Task]:
        """Asks for all of them once; returns what has to be asked for again."""
        waiting = {str(number): task for number, task in enumerate(tasks)}
        again = []
        for result in self._backend.run([self._request(name, task) for name, task in waiting.items()]):
            task = waiting.pop(result.id)
            outcome = task.recorder.record(task.unit, result, task.attempt)
            following = None if outcome.error else self._settings.next_attempt(outcome)
            if following is not None:
                progress.advance(again=True)
                again.append(_Task(task.recorder, task.unit, following))
                continue
            progress.advance(failed=self._settings.failure(outcome) is not None)
            self._missing[id(task.recorder)] -= 1
            if not self._missing[id(task.recorder)]:
                task.recorder.finish()
        if waiting:
            keys = [task.unit.key for task in waiting.values()]
            raise MMRoleError(
                f"the engine ended without a result for {len(keys)} request(s)",
                keys[:_NAMED] + ([f"and {len(keys) - _NAMED} more"] if len(keys) > _NAMED else []),
                fix="run the same command again: everything finished is kept",
            )
        return again

    def _request(self, name: str, task: _Task) -> Request:
        settings, unit = self._settings, task.unit
        repeat = [task.attempt] if task.attempt else []
        return Request(
            id=name,
            image=unit.image,
            text=unit.text,
            system=unit.system,
            seed=derive_seed(settings.seed, unit.key, *repeat),
            do_sample=True if task.attempt else settings.do_sample,
            max_new_tokens=settings.max_new_tokens,
        )
