"""Result files and their journals: what exists already, and how the rest is written.

Each result file `<name>.json` has a journal `<name>.journal` beside it, with the settings and every text in order of
arrival. It is kept, so that the file can be extended (more rows, retried failures), and so that results of different
models, prompts or settings are never mixed in one file.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from data_utils.errors import MMRoleError, first_of
from data_utils.files import make_folder, published_json, read_json, write_bytes
from data_utils.journal import Journal, JournalContent, check_settings, read_journal
from data_utils.layout import journal_path
from data_utils.paths import listed, sha256_of
from data_utils.schema import Row
from eval.backends.backend import Completion, Prompt, another_model
from eval.running.task import Task

FILE_KEY = ""  # key of the lines about the result file itself; no prompt has an empty key


@dataclass(frozen=True)
class ResultFile:
    """A result file.

    Attributes:
        target: Its path.
        rows: Its rows, without their texts.
        prompts: The prompts of its texts.
        fill: Return a copy of a row with its texts, from the completions by key.
        input_ids: Ids of all rows of its input, selected or not.
    """

    target: Path
    rows: Sequence[Row]
    prompts: Sequence[Prompt]
    fill: Callable[[Row, Mapping[str, Completion]], Row]
    input_ids: Collection[str]

    @property
    def journal(self) -> Path:
        """The path of its journal."""
        return journal_path(self.target)

    def content(self, completions: Mapping[str, Completion]) -> bytes:
        """Return the bytes of the file."""
        return published_json([self.fill(row, completions) for row in self.rows])


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        compared: What must be equal for all results in one file; JSON values.
        info: Further facts for a new journal; `names` may name what is behind a compared value.
    """

    compared: Mapping[str, Any]
    info: Mapping[str, Any]


class State(Enum):
    """The state of a result file, in the words of the report."""

    OPEN = "to be made"
    FINISHED = "finished already, left alone"
    FOREIGN = "made elsewhere (there is no journal beside it), left alone; --overwrite would replace it"
    CHANGED = "changed by someone since it was made, left alone; --overwrite would replace it"
    LARGER = "has rows that are not selected now, left alone; --overwrite would replace it"


@dataclass
class FileReport:
    """The state of a result file; `completions` is empty for one that is not ours."""

    file: ResultFile
    state: State
    completions: Mapping[str, Completion] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """The number of texts that are missing because a run ended early."""
        if self.state is not State.OPEN:
            return 0
        return sum(prompt.key not in self.completions for prompt in self.file.prompts)

    @property
    def present(self) -> list[Completion]:
        """The existing completions of the file's prompts."""
        return [self.completions[prompt.key] for prompt in self.file.prompts if prompt.key in self.completions]

    def failures(self, task: Task) -> list[tuple[str, str]]:
        """Return (key, reason) of every prompt without a usable text."""
        keys = [prompt.key for prompt in self.file.prompts if prompt.key in self.completions]
        return [(key, reason) for key in keys if (reason := task.failure(self.completions[key]))]


def inspect(
    files: Sequence[ResultFile], task: Task, settings: Settings, *, overwrite: bool = False
) -> tuple[list[FileReport], list[MMRoleError]]:
    """Return the state of each result file, without changing anything.

    Args:
        files: The result files.
        task: Decides what is finished.
        settings: The settings of the run.
        overwrite: Ignore existing results.

    Returns:
        A report per file; and a problem for each whose journal is damaged, or has other settings or prompts.
    """
    if overwrite:
        return [FileReport(file, State.OPEN) for file in files], []
    reports, problems = [], []
    for file in files:
        try:
            reports.append(_inspect(file, task, settings))
        except MMRoleError as error:
            problems.append(error)
    return reports, problems


