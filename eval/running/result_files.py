"""A result file and its journal: what it takes to make it, and what is there of it already.

Beside each result file `<name>.json` lies `<name>.journal`: the settings it was made with, and every text as it came.
It stays there, so that the file can be added to (more rows, failed ones again), and so that results of different
models, prompts or settings are never mixed in one file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError
from data_utils.files import published_json, read_json
from data_utils.journal import JournalContent
from data_utils.paths import sha256_of
from data_utils.schema import Row
from eval.running.journal import FILE_KEY, journal_path, known_of

_NAMED = 10  # units or rows that an error names; more are counted


@dataclass(frozen=True)
class Unit:
    """One text to get.

    Attributes:
        key: Names it within its file; what sampling is seeded from.
        image: The picture's file.
        image_name: The picture's name in the data.
        system: The system message.
        text: What is asked.
        row: Names the row it is for; units of one row begin with the same prompt. Its own key if left away.
    """

    key: str
    image: Path
    image_name: str
    system: str
    text: str
    row: str = ""

    def __post_init__(self) -> None:
        if not self.row:
            object.__setattr__(self, "row", self.key)

    @cached_property
    def prompt(self) -> str:
        """A hash of all that is asked: 16 hexadecimal digits."""
        asked = json.dumps([self.image_name, self.system, self.text])
        return hashlib.sha256(asked.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What came of a unit.

    Attributes:
        text: What was written; beside an error the text of the attempt before, which could not be read, or nothing.
        error: Why the attempt gave no text, or None.
        attempt: How many texts were asked for before it.
    """

    text: str
    error: str | None
    attempt: int

    def failure(self, complaint: Callable[[str], str | None]) -> str | None:
        """Why it is not what was asked for, or None if it is; `complaint` says that of a text."""
        if self.error is None:
            return complaint(self.text)
        before = complaint(self.text) if self.text else None
        return f"{self.error} (the text before: {before})" if before else self.error


@dataclass
class ResultFile:
    """A file to be made.

    Attributes:
        target: Where.
        units: The texts it needs.
        rows: How many rows it will have.
        assemble: Makes its rows from the outcome of each unit.
        input_ids: Ids of all rows of its input, asked for or not; None where they do not matter.
    """

    target: Path
    units: list[Unit]
    rows: int
    assemble: Callable[[Mapping[str, Outcome]], list[Row]]
    input_ids: Collection[str] | None = None

    @property
    def journal(self) -> Path:
        """Where its journal lies."""
        return journal_path(self.target)


@dataclass(frozen=True)
class Settings:
    """How the texts are made.

    Attributes:
        compared: What must be equal for results to stand in one file; JSON values.
        info: What else is written into a new journal.
        seed: Every request's own seed is derived from it.
        do_sample: None leaves it to the checkpoint, False is greedy.
        max_new_tokens: Limit in tokens; None leaves it to the checkpoint.
        attempts: How many texts may be asked for until one is readable; all but the first are sampled.
        complaint: Why a text is not what was asked for, or None if it is.
    """

    compared: Mapping[str, Any]
    info: Mapping[str, Any]
    seed: int = 0
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    attempts: int = 1
    complaint: Callable[[str], str | None] = lambda text: None

    def next_attempt(self, outcome: Outcome | None) -> int | None:
        """Which attempt a unit needs next; None if it is done with. An attempt that ended in an error is repeated."""
        if outcome is None:
            return 0
        if outcome.error is not None:
            return outcome.attempt
        if self.complaint(outcome.text) is None or outcome.attempt + 1 >= self.attempts:
            return None
        return outcome.attempt + 1

    def failure(self, outcome: Outcome) -> str | None:
        """Why an outcome is a failure, or None if it is none."""
        return outcome.failure(self.complaint)


class State(Enum):
    """What is to be done about a result file, in the words that the user reads."""

    OPEN = "to be made"
    FINISHED = "finished already, left alone"
    FOREIGN = "made elsewhere (there is no journal beside it), left alone; --overwrite would replace it"
    CHANGED = "changed by someone since it was made, left alone; --overwrite would replace it"
    LARGER = "has rows that are not asked for now, left alone; --overwrite would replace it"


