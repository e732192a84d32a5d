"""All numbers of the report, computed from the records of all agents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from data_utils.layout import SHORT_SPLITS
from eval.judging.metrics import METRIC_NAMES
from eval.results.judges import PositionBias, Spread
from eval.results.origins import Origin
from eval.results.reviews import FAILED, NO_ANSWER, NOT_REVIEWED, Agent, Record, ranked
from eval.results.statistics import (
    COLUMNS,
    LEVEL,
    OVERALL,
    Estimate,
    cluster_numbers,
    difference,
    holm,
    length_regression,
    mean,
    ratio_of_means,
    sign_flip,
    smallest_difference,
)

ALL = "all"
SETS: dict[str | None, str] = {None: ALL} | {split: f"{split.capitalize()}-Test" for split in SHORT_SPLITS}
MEAN_RATIO, RATIO_OF_MEANS = "mean ratio", "ratio of means"
GROUPINGS = ("split", "kind", "category", "language", "character")  # fields of a record


class Group(NamedTuple):
    """The rows of an agent that an estimate is about."""

    agent: str
    by: str
    value: str


class Comparison(NamedTuple):
    """Two agents on the rows that both have: the first one's mean ratio minus the second one's.

    Attributes:
        split: None for both.
        first: An agent's folder.
        second: The other agent's folder; ranked below the first.
        column: A metric, a dimension or Overall.
        rows: How many rows both have.
        clusters: How many characters these have.
        difference: The estimate.
        error: Its standard error; like low and high nan for few clusters.
        low: Lower end of the 95 % interval.
        high: Upper end of the interval.
        p: p value by flipping signs of characters.
        adjusted: p after Holm's procedure over all pairs of agents.
    """

    split: str | None
    first: str
    second: str
    column: str
    rows: int
    clusters: int
    difference: float
    error: float
    low: float
    high: float
    p: float
    adjusted: float

    @property
    def apart(self) -> bool:
        """Whether the difference is significant."""
        return self.adjusted < 1 - LEVEL


class SmallestDifference(NamedTuple):
    """The smallest difference in a column that a set can show at 80 % power, for the median pair of agents."""

    split: str | None
    column: str
    one_comparison: float
    all_comparisons: float


@dataclass(frozen=True)
class AgentReport:
    """One agent with its numbers.

    Attributes:
        agent: Its files.
        paper: By split (None is both): the paper's numbers for the metrics and Overall; nan where there is none.
        counts: By split: rows, reviewed, without_answer, not_reviewed, failed_reviews, forgiving_reader, retried.
        length: Slope of log ratio on log length difference, geometric mean ratio, and that adjusted to equal lengths.
        length_left_out: Rows that the regression cannot use.
    """

    agent: Agent
    paper: dict[str | None, np.ndarray]
    counts: dict[str | None, dict[str, int]]
    length: Estimate
    length_left_out: int


@dataclass(frozen=True)
class Report:
    """All numbers.

    Attributes:
        agents: Best first.
        estimates: (`MEAN_RATIO` or `RATIO_OF_MEANS`, group) -> an estimate for each of `COLUMNS`.
        comparisons: All pairs of agents, sets and columns.
        smallest: The differences that the sets can show.
        position_bias: The judge with the two answers exchanged, if it has reviewed them so.
        spread: The judge's repeated reviews, if there are any.
        origins: How answers and reviews were made, as far as known.
    """

    agents: list[AgentReport]
    estimates: dict[tuple[str, Group], Estimate]
    comparisons: list[Comparison]
    smallest: list[SmallestDifference]
    position_bias: PositionBias | None = None
    spread: Sequence[Spread] = ()
    origins: Sequence[Origin] = ()

    @property
    def judge(self) -> str:
        """The judge's name, which all records share; empty without a record."""
        return next((record.judge for one in self.agents for record in one.agent.records()), "")

    def samples(self, agent: str, split: str | None = None, statistic: str = MEAN_RATIO) -> Estimate:
        """Return the estimate over an agent's rows of one split, or of both."""
        return self.estimates[statistic, Group(agent, ALL if split is None else "split", split or ALL)]


@dataclass(frozen=True)
class Scores:
    """The records of an agent as arrays.

    Attributes:
        rows: The first record of each row, for what all records of a row share.
        a: (rows, metrics) scores of the answers, nan where the ratio is undefined.
        b: (rows, metrics) scores of the references.
        ratios: (rows, metrics).
        characters: (rows,) number of each row's character.
    """

    rows: list[Record]
    a: np.ndarray
    b: np.ndarray
    ratios: np.ndarray
    characters: np.ndarray


def scores_of(records: Sequence[Record]) -> Scores:
    """Arrange records, complete rows in file order, as arrays."""
    numbers = np.array([(record.a, record.b, record.ratio) for record in records])
    a, b, ratios = np.moveaxis(numbers.reshape(-1, len(METRIC_NAMES), 3), 2, 0)
    undefined = np.isnan(ratios)
    rows = list(records[:: len(METRIC_NAMES)])
    characters = cluster_numbers([(row.script, row.character) for row in rows])
    return Scores(rows, np.where(undefined, np.nan, a), np.where(undefined, np.nan, b), ratios, characters)


