"""Review files as one long-form table: a record for each metric of each row, and the published CSV of a file."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_utils.errors import MMRoleError, raise_problems
from data_utils.files import read_json
from data_utils.layout import (
    KINDS,
    RELEASED_JUDGE,
    SHORT_SPLITS,
    file_of_tests,
    judge_folder,
    nested_agents,
    results_folder,
    reviews_folder,
)
from data_utils.paths import UnreadableError, is_folder, is_there, listed
from data_utils.prompts import category, prompt_language
from eval.judging.metrics import METRIC_NAMES
from eval.judging.prompt import is_reviewable
from eval.judging.scores import read_record

FILES = tuple((split, kind) for split in SHORT_SPLITS for kind in KINDS)
PUBLISHED_ROWS = {"in": 72, "out": 26}  # per file
IN_WEIGHT, OUT_WEIGHT = 0.75, 0.25

NO_ANSWER = "no answer"
NOT_REVIEWED = "not reviewed"
FAILED = "failed"
READ = "read"
ZERO_DENOMINATOR = "model B scored 0, so the ratio is undefined"
_LEAST_DENOMINATOR = 1e-6  # no judge writes a smaller one, and it would dominate the mean

DISPLAY_NAMES = {
    "gpt-4-turbo": "GPT-4 Turbo",
    "gemini-pro-vision": "Gemini Pro Vision",
    "claude-3-opus": "Claude 3 Opus",
    "qwen-vl-max": "QWen-VL-Max",
    "llava-next-yi-34b": "LLaVA-NeXT-34B",
    "yi-vl-34b": "Yi-VL-34B",
    "internvl-chat-v1-5": "InternVL-Chat-V1.5",
    "qwen-vl-chat": "QWen-VL-Chat",
    "llava-next-mistral-7b": "LLaVA-NeXT-Mistral-7B",
    "yi-vl-6b": "Yi-VL-6B",
    "mmrole-agent": "MMRole-Agent",
}


class Record(NamedTuple):
    """The review of one row on one metric. Every table and figure is computed from a list of these.

    Attributes:
        judge: Name of the judge.
        agent: The agent's folder.
        split: "in" or "out"; empty for a single file.
        kind: "comment", "human-role" or "inter-role"; the stem of a single file.
        number: The row's position in its file, from 0.
        row: The row's id.
        character: The role that the agent plays.
        script: The script of the role.
        category: The paper's category of the script.
        language: The language that the role must answer in.
        picture: The image's path below the image folder.
        metric: Name of the metric.
        a: Score of the evaluated answer; nan without one.
        b: Score of the reference; nan without one.
        ratio: a / b; nan where it is undefined.
        answer_length: Characters of the evaluated answer.
        reference_length: Characters of the reference.
        status: `READ`, `FAILED`, `NOT_REVIEWED` or `NO_ANSWER`.
        reader: "published" or "forgiving"; empty without scores.
        reason: Why there is no ratio; empty with one.
        attempts: The number of texts requested from the judge.
        swapped: Whether the judge saw the reference as model A.
    """

    judge: str
    agent: str
    split: str
    kind: str
    number: int
    row: str
    character: str
    script: str
    category: str
    language: str
    picture: str
    metric: str
    a: float
    b: float
    ratio: float
    answer_length: int
    reference_length: int
    status: str
    reader: str
    reason: str
    attempts: int
    swapped: bool


def ratios_of(records: Iterable[Record]) -> np.ndarray:
    """Return the (rows, metrics) ratios of records in file order; nan where there is none."""
    return np.array([record.ratio for record in records]).reshape(-1, len(METRIC_NAMES))


@dataclass
class ReviewFile:
    """One file of reviews.

    Attributes:
        path: The file.
        rows: Its rows, as read.
        records: One per row and metric, in file order.
    """

    path: Path
    rows: list[Mapping[str, Any]]
    records: list[Record]

    @property
    def reviewed(self) -> int:
        """The number of rows with reviews: the CSV's `count`."""
        return len(self.rows) - len(self.ids(NO_ANSWER)) - len(self.ids(NOT_REVIEWED))

    @property
    def failures(self) -> list[Record]:
        """The reviews without a usable ratio."""
        return [record for record in self.records if record.status == FAILED]

    @property
    def means(self) -> np.ndarray:
        """(metrics,) mean ratio over the rows where it is defined; nan where there is none."""
        return np.array([sequential_mean(column) for column in ratios_of(self.records).T])

    def ids(self, status: str) -> list[str]:
        """Return the ids of the rows whose reviews all have this status, `NO_ANSWER` or `NOT_REVIEWED`."""
        return [record.row for record in self.records[:: len(METRIC_NAMES)] if record.status == status]