class ResultWriter:
    """Journals the completions of a result file, and writes it after the last one.

    The journal is open and locked. Existing results are kept until the first completion is recorded.

    Args:
        file: The result file.
        settings: The settings of the run.
        overwrite: Discard existing results.

    Raises:
        MMRoleError: The journal cannot be written or read, another process is writing it, or other settings began it.
    """

    def __init__(self, file: ResultFile, settings: Settings, *, overwrite: bool = False) -> None:
        self.file = file
        make_folder(file.target.parent, "nothing was started")
        content = None if overwrite else _read(file.target, settings)
        info = {**settings.info, "replaces": sha256_of(file.target)}
        compared = content.settings if content else settings.compared
        self._journal = Journal.open(file.journal, compared, info, overwrite=overwrite)
        self._outdated = _part_journals(file.target) if overwrite else []
        self.completions = _completions(file, content) if content else {}
        self._served = next((c.served for c in self.completions.values() if c.served), "")

    def record(self, prompt: Prompt, completion: Completion) -> Completion:
        """Journal a completion; surrogate characters become question marks.

        If a further attempt ends in an error, the unusable text of the attempt before is kept beside it.

        Raises:
            MMRoleError: It cannot be written, or it comes from another served model than the texts before.
        """
        if completion.served and self._served and completion.served != self._served:
            raise another_model(self._served, completion.served, self.file.journal)
        self._served = completion.served or self._served
        before = self.completions.get(prompt.key)
        text, error = _writable(completion.text), completion.error and _writable(completion.error)
        if error:
            text = before.text if before and completion.attempt else ""
        completion = replace(completion, text=text, error=error or None)
        for path in self._outdated:
            path.unlink(missing_ok=True)
        self._outdated = []
        self._journal.add(prompt.key, _entry(prompt, completion))
        self.completions[prompt.key] = completion
        return completion

    def finish(self) -> None:
        """Write the result file; its hash is journalled first, so that a crash cannot make it look foreign."""
        data = self.file.content(self.completions)
        known = self._journal.entries.get(FILE_KEY, {"sha256": []})["sha256"]
        digest = hashlib.sha256(data).hexdigest()
        self._journal.add(FILE_KEY, {"sha256": [*known, digest], "rows": len(self.file.rows)})
        self._journal.sync()
        target = self.file.target
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            with suppress(OSError):
                leftover.unlink()  # of a killed run: the lock is ours, so nobody else is writing this file
        write_bytes(target, data)

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _entry(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    entry: dict[str, Any] = {"prompt": prompt.fingerprint, "attempt": completion.attempt}
    if completion.text or not completion.error:
        entry["text"] = completion.text
    extra = {name: getattr(completion, name) for name in ("error", "refusal", "cut", "tokens", "served", "without")}
    return entry | {name: value for name, value in extra.items() if value}


def _inspect(file: ResultFile, task: Task, settings: Settings) -> FileReport:
    content = _read(file.target, settings)
    current = sha256_of(file.target)
    if content is None:
        return FileReport(file, State.FOREIGN if current else State.OPEN)
    completions = _completions(file, content)
    return FileReport(file, _state(file, task, content, completions, current), completions)


def _state(
    file: ResultFile, task: Task, content: JournalContent, completions: Mapping[str, Completion], current: str | None
) -> State:
    if current is None:
        return State.OPEN
    pending = any(task.next_attempt(completions.get(prompt.key)) is not None for prompt in file.prompts)
    if not pending and current == hashlib.sha256(file.content(completions)).hexdigest():
        return State.FINISHED
    made = content.entries.get(FILE_KEY, {"sha256": [], "rows": 0})
    if current not in [*made["sha256"], content.info.get("replaces")]:
        return State.CHANGED
    if current not in made["sha256"]:
        return State.OPEN
    present = [str(row["id"]) for row in read_json(file.target)]
    _check_same_input(file, present)
    # A limit or a picture added later may select other rows than before.
    wanted = {str(row["id"]) for row in file.rows}
    return State.LARGER if current == made["sha256"][-1] and set(present) - wanted else State.OPEN


def _check_same_input(file: ResultFile, present: Sequence[str]) -> None:
    """Refuse to replace a file that was made from another input."""
    strangers = [name for name in present if name not in file.input_ids]
    if strangers:
        raise MMRoleError(
            f"the file was made from another input: {len(strangers)} of its {len(present)} rows are not in this one",
            first_of(strangers),
            file.target,
            "choose another output folder for this input, or give --overwrite to discard those results",
        )


def _completions(file: ResultFile, content: JournalContent) -> dict[str, Completion]:
    """Return what a journal holds of a file's prompts.

    Raises:
        MMRoleError: A text was made from another prompt than the present one.
    """
    entries = content.entries
    known = {prompt.key: (prompt, entries[prompt.key]) for prompt in file.prompts if prompt.key in entries}
    changed = [
        f"{key}: prompt {entry['prompt']} there, {prompt.fingerprint} now"
        for key, (prompt, entry) in known.items()
        if entry["prompt"] != prompt.fingerprint
    ]
    if changed:
        raise MMRoleError(
            "the input has changed since these results were made; they would be mixed in one file",
            first_of(changed),
            file.journal,
            "restore the input, or choose another output folder, or give --overwrite to start again",
        )
    return {
        key: Completion(
            key,
            entry.get("text", ""),
            entry.get("error"),
            entry.get("refusal"),
            entry.get("cut", False),
            entry["attempt"],
            entry.get("tokens", 0),
            entry.get("served", ""),
            entry.get("without", ""),
        )
        for key, (_, entry) in known.items()
    }


def _read(target: Path, settings: Settings) -> JournalContent | None:
    """Return what a result file's journal holds; None if it holds no text yet.

    Raises:
        MMRoleError: It is damaged, was begun with other settings, or an earlier version wrote it in parts.
    """
    parts = [str(path) for path in _part_journals(target)]
    if parts:
        what = "an earlier version has written the journal in parts, one per process, which are not read any more"
        raise MMRoleError(what, parts, target, "give --overwrite to start again, or choose another output folder")
    content = read_journal(journal_path(target))
    if content is None or not content.entries:
        return None
    check_settings(journal_path(target), _with_dtype(content, settings), settings.compared, settings.info)
    return content


def _with_dtype(content: JournalContent, settings: Settings) -> JournalContent:
    """Return a journal with the dtype that `auto` stands for; an earlier version wrote `auto`."""
    if content.settings.get("dtype") != "auto" or settings.info.get("options", {}).get("dtype") != "auto":
        return content
    return replace(content, settings={**content.settings, "dtype": settings.compared.get("dtype")})


def _part_journals(target: Path) -> list[Path]:
    """Return the journals that the processes of an earlier version wrote: `<name>.journal.part-<process>`."""
    start = f"{journal_path(target).name}.part-"
    return [path for path in listed(target.parent) if path.name.startswith(start) and path.name[len(start) :].isdigit()]
