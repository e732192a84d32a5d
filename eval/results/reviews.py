"""One file of reviews: what could be counted, what could not and why, and its published CSV."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_utils.errors import MMRoleError
from data_utils.files import read_json
from eval.judging.metrics import METRIC_NAMES
from eval.judging.prompt import is_reviewable
from eval.judging.scores import ScoreReading, read_record

ZERO_DENOMINATOR = "model B scored 0, so the ratio is undefined"
_LEAST_DENOMINATOR = 1e-6  # what is less was mended by a bad hand, and would swallow the mean


@dataclass(frozen=True)
class FailedReview:
    """One review without a usable ratio: which row, which metric, why."""

    id: str
    metric: str
    reason: str


@dataclass
class FileResult:
    """What one file of reviews holds.

    Attributes:
        path: The file.
        rows: How many rows it has.
        ratios: (reviewed rows, 8) float64, score of model A over score of model B; nan where a review failed.
        empty: Ids of rows without an answer, which are never reviewed.
        not_reviewed: Ids of rows that have an answer and no review.
        failures: The reviews that `ratios` has a nan for.
        forgiven: How many pairs only the forgiving reader could read.
        retried: How many reviews took more than one attempt, failed ones included.
    """

    path: Path
    rows: int
    ratios: np.ndarray
    empty: list[str] = field(default_factory=list)
    not_reviewed: list[str] = field(default_factory=list)
    failures: list[FailedReview] = field(default_factory=list)
    forgiven: int = 0
    retried: int = 0

    @property
    def reviewed(self) -> int:
        """How many rows have reviews; the CSV's `count`."""
        return len(self.ratios)

    @property
    def means(self) -> np.ndarray:
        """(8,) mean ratio per metric over the rows where it did not fail; nan where none is left."""
        return np.array([sequential_mean(column) for column in self.ratios.T])


def sequential_mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of what is not nan, or nan if nothing is left."""
    total, count = 0.0, 0
    # published: one double after the other in file order. `sum` (compensated from Python 3.12 on) and numpy (pairwise)
    # differ in the last digits, which the CSV shows.
    for value in map(float, values):
        if not math.isnan(value):
            total += value
            count += 1
    return total / count if count else math.nan


def read_reviews(path: Path) -> FileResult:
    """Reads one file of reviews; failed reviews become data.

    Args:
        path: A file in the released format, from here or from the released scripts.

    Returns:
        Everything that can be counted in it.

    Raises:
        MMRoleError: If the file cannot be read, is no JSON or no list of rows.
    """
    rows = read_json(path, nan=True)  # the published rule reads such scores and its writer wrote them
    if not isinstance(rows, list):
        raise _not_rows(path, type(rows).__name__, "the whole file")
    strangers = [number for number, row in enumerate(rows, 1) if not isinstance(row, Mapping)]
    if strangers:
        raise _not_rows(path, rows[strangers[0] - 1], f"row {strangers[0]}")
    return _count(path, rows)


def csv_bytes(result: FileResult) -> bytes:
    """The published CSV: `count` and the mean ratios, floats in full, lines ended as `csv.writer` does."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["count", *METRIC_NAMES])
    writer.writerow([result.reviewed, *result.means.tolist()])
    return text.getvalue().encode("ascii")


def describe(result: FileResult) -> list[str]:
    """Lines for people: how many rows were counted, and everything that was not, with the reason."""
    counted = [f"{result.rows} rows", f"{result.reviewed} counted"]
    counted += [f"{len(result.empty)} without an answer"] if result.empty else []
    counted += [f"{len(result.not_reviewed)} not reviewed"] if result.not_reviewed else []
    counted += [f"failed reviews: {len(result.failures)}"] if result.failures else []
    lines = [", ".join(counted)]
    lines += [f"without an answer: {_some(result.empty)}"] if result.empty else []
    lines += [f"not reviewed: {_some(result.not_reviewed)}"] if result.not_reviewed else []
    for metric in METRIC_NAMES:
        reasons = Counter(failure.reason for failure in result.failures if failure.metric == metric)
        if reasons:
            left = result.reviewed - reasons.total()
            why = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
            lines.append(f"{metric}: mean over {left} of {result.reviewed} ({why})")
    lines += [f"pairs that only the forgiving reader could read: {result.forgiven}"] if result.forgiven else []
    return lines


def _count(path: Path, rows: Sequence[Mapping[str, Any]]) -> FileResult:
    reviewed = [row for row in rows if row.get("rm_review")]
    result = FileResult(path, len(rows), np.full((len(reviewed), len(METRIC_NAMES)), math.nan))
    for row in rows:
        if not row.get("rm_review"):
            (result.not_reviewed if _has_answer(row) else result.empty).append(str(row.get("id")))
    for i, row in enumerate(reviewed):
        reviews = row["rm_review"]
        for j, metric in enumerate(METRIC_NAMES):
            record = reviews.get(metric) if isinstance(reviews, Mapping) else reviews
            reading = read_record(record)
            ratio, reason = _ratio(reading)
            result.ratios[i, j] = ratio
            if reason:
                result.failures.append(FailedReview(str(row.get("id")), metric, reason))
            result.forgiven += reading.reader == "forgiving"
            result.retried += isinstance(record, Mapping) and record.get("attempts", 1) not in (None, 1)
    return result


def _ratio(reading: ScoreReading) -> tuple[float, str]:
    """The ratio and no reason, or nan and the reason."""
    if reading.pair is None:
        return math.nan, reading.reason
    a, b = reading.pair
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