@dataclass
class Agent:
    """The reviews of one agent.

    Attributes:
        folder: Its folder's name under `{in,out}-test_reviews`.
        files: Its readable files by (split, kind).
        unreadable: The files that exist but could not be read.
        problems: Errors in reading or writing its files.
    """

    folder: str
    files: dict[tuple[str, str], ReviewFile] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    problems: list[MMRoleError] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The paper's name for a published folder, else the folder's name with unprintable characters escaped."""
        plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in self.folder)
        return DISPLAY_NAMES.get(self.folder, plain)

    @property
    def complete(self) -> bool:
        """Whether all six files could be read and every answer in them is reviewed."""
        return len(self.files) == len(FILES) and not any(file.ids(NOT_REVIEWED) for file in self.files.values())

    @property
    def status(self) -> str:
        """`complete`, or what is missing for the paper's number, and whether the rows are the published ones."""
        missing = [f"{split}-test/{kind}" for split, kind in FILES if (split, kind) not in self.files]
        waiting = sum(len(file.ids(NOT_REVIEWED)) for file in self.files.values())
        notes = [f"no readable {', '.join(missing)}"] if missing else []
        notes += [f"answers not reviewed: {waiting}"] if waiting else []
        status = f"incomplete: {'; '.join(notes)}" if notes else "complete"
        rows = sum(len(file.rows) for file in self.files.values())
        published = sum(PUBLISHED_ROWS[split] for split, _ in self.files)
        return status if rows == published else f"{status}; {rows} rows where the published files have {published}"

    def records(self, split: str | None = None) -> list[Record]:
        """Return the records of one split, or of both, in a fixed order."""
        keys = [key for key in FILES if key in self.files and split in (None, key[0])]
        return [record for key in keys for record in self.files[key].records]

    def paper_scores(self, split: str | None = None) -> np.ndarray:
        """Return the paper's numbers: the metrics, then Overall; nan where reviews are missing.

        Per split the plain mean of its three files' means; then 0.75 In + 0.25 Out; Overall is the mean over metrics.
        """
        if split is None:
            # published: the caption speaks of the samples' mean, but the table weighs the two test sets 3 : 1.
            metrics = IN_WEIGHT * self._split_means("in") + OUT_WEIGHT * self._split_means("out")
        else:
            metrics = self._split_means(split)
        return np.append(metrics, metrics.mean())

    def _split_means(self, split: str) -> np.ndarray:
        files = [self.files[split, kind] for kind in KINDS if (split, kind) in self.files]
        if len(files) < len(KINDS) or any(file.ids(NOT_REVIEWED) for file in files):
            return np.full(len(METRIC_NAMES), math.nan)
        return sum(file.means for file in files) / len(KINDS)


def reviews_path(eval_dir: Path, split: str, folder: str, kind: str, judge: str = RELEASED_JUDGE) -> Path:
    """Return the path of one file of an agent's reviews."""
    return reviews_folder(eval_dir, split, folder, judge=judge) / file_of_tests(kind)


def csv_path(eval_dir: Path, split: str, folder: str, kind: str, judge: str = RELEASED_JUDGE) -> Path:
    """Return the path of the CSV of one file of an agent's reviews."""
    return (results_folder(eval_dir, split, folder, judge=judge) / file_of_tests(kind)).with_suffix(".csv")


def nested_reviews(eval_dir: Path, judge: str = RELEASED_JUDGE) -> list[MMRoleError]:
    """Return a problem for each agent whose reviews lie a folder too deep."""
    return [
        problem for split in SHORT_SPLITS for problem in nested_agents(reviews_folder(eval_dir, split, judge=judge))
    ]


def unexplained_csvs(eval_dir: Path, judge: str = RELEASED_JUDGE) -> list[Path]:
    """Return the CSVs of all agents whose reviews do not exist (any more), in order."""
    return [
        path
        for split, kind in FILES
        for path in sorted(csv_path(eval_dir, split, "", kind, judge).parent.glob(f"[!.]*/{kind}_test.csv"))
        if _has_no_reviews(reviews_path(eval_dir, split, path.parent.name, kind, judge))
    ]


def _has_no_reviews(path: Path) -> bool:
    try:
        return not is_there(path)
    except UnreadableError:
        return False  # they may exist