def build_report(
    agents: list[Agent],
    *,
    seed: int = 0,
    position_bias: PositionBias | None = None,
    spread: Sequence[Spread] = (),
    origins: Sequence[Origin] = (),
) -> Report:
    """Compute all numbers, best agent first.

    Args:
        agents: The agents with their reviews.
        seed: Seed of the permutation tests; an agent's intervals depend neither on it nor on the other agents.
        position_bias: The judge with the two answers exchanged.
        spread: The judge's repeated reviews.
        origins: How answers and reviews were made.
    """
    ordered = ranked(agents)
    scores = {agent.folder: scores_of(agent.records()) for agent in ordered}
    estimates = {}
    for folder, score in scores.items():
        estimates |= _estimates(folder, score)
    comparisons = [found for split in SETS for found in _compare(scores, split, seed)]
    found = [_agent(agent, scores[agent.folder]) for agent in ordered]
    return Report(found, estimates, comparisons, _smallest(comparisons), position_bias, spread, origins)


def _agent(agent: Agent, scores: Scores) -> AgentReport:
    length, left_out = length_regression(
        scores.a,
        scores.b,
        np.array([row.answer_length for row in scores.rows]),
        np.array([row.reference_length for row in scores.rows]),
        scores.characters,
    )
    return AgentReport(
        agent,
        {split: agent.paper_scores(split) for split in SETS},
        {split: counts(agent.records(split)) for split in SETS},
        length,
        left_out,
    )


def counts(records: Sequence[Record]) -> dict[str, int]:
    """Count rows and, from `failed_reviews` on, single reviews."""
    rows = records[:: len(METRIC_NAMES)]
    empty, waiting = (sum(row.status == status for row in rows) for status in (NO_ANSWER, NOT_REVIEWED))
    return {
        "rows": len(rows),
        "reviewed": len(rows) - empty - waiting,
        "without_answer": empty,
        "not_reviewed": waiting,
        "failed_reviews": sum(record.status == FAILED for record in records),
        "forgiving_reader": sum(record.reader == "forgiving" for record in records),
        "retried": sum(record.attempts != 1 for record in records),
    }


def _estimates(agent: str, scores: Scores) -> dict[tuple[str, Group], Estimate]:
    groups = {Group(agent, ALL, ALL): np.ones(len(scores.rows), dtype=bool)}
    # A split without rows has an empty estimate.
    groups |= {Group(agent, "split", split): np.zeros(len(scores.rows), dtype=bool) for split in SHORT_SPLITS}
    for by in GROUPINGS:
        for i, row in enumerate(scores.rows):
            group = Group(agent, by, getattr(row, by))
            groups.setdefault(group, np.zeros(len(scores.rows), dtype=bool))[i] = True
    found = {}
    for group, rows in groups.items():
        characters = cluster_numbers(scores.characters[rows].tolist())
        found[MEAN_RATIO, group] = mean(scores.ratios[rows], characters)
        if group.by != "character":
            found[RATIO_OF_MEANS, group] = ratio_of_means(scores.a[rows], scores.b[rows], characters)
    return found


def _compare(scores: dict[str, Scores], split: str | None, seed: int) -> list[Comparison]:
    """Compare all pairs of agents on one set."""
    keys: dict[tuple[str, str, str], Record] = {}
    for score in scores.values():
        for row in score.rows:
            if split in (None, row.split):
                keys.setdefault((row.split, row.kind, row.row), row)
    place = {key: i for i, key in enumerate(keys)}
    characters = cluster_numbers([(row.script, row.character) for row in keys.values()])
    ratios = {}
    for folder, score in scores.items():
        ratios[folder] = np.full((len(keys), len(METRIC_NAMES)), np.nan)
        for row, values in zip(score.rows, score.ratios, strict=True):
            if split in (None, row.split):
                ratios[folder][place[row.split, row.kind, row.row]] = values
    pairs = list(combinations(scores, 2))
    if not pairs or not keys:
        return []
    found = [difference(ratios[first], ratios[second], characters) for first, second in pairs]
    shares = np.concatenate([share for _, share in found], axis=1)
    p = sign_flip(shares, characters, seed).reshape(len(pairs), len(COLUMNS))
    adjusted = np.apply_along_axis(holm, 0, p)
    return [
        Comparison(
            split, first, second, column, int(estimate.rows[j]), int(estimate.clusters[j]), float(estimate.value[j]),
            float(estimate.error[j]), float(estimate.low[j]), float(estimate.high[j]), float(p[i, j]),
            float(adjusted[i, j]),
        )
        for i, ((first, second), (estimate, _)) in enumerate(zip(pairs, found, strict=True))
        for j, column in enumerate(COLUMNS)
    ]  # fmt: skip


def _smallest(comparisons: list[Comparison]) -> list[SmallestDifference]:
    found = []
    for split in SETS:
        for column in COLUMNS:
            chosen = [c for c in comparisons if (c.split, c.column) == (split, column) and not np.isnan(c.error)]
            if chosen:
                errors = np.array([comparison.error for comparison in chosen])
                clusters = np.array([comparison.clusters for comparison in chosen])
                sizes = (smallest_difference(errors, clusters, family) for family in (1, len(chosen)))
                found.append(SmallestDifference(split, column, *(float(np.median(size)) for size in sizes)))
    return found


def indistinguishable_pairs(
    report: Report, split: str | None = None, column: str = OVERALL
) -> tuple[list[Comparison], int]:
    """Return the pairs of agents that cannot be told apart, and the number of all pairs."""
    chosen = [c for c in report.comparisons if (c.split, c.column) == (split, column)]
    return [comparison for comparison in chosen if not comparison.apart], len(chosen)