@dataclass
class FileReport:
    """What became of a result file; `outcomes` is empty for one that is not ours."""

    file: ResultFile
    state: State
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """How many texts are not there, because a process ended early."""
        return sum(unit.key not in self.outcomes for unit in self.file.units) if self.state is State.OPEN else 0

    def failures(self, settings: Settings) -> list[tuple[str, str]]:
        """(key, reason) of every unit that has no usable text."""
        known = [(unit.key, self.outcomes[unit.key]) for unit in self.file.units if unit.key in self.outcomes]
        return [(key, reason) for key, outcome in known if (reason := settings.failure(outcome))]


def inspect(
    files: Sequence[ResultFile], settings: Settings, *, overwrite: bool = False
) -> tuple[list[FileReport], list[MMRoleError]]:
    """Looks at what is there of each result file, and changes nothing.

    Args:
        files: What is to be made.
        settings: How.
        overwrite: Nothing of what is there counts.

    Returns:
        A report per file; and a problem for each whose journal is damaged, or was begun with other settings or prompts.
    """
    if overwrite:
        return [FileReport(file, State.OPEN) for file in files], []
    reports, problems = [], []
    for file in files:
        try:
            reports.append(_inspect(file, settings))
        except MMRoleError as error:
            problems.append(error)
    return reports, problems


def _inspect(file: ResultFile, settings: Settings) -> FileReport:
    content = known_of(file.target, settings.compared, settings.info)
    current = sha256_of(file.target)
    if content is None:
        return FileReport(file, State.FOREIGN if current else State.OPEN)
    outcomes = outcomes_of(file, content)
    return FileReport(file, _state(file, settings, content, outcomes, current), outcomes)


def _state(
    file: ResultFile, settings: Settings, content: JournalContent, outcomes: Mapping[str, Outcome], current: str | None
) -> State:
    if current is None:
        return State.OPEN
    pending = any(settings.next_attempt(outcomes.get(unit.key)) is not None for unit in file.units)
    if not pending and current == hashlib.sha256(published_json(file.assemble(outcomes))).hexdigest():
        return State.FINISHED
    made = content.entries.get(FILE_KEY, {"sha256": [], "rows": 0})
    if current not in [*made["sha256"], content.info.get("replaces")]:
        return State.CHANGED
    if current not in made["sha256"]:
        return State.OPEN
    there = [str(row["id"]) for row in read_json(file.target)]
    _check_same_input(file, there)
    return State.LARGER if current == made["sha256"][-1] and set(there) - _asked(file) else State.OPEN


class _Blank(dict[str, Outcome]):
    def __missing__(self, key: str) -> Outcome:
        return Outcome("", None, 0)


def _asked(file: ResultFile) -> set[str]:
    """The ids of the rows that the file will have: a limit, or an image that came, may choose others than before."""
    return {str(row["id"]) for row in file.assemble(_Blank())}


def _check_same_input(file: ResultFile, there: Sequence[str]) -> None:
    """Refuses to replace a file that was made from another input.

    Args:
        file: What is to be made.
        there: Ids of the rows that stand in it.

    Raises:
        MMRoleError: If some are not those of the present input.
    """
    strangers = [name for name in there if file.input_ids is not None and name not in file.input_ids]
    if strangers:
        raise MMRoleError(
            f"the file was made from another input: {len(strangers)} of its {len(there)} rows are not in this one",
            _some(strangers),
            file.target,
            "choose another output folder for this input, or give --overwrite to throw those results away",
        )


def _some(names: Sequence[str]) -> list[str]:
    return [*names[:_NAMED], *([f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else [])]


def outcomes_of(file: ResultFile, content: JournalContent) -> dict[str, Outcome]:
    """What journals know of a file's units.

    Raises:
        MMRoleError: If a unit's text was made from another prompt than the present one.
    """
    entries = content.entries
    known = {unit.key: (unit, entries[unit.key]) for unit in file.units if unit.key in entries}
    changed = [
        f"{key}: prompt {e['prompt']} there, {u.prompt} now" for key, (u, e) in known.items() if e["prompt"] != u.prompt
    ]
    if changed:
        raise MMRoleError(
            "the input has changed since these results were made; they would be mixed in one file",
            _some(changed),
            file.journal,
            "bring the input back, or choose another output folder, or give --overwrite to start anew",
        )
    return {key: Outcome(e.get("text", ""), e.get("error"), e["attempt"]) for key, (_, e) in known.items()}