def read_agents(eval_dir: Path, judge: str = RELEASED_JUDGE, *, swapped: bool = False) -> list[Agent]:
    """Read the reviews of all agents; unreadable files are kept as the agent's problems.

    Args:
        eval_dir: The evaluation folder.
        judge: Whose reviews to read.
        swapped: Also read reviews with the two answers exchanged.

    Returns:
        The agents that have at least one such file, readable or not, by folder name.

    Raises:
        MMRoleError: If there is none.
    """
    folders: set[str] = set()
    closed: list[MMRoleError] = []
    for split in SHORT_SPLITS:
        try:
            shown = listed(reviews_folder(eval_dir, split, judge=judge))
            folders |= {folder.name for folder in shown if is_folder(folder)}
        except UnreadableError as error:
            closed += [error] if str(error) not in map(str, closed) else []
    agents = [_read_agent(eval_dir, folder, closed, judge, swapped) for folder in sorted(folders)]
    agents = [agent for agent in agents if agent.files or agent.unreadable]
    if not agents:
        raise_problems([*closed, *nested_reviews(eval_dir, judge)])
        raise MMRoleError(
            "no reviews here: no folder in-test_reviews/<agent> or out-test_reviews/<agent> has a file of reviews",
            judge_folder(eval_dir, judge),
            "--eval_dir, --judge",
            "run `bash eval/RM_review.sh` first, or give the folder that holds in-test_reviews and out-test_reviews",
        )
    return agents


def _read_agent(eval_dir: Path, folder: str, closed: list[MMRoleError], judge: str, swapped: bool) -> Agent:
    agent = Agent(folder, problems=list(closed))
    for split, kind in FILES:
        path = reviews_path(eval_dir, split, folder, kind, judge)
        try:
            if not is_there(path):
                continue
            agent.files[split, kind] = read_reviews(
                path, judge=judge, agent=folder, split=split, kind=kind, swapped=swapped
            )
        except MMRoleError as error:
            if str(error) not in map(str, agent.problems):  # an unreadable folder is reported once
                agent.problems.append(error)
            agent.unreadable.append((split, kind))
    return agent


def ranked(agents: list[Agent]) -> list[Agent]:
    """Sort agents, best first: by the paper's Overall, then those without one by the plain mean of all their ratios."""

    def key(agent: Agent) -> tuple[bool, float, str]:
        overall, ratios = agent.paper_scores()[-1], ratios_of(agent.records())
        has_none = math.isnan(overall)
        if has_none:
            overall = np.nanmean(ratios) if not np.isnan(ratios).all() else -math.inf
        return has_none, -overall, agent.folder

    return sorted(agents, key=key)


def sequential_mean(values: Sequence[float] | np.ndarray) -> float:
    """Return the mean of all values that are not nan, or nan if all are."""
    total, count = 0.0, 0
    # published: one double after the other in file order. `sum` (compensated from Python 3.12 on) and numpy (pairwise)
    # differ in the last digits, which the CSV shows.
    for value in map(float, values):
        if not math.isnan(value):
            total += value
            count += 1
    return total / count if count else math.nan


def read_reviews(
    path: Path,
    *,
    judge: str = RELEASED_JUDGE,
    agent: str = "",
    split: str = "",
    kind: str | None = None,
    swapped: bool = False,
) -> ReviewFile:
    """Read one file of reviews; failed reviews become data.

    Args:
        path: A file in the released format, from here or from the released scripts.
        judge: Name of the judge, for the records.
        agent: The agent's folder, for the records.
        split: "in" or "out", for the records.
        kind: Kind of the rows, for the records; the file's stem by default.
        swapped: Also read reviews with the two answers exchanged.

    Returns:
        The rows and a record for each metric of each.

    Raises:
        MMRoleError: If the file cannot be read, is not a JSON list of rows, or holds swapped reviews without `swapped`.
    """
    rows = read_json(path, nan=True)  # the published scripts accept and write such scores
    if not isinstance(rows, list):
        raise _not_rows(path, type(rows).__name__, "the whole file")
    strangers = [number for number, row in enumerate(rows, 1) if not isinstance(row, Mapping)]
    if strangers:
        raise _not_rows(path, rows[strangers[0] - 1], f"row {strangers[0]}")
    source = {"judge": judge, "agent": agent, "split": split, "kind": path.stem if kind is None else kind}
    records = [record for number, row in enumerate(rows) for record in _records(row, **source, number=number)]
    exchanged = [record.row for record in records if record.swapped]
    if exchanged and not swapped:
        raise MMRoleError(
            "these reviews have the two answers exchanged; the published numbers need reviews in the usual order",
            _some(list(dict.fromkeys(exchanged))),
            path,
            "give a folder without them; bash eval/agreement.sh compares the two orders",
        )
    return ReviewFile(path, rows, records)


