"""A run from its checked inputs to its report, in this process alone or together with others."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from data_utils.errors import MMRoleError, raise_problems
from eval.backends.backend import Backend
from eval.running.flags import BackendFactory, print_options, print_report
from eval.running.inputs import Input
from eval.running.result_files import FileReport, Settings
from eval.running.runs import Works, run_files, run_share
from eval.running.sharing import Missing, deal
from eval.running.team import (
    INTERRUPTED,
    USER_ERROR,
    LostProcessError,
    Problem,
    Team,
    as_errors,
    as_problems,
    in_child,
    join_team,
    lost,
)

_CHECKS = 600.0  # seconds that the first process may take to look at everything before the work begins


@dataclass
class Job:
    """What is to be done, checked.

    Attributes:
        options: The flags.
        inputs: What is read.
        settings: How texts are made.
        reports: What `inspect` found of each result file.
        unit_name: What one text is called.
        notes: What is to be told of a finished file beside its counts.
        advice: What to do about failures.
    """

    options: Namespace
    inputs: Sequence[Input]
    settings: Settings
    reports: Sequence[FileReport]
    unit_name: str
    notes: Callable[[FileReport], str]
    advice: str


def run_job(prepare: Callable[[], Job], make_backend: BackendFactory) -> int:
    """Does a job; under torchrun each process does its share, and the first one checks, writes the files and reports.

    Args:
        prepare: Reads the flags and checks everything that can be checked before a model is loaded.
        make_backend: Makes who answers.

    Returns:
        The exit status: 0, or 1 if a text failed.

    Raises:
        MMRoleError: If anything is wrong that can be known before the model is loaded, a file cannot be written, or a
            process ended early.
    """
    team = join_team()
    if team is None:
        return _alone(prepare(), make_backend)
    if team.rank == 0:
        return _lead(team, prepare, make_backend)
    return _follow(team, prepare, make_backend)


def _alone(job: Job, make_backend: BackendFactory) -> int:
    print_options(job.options, job.settings)
    overwrite = job.options.overwrite
    reports = run_files(
        job.reports, job.settings, make_backend(job.options), unit_name=job.unit_name, overwrite=overwrite
    )
    return print_report(reports, job.inputs, job.settings, notes=job.notes, advice=job.advice)


def _lead(team: Team, prepare: Callable[[], Job], make_backend: BackendFactory) -> int:
    """The first process: what goes wrong before the work begins is told here, once."""
    status, planned = USER_ERROR, False
    try:
        job = prepare()
        print_options(job.options, job.settings)
        with Works(job.reports, job.settings, overwrite=job.options.overwrite) as works:
            missing = works.missing()
            shares = deal(missing, works.files, team.size)
            for rank, share in enumerate(shares):
                team.tell(f"share/{rank}", share)
            team.tell("times", list(works.times.items()))
            team.tell("plan", _digest(job))
            planned = True
            print(f"  {len(missing)} {job.unit_name}s to get, by {team.size} processes: {[len(s) for s in shares]}")
            problems = _work(team, job, shares[0], works.times, make_backend(job.options))
            for rank in range(1, team.size):
                problems += _heard(team, rank)
            works.gather()
            reports = works.reports()
            if not problems and (lacking := sum(report.missing for report in reports)):
                what = f"{lacking} texts were made by other processes and cannot be found here"
                fix = "all nodes must see the same results folder; then run the same command again"
                problems = [[what, None, str(reports[0].file.target.parent), fix]]
        status = print_report(reports, job.inputs, job.settings, notes=job.notes, advice=job.advice)
        if problems:
            status = USER_ERROR
            raise_problems(as_errors(problems))
        return status
    finally:
        with contextlib.suppress(LostProcessError):
            if not planned:
                team.tell("plan", None)
            team.tell("status", status)


def _follow(team: Team, prepare: Callable[[], Job], make_backend: BackendFactory) -> int:
    """Any other process: it says nothing, but tells the first one what went wrong in its own part."""
    try:
        job, problems = _prepared_silently(prepare)
        plan = team.hear("plan", 0, patience=_CHECKS)
        if plan is not None:
            if job and plan != _digest(job):
                what = f"{team.named(team.rank)} has other inputs, another model or other settings than the first one"
                problems = [[what, None, None, "all nodes must see the same data, results and checkpoint"]]
            if job and not problems:
                share = [Missing(*text) for text in team.hear(f"share/{team.rank}", 0)]
                times = dict(team.hear("times", 0))
                problems = _work(team, job, share, times, make_backend(job.options))
            team.tell(f"done/{team.rank}", problems)
        return team.hear("status", 0) if team.local_rank == 0 else 0
    except KeyboardInterrupt:
        return INTERRUPTED  # the first process tells it
    except LostProcessError as error:
        fix = "see why it ended, then run the same command again: everything finished is kept"
        raise MMRoleError(f"{team.named(team.rank)} has lost the first one: {error}", fix=fix) from error


def _prepared_silently(prepare: Callable[[], Job]) -> tuple[Job | None, list[Problem]]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            return prepare(), []
        except MMRoleError as error:
            return None, as_problems(error)
        except SystemExit as error:  # argparse has told the user what is wrong, or --help; the first process does too
            return None, [[f"the flags cannot be read: status {error.code}", None, None, "see --help"]]


def _work(team: Team, job: Job, share: Sequence[Missing], times: Mapping[int, int], backend: Backend) -> list[Problem]:
    """Gets this process's share, in a child; returns what went wrong."""
    files = {number: report.file for number, report in enumerate(job.reports)}

    def work() -> None:
        run_share(share, files, job.settings, backend, times=times, process=team.rank, unit_name=job.unit_name)

    return in_child(work, team.show_life, team.named(team.rank), team.launcher) if share else []


def _heard(team: Team, rank: int) -> list[Problem]:
    try:
        return team.hear(f"done/{rank}", rank)
    except LostProcessError:
        return [lost(team.named(rank))]


def _digest(job: Job) -> str:
    """A hash of all that a share's numbers count in: every process must mean the same text by them."""
    units = [[report.file.target.name, [[u.key, u.prompt] for u in report.file.units]] for report in job.reports]
    told = json.dumps([job.settings.compared, units], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()
