"""Runs a task from its inputs to its report: checks everything, completes the prompts, writes the files."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from data_utils.errors import MMRoleError, raise_problems, shown
from eval.backends.backend import Backend, Completion, Decoding, MakeBackend, Prompt, StoppedError
from eval.running.console import Progress
from eval.running.flags import plain, run_settings, selection
from eval.running.inputs import Input, Source, output_problems, read_inputs
from eval.running.journal import FileReport, ResultFile, ResultWriter, Settings, State, inspect
from eval.running.task import Task, derive_seed
from eval.running.workers import Rows, Workers, complete_here

_SHOWN = 5  # printed reasons and samples of failures; the journal holds all


def run_job(
    task: Task,
    options: argparse.Namespace,
    sources: Sequence[Source],
    problems: Sequence[MMRoleError],
    backend: Backend,
    make_backend: MakeBackend,
) -> int:
    """Make the result files of the inputs.

    Args:
        task: Answering or judging.
        options: The flags.
        sources: Input and output files.
        problems: Problems found earlier.
        backend: Completes the prompts, if one process does so.
        make_backend: Makes the backend of each worker, if several do.

    Returns:
        The exit status: 0, or 1 if a text failed or is missing.

    Raises:
        MMRoleError: A check before the load of the model fails, a file cannot be written, or nothing can be completed.
    """
    inputs, wrong = read_inputs(sources, task.record, selection(options, task.is_wanted)) if sources else ([], [])
    wrong = [*problems, *wrong, *output_problems(sources)]
    broken = backend.problems()
    if broken:
        raise_problems([*wrong, *broken])
    settings = run_settings(options, task, backend)
    reports, conflicts = inspect(
        [_result_file(entry, task) for entry in inputs], task, settings, overwrite=options.overwrite
    )
    raise_problems([*wrong, *conflicts])
    _print_options(options, backend)
    reports = complete_files(reports, task, settings, options, backend, make_backend)
    status = _print_report(reports, inputs, task)
    for remark in task.remarks():
        print(remark)
    return status


def complete_files(
    reports: Sequence[FileReport],
    task: Task,
    settings: Settings,
    options: argparse.Namespace,
    backend: Backend,
    make_backend: MakeBackend,
) -> list[FileReport]:
    """Make the result files that `inspect` found open.

    Each text is journalled before the next one is awaited; each file is written atomically after its last text. If
    nothing is missing, the backend is not used.

    Args:
        reports: The reports of `inspect`.
        task: Answering or judging.
        settings: The settings of the run.
        options: The flags.
        backend: Completes the prompts in a single process.
        make_backend: Makes the backend of each worker, if there are several.

    Returns:
        The reports; those of new files with their completions.

    Raises:
        MMRoleError: A file or journal cannot be written or read, or nothing can be completed.
    """
    with ExitStack() as stack:
        writers = {
            number: stack.enter_context(ResultWriter(report.file, settings, overwrite=options.overwrite))
            for number, report in enumerate(reports)
            if report.state is State.OPEN
        }
        _Run(task, options, backend, make_backend, writers).complete()
        return [
            FileReport(report.file, report.state, writers[number].completions) if number in writers else report
            for number, report in enumerate(reports)
        ]


def _result_file(entry: Input, task: Task) -> ResultFile:
    wanted = filter(task.is_wanted, entry.rows)
    prompts = [prompt for row in wanted for prompt in task.prompts(row, entry.images[row["id"]])]
    return ResultFile(entry.source.output, entry.rows, prompts, task.fill, frozenset(entry.ids))


@dataclass(frozen=True)
class _Pending:
    """A prompt that is being completed, with its writer and attempt."""

    writer: ResultWriter
    prompt: Prompt
    attempt: int


class _Run:
    """Completes all missing texts of result files, and writes each file after its last text."""

    def __init__(
        self,
        task: Task,
        options: argparse.Namespace,
        backend: Backend,
        make_backend: MakeBackend,
        writers: dict[int, ResultWriter],
    ) -> None:
        self._task, self._options = task, options
        self._backend, self._make_backend = backend, make_backend
        self._decoding = Decoding.of(options)
        self._pending: dict[str, _Pending] = {}
        self._left: Counter[int] = Counter()  # missing texts of a writer, by its `id()`
        self._rows: Rows = deque()
        for number, writer in writers.items():
            for prompt in writer.file.prompts:
                attempt = task.next_attempt(writer.completions.get(prompt.key))
                if attempt is not None:
                    named = replace(prompt, id=f"{number} {prompt.key}", row=f"{number} {prompt.row}")
                    self._left[id(writer)] += 1
                    self._ask(_Pending(writer, named, attempt))
            if not self._left[id(writer)]:
                writer.finish()

    def complete(self) -> None:
        """Complete what is missing; each text is journalled before the next one is awaited."""
        if not self._rows:
            return
        devices = self._backend.devices(self._options.processes)[: len(self._rows)]
        with Progress(len(self._pending), self._task.unit) as progress, ExitStack() as stack:
            if len(devices) == 1:
                completions: Iterator[Completion] = complete_here(self._rows, self._backend)
            else:
                arguments = (self._make_backend, self._options, devices, progress.report_once)
                workers = stack.enter_context(Workers(*arguments))
                completions = workers.complete(self._rows)
            try:
                for completion in completions:
                    self._take(completion, progress)
            except StoppedError as reason:
                progress.report_once(str(reason))
        summaries = workers.summaries if len(devices) > 1 else {"": self._backend.summary()}
        for name, summary in summaries.items():
            print(f"  {name}: {summary}" if name else f"  {summary}")

    def _ask(self, pending: _Pending) -> None:
        decoding = replace(self._decoding, do_sample=True) if pending.attempt else self._decoding
        again = [pending.attempt] if pending.attempt else []
        seed = derive_seed(self._options.seed, pending.prompt.key, *again)
        prompt = replace(pending.prompt, seed=seed, decoding=decoding)
        self._pending[prompt.id] = pending
        if self._rows and self._rows[-1][0].row == prompt.row:
            self._rows[-1].append(prompt)
        else:
            self._rows.append([prompt])

    def _take(self, completion: Completion, progress: Progress) -> None:
        pending = self._pending.pop(completion.id)
        completion = pending.writer.record(pending.prompt, replace(completion, attempt=pending.attempt))
        following = None if completion.error else self._task.next_attempt(completion)
        if following is not None:
            progress.advance(again=True)
            self._ask(replace(pending, attempt=following))
            return
        progress.advance(failed=self._task.failure(completion) is not None)
        self._left[id(pending.writer)] -= 1
        if not self._left[id(pending.writer)]:
            pending.writer.finish()


def _print_options(options: argparse.Namespace, backend: Backend) -> None:
    for name, value in {**vars(options), **backend.describe()}.items():
        print(f"  {name}: {json.dumps(plain(value), ensure_ascii=False)}", flush=True)


def _print_report(reports: Sequence[FileReport], inputs: Sequence[Input], task: Task) -> int:
    """Print the result files and the failures; return the exit status."""
    failed = missing = 0
    for report, entry in zip(reports, inputs, strict=True):
        failures = report.failures(task)
        failed += len(failures)
        missing += report.missing
        print(f"{report.file.target}: {_line(report, entry, failures, task)}")
        _print_failures(failures)
    if failed:
        print(f"{failed} failed: {task.advice}", file=sys.stderr)
    if missing:
        print(f"{missing} missing: run the same command again; everything finished is kept", file=sys.stderr)
    return 1 if failed or missing else 0


def _print_failures(failures: Sequence[tuple[str, str]]) -> None:
    for reason, count in Counter(reason for _, reason in failures).most_common(_SHOWN):
        keys = [key for key, why in failures if why == reason]
        names = ", ".join(map(shown, keys[:_SHOWN])) + (", ..." if count > _SHOWN else "")
        print(f"  {count} failed: {shown(reason)}: {names}", file=sys.stderr)


def _line(report: FileReport, entry: Input, failures: Sequence[tuple[str, str]], task: Task) -> str:
    if report.state not in (State.OPEN, State.FINISHED):
        return report.state.value
    parts = [report.state.value] if report.state is State.FINISHED else []
    parts.append(f"{len(entry.rows)} of {len(entry.ids)} rows")
    if entry.skipped:
        parts.append(f"{len(entry.skipped)} left out because their image is missing")
    if report.missing:
        parts.append(f"unfinished: {report.missing} of {len(report.file.prompts)} texts are missing")
    present = report.present
    ends = {"cut off at the limit": sum(c.cut for c in present), "refused": sum(c.refusal is not None for c in present)}
    parts += [f"{count} {name}" for name, count in ends.items() if count]
    return ", ".join([*parts, *task.notes(entry.rows, present), f"{len(failures)} failed"])