def csv_bytes(file: ReviewFile) -> bytes:
    """Return the published CSV: `count` and the mean ratios, unrounded, with the line ends of `csv.writer`."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["count", *METRIC_NAMES])
    writer.writerow([file.reviewed, *file.means.tolist()])
    return text.getvalue().encode("ascii")


def describe(file: ReviewFile) -> list[str]:
    """Return lines for the user: how many rows were counted, and which were not, with the reason."""
    empty, waiting, failures = file.ids(NO_ANSWER), file.ids(NOT_REVIEWED), file.failures
    counted = [f"{len(file.rows)} rows", f"{file.reviewed} counted"]
    counted += [f"{len(empty)} without an answer"] if empty else []
    counted += [f"{len(waiting)} not reviewed"] if waiting else []
    counted += [f"failed reviews: {len(failures)}"] if failures else []
    lines = [", ".join(counted)]
    lines += [f"without an answer: {_some(empty)}"] if empty else []
    lines += [f"not reviewed: {_some(waiting)}"] if waiting else []
    for metric in METRIC_NAMES:
        reasons = Counter(record.reason for record in failures if record.metric == metric)
        if reasons:
            left = file.reviewed - reasons.total()
            why = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
            lines.append(f"{metric}: mean over {left} of {file.reviewed} ({why})")
    forgiven = sum(record.reader == "forgiving" for record in file.records)
    lines += [f"pairs read by the forgiving reader only: {forgiven}"] if forgiven else []
    return lines


def _records(row: Mapping[str, Any], **source: Any) -> list[Record]:
    """Return a record for each metric of a row; `source` are the fields of `Record` that name its file and place."""
    script = str(row.get("script", ""))
    about = {
        **source,
        "row": str(row.get("id")),
        "character": str(row.get("role", "")),
        "script": script,
        "category": category(script),
        "language": prompt_language(script),
        "picture": str(row.get("image", "")),
        "answer_length": len(text_of(row, 1, "answer")),
        "reference_length": len(text_of(row, 1, "value")),
    }
    return [Record(**about, metric=metric, **_outcome(row, metric)) for metric in METRIC_NAMES]


def _outcome(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return the fields of `Record` that depend on the review of a metric."""
    reviews = row.get("rm_review")
    found = {"a": math.nan, "b": math.nan, "ratio": math.nan, "reader": "", "attempts": 1, "swapped": False}
    if not reviews:
        status = NOT_REVIEWED if _has_answer(row) else NO_ANSWER
        return {**found, "status": status, "reason": status}
    stored = reviews.get(metric) if isinstance(reviews, Mapping) else reviews
    reading = read_record(stored)
    if isinstance(stored, Mapping):
        found |= {"attempts": stored.get("attempts") or 1, "swapped": stored.get("swapped") is True}
    if reading.pair is None:
        return {**found, "status": FAILED, "reason": reading.reason}
    # Stored in the judge's order: model A was the reference if the answers were swapped.
    a, b = reversed(reading.pair) if found["swapped"] else reading.pair
    ratio, reason = ratio_of(a, b)
    scores = {"a": a, "b": b, "ratio": ratio, "reader": reading.reader or ""}
    return {**found, **scores, "status": FAILED if reason else READ, "reason": reason}


def text_of(row: Mapping[str, Any], turn: int, key: str) -> str:
    """Return a text of a row of any shape; empty if there is none."""
    try:
        return str(row["conversations"][turn].get(key) or "")
    except (KeyError, IndexError, TypeError, AttributeError):
        return ""


def ratio_of(a: float, b: float) -> tuple[float, str]:
    """Return the ratio and no reason, or nan and the reason."""
    return (a / b, "") if b >= _LEAST_DENOMINATOR else (math.nan, ZERO_DENOMINATOR)


def _has_answer(row: Mapping[str, Any]) -> bool:
    try:
        return is_reviewable(row)
    except (KeyError, IndexError, TypeError, AttributeError):
        return False


def _not_rows(path: Path, value: object, where: str) -> MMRoleError:
    return MMRoleError(
        "not a file of reviews: it must be a list of rows, each an object",
        value,
        f"{path}, {where}",
        "give the files that eval/RM_review.py wrote",
    )


def _some(ids: Sequence[str], most: int = 3) -> str:
    rest = len(ids) - most
    return ", ".join(ids[:most]) + (f" and {rest} more (all in report.json)" if rest > 0 else "")
