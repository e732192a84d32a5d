"""How reliable judges are: agreement of two judges, and of a judge with itself, swapped and repeated."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from data_utils.errors import MMRoleError, raise_problems
from data_utils.layout import check_folder_name
from data_utils.paths import is_file, is_folder
from eval.judging.metrics import METRIC_NAMES
from eval.judging.scores import HIGHEST, LOWEST
from eval.results.reviews import FAILED, READ, Record, ratio_of, read_agents
from eval.results.statistics import FEWEST_CLUSTERS, LEVEL, METRIC_COLUMNS, OVERALL, Estimate, cluster_numbers, mean

CSV_COLUMNS = ("id", "agent", "metric", "score_agent", "score_reference")
PAPER_AGREEMENT = (
    "The paper reports for its reward model a mean absolute error of 0.074 and a Pearson correlation of 0.81 against "
    "GPT-4, and 0.126 and 0.65 against people (the paper's figures, not computed here)."
)
_RANKING = "ranking tau"


class Key(NamedTuple):
    """The key of one review of any judge."""

    agent: str
    row: str
    metric: str


class Agreement(NamedTuple):
    """One statistic of agreement in one column.

    Attributes:
        column: A metric or Overall.
        statistic: Name of the statistic.
        value: The estimate; nan where it does not exist.
        low: Lower end of the 95 % interval; nan for fewer than eight characters.
        high: Its upper end.
        rows: How many pairs of rows contribute.
        clusters: How many characters these have.
    """

    column: str
    statistic: str
    value: float
    low: float
    high: float
    rows: int
    clusters: int


@dataclass(frozen=True)
class CommonReviews:
    """The reviews that several judges have in common.

    Attributes:
        scores: (judges, rows, metrics, 2) scores of answer and reference; nan where a judge lacks the review.
        names: The agents' folders.
        agents: (rows,) number of each row's agent.
        clusters: (rows,) number of each row's character.
        alone: For each judge the number of reviews that another one lacks.
    """

    scores: np.ndarray
    names: list[str]
    agents: np.ndarray
    clusters: np.ndarray
    alone: list[int]

    @property
    def ratios(self) -> np.ndarray:
        """(judges, rows, metrics) scores of answers over those of references."""
        return self.scores[..., 0] / self.scores[..., 1]

    @property
    def leads(self) -> np.ndarray:
        """(judges, rows, metrics) scores of answers minus those of references."""
        return self.scores[..., 0] - self.scores[..., 1]


def read_judge(source: str, eval_dir: Path) -> tuple[str, list[Record]]:
    """Read the reviews of one judge.

    Args:
        source: The name of a judge under `eval_dir`, a folder laid out like it, or a CSV of people's scores.
        eval_dir: The evaluation folder.

    Returns:
        A name for it, and its records; those of people have no character, and are means of all lines on a review.

    Raises:
        MMRoleError: There are no reviews, or some of them cannot be read.
    """
    path = Path(source)
    if are_people(source):
        return path.stem, [_of_people(path.stem, key, pairs) for key, pairs in read_people(path).items()]
    if "/" in source or source in (".", ".."):
        if not is_folder(path):
            raise MMRoleError("there is no such folder of reviews", source, "command line", "check the path")
        name, agents = path.resolve().name, read_agents(path, swapped=True)
    else:
        check_folder_name(source, "command line")
        name, agents = source, read_agents(eval_dir, source, swapped=True)
    raise_problems([problem for agent in agents for problem in agent.problems])
    return name, [record for agent in agents for record in agent.records()]


def are_people(source: str) -> bool:
    """Return whether a judge is a CSV of people's scores."""
    return source.lower().endswith(".csv") or is_file(Path(source))


def read_people(path: Path) -> dict[Key, list[tuple[float, float]]]:
    """Read `id, agent, metric, score_agent, score_reference`, one line a person: the scores of each review.

    Raises:
        MMRoleError: The file cannot be read, or holds no scores, or others than scores.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise MMRoleError(f"cannot read the file: {error.strerror}", path, fix="check the path") from error
    except UnicodeDecodeError:
        raise MMRoleError("the file is not UTF-8 text", path, fix="save it as UTF-8") from None
    lines = csv.DictReader(io.StringIO(text))
    missing = [name for name in CSV_COLUMNS if name not in (lines.fieldnames or [])]
    if missing:
        fix = f"give it the columns {', '.join(CSV_COLUMNS)}"
        raise MMRoleError("the CSV lacks columns", missing, path, fix)
    scores: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    problems = []
    for line in lines:
        where = f"{path}, line {lines.line_num}"
        if line["metric"] not in METRIC_NAMES:
            problems.append(MMRoleError("no such metric", line["metric"], where, f"one of {', '.join(METRIC_NAMES)}"))
            continue
        try:
            pair = (float(line["score_agent"]), float(line["score_reference"]))
        except (TypeError, ValueError):
            pair = (math.nan, math.nan)
        if not all(LOWEST <= score <= HIGHEST for score in pair):
            value = f"{line['score_agent']}, {line['score_reference']}"
            fix = f"give two numbers from {LOWEST:g} to {HIGHEST:g}"
            problems.append(MMRoleError("these are not scores", value, where, fix))
            continue
        scores[Key(line["agent"], line["id"], line["metric"])].append(pair)
    raise_problems(problems)
    if not scores:
        raise MMRoleError("the CSV holds no scores", path, fix="give one line for each review and person")
    return scores


def among_people(scores: Mapping[Key, Sequence[tuple[float, float]]]) -> tuple[int, float]:
    """Return how many reviews have several people's scores, and Krippendorff's alpha of the ratios; it may be nan."""
    ratios = [[ratio_of(*pair)[0] for pair in pairs] for pairs in scores.values()]
    ratios = [found for given in ratios if len(found := [ratio for ratio in given if not math.isnan(ratio)]) > 1]
    if not ratios:
        return 0, math.nan
    units = np.repeat(np.arange(len(ratios)), [len(found) for found in ratios])
    return len(ratios), krippendorff_alpha(np.concatenate(ratios), units)


def _of_people(judge: str, key: Key, pairs: list[tuple[float, float]]) -> Record:
    a, b = (float(score) for score in np.mean(pairs, axis=0))
    ratio, reason = ratio_of(a, b)
    return Record(
        judge=judge, agent=key.agent, split="", kind="", number=0, row=key.row, character="", script="", category="",
        language="", picture="", metric=key.metric, a=a, b=b, ratio=ratio, answer_length=0, reference_length=0,
        status=FAILED if reason else READ, reader="", reason=reason, attempts=len(pairs), swapped=False,
    )  # fmt: skip


def common(*judges: Sequence[Record]) -> CommonReviews:
    """Match the reviews of judges by agent, file, row and metric; a review without a ratio counts as none."""
    # People name a row by its id alone; several files may use the same id.
    files = all(record.split for records in judges for record in records)
    read = [
        {
            Key(r.agent, f"{r.split} {r.kind} {r.row}" if files else r.row, r.metric): r
            for r in records
            if r.status == READ
        }
        for records in judges
    ]
    shared = set.intersection(*(set(found) for found in read))
    rows = dict.fromkeys((key.agent, key.row) for key in read[0] if key in shared)  # in the order of the first judge
    place = {row: i for i, row in enumerate(rows)}
    characters: list[object] = list(rows)  # a row itself, if no judge names its character
    scores = np.full((len(judges), len(rows), len(METRIC_NAMES), 2), np.nan)
    for judge, found in enumerate(read):
        for key in shared:
            record, i = found[key], place[key.agent, key.row]
            scores[judge, i, METRIC_NAMES.index(key.metric)] = record.a, record.b
            if record.character:
                characters[i] = (record.script, record.character)
    names = list(dict.fromkeys(agent for agent, _ in rows))
    return CommonReviews(
        scores,
        names,
        np.array([names.index(agent) for agent, _ in rows], dtype=int),
        cluster_numbers(characters),
        [len(found) - len(shared) for found in read],
    )


def agreement(pairs: CommonReviews) -> list[Agreement]:
    """Return all statistics of two judges, per metric and for Overall; intervals leave out one character at a time."""
    found = []
    for j, column in enumerate(METRIC_COLUMNS):
        metrics = slice(None) if column == OVERALL else slice(j, j + 1)
        present = ~np.isnan(pairs.ratios[0][:, metrics]).all(axis=1)
        if not present.any():
            continue
        x, y = (np.nanmean(ratios[present][:, metrics], axis=1) for ratios in pairs.ratios)
        leads = [np.nanmean(lead[present][:, metrics], axis=1) for lead in pairs.leads]
        values = np.array([x, y, *np.sign(np.round(leads, 9)), pairs.agents[present]])
        clusters = cluster_numbers(pairs.clusters[present].tolist())
        count = clusters.max() + 1
        whole = _statistics(*values)
        without = [_statistics(*values[:, clusters != i]) for i in range(count if count >= FEWEST_CLUSTERS else 0)]
        for name, value in whole.items():
            low = high = math.nan
            if without and not math.isnan(value):
                half = _jackknife(np.array([each[name] for each in without]))
                low, high = (_bounded(end, name) for end in (value - half, value + half))
            found.append(Agreement(column, name, value, low, high, len(x), int(count)))
    return found


def _jackknife(values: np.ndarray) -> float:
    """Return half the width of the 95 % interval, from the estimates that leave out one cluster each."""
    count = len(values)
    error = math.sqrt((count - 1) / count * ((values - values.mean()) ** 2).sum())
    return error * float(stdtrit(count - 1, (1 + LEVEL) / 2))


def _bounded(end: float, statistic: str) -> float:
    limits = {"mean absolute error": (0, math.inf), "same winner": (0, 1)}
    unbounded = ("bias", "lower limit of agreement", "upper limit of agreement")
    lowest, highest = (-math.inf, math.inf) if statistic in unbounded else limits.get(statistic, (-1, 1))
    return min(max(end, lowest), highest)


def _statistics(
    x: np.ndarray, y: np.ndarray, x_wins: np.ndarray, y_wins: np.ndarray, agents: np.ndarray
) -> dict[str, float]:
    from scipy.stats import rankdata  # takes as long to import as everything else here

    difference = x - y
    spread = 1.96 * float(difference.std(ddof=1)) if len(x) > 1 else math.nan
    bias = float(difference.mean())
    means = [np.array([values[agents == agent].mean() for agent in np.unique(agents)]) for values in (x, y)]
    return {
        "mean absolute error": float(np.abs(difference).mean()),
        "bias": bias,
        "lower limit of agreement": bias - spread,
        "upper limit of agreement": bias + spread,
        "Pearson": pearson(x, y),
        "Spearman": pearson(rankdata(x), rankdata(y)),
        "Kendall tau-b": _kendall(x, y),
        "Krippendorff alpha": krippendorff_alpha(np.concatenate([x, y]), np.tile(np.arange(len(x)), 2)),
        "same winner": float((x_wins == y_wins).mean()),
        "kappa of the winner": kappa(x_wins, y_wins),
        _RANKING: _kendall(*means),
    }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation; nan if a judge always gives the same score."""
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 1e-12 else math.nan


def _kendall(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(x, y).statistic) if len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0 else math.nan


def krippendorff_alpha(values: np.ndarray, units: np.ndarray) -> float:
    """Krippendorff's alpha for interval data; nan where all values are the same.

    Args:
        values: (values,) all ratings, whoever gave them.
        units: (values,) number of what each is about, from 0; each has at least two.
    """
    counts = np.bincount(units)
    means = np.bincount(units, values) / counts
    within = np.bincount(units, (values - means[units]) ** 2) / (counts - 1)
    expected = float(values.var(ddof=1)) if len(values) > 1 else 0.0
    return 1 - float(counts @ within) / len(values) / expected if expected > 1e-12 else math.nan


def kappa(x: np.ndarray, y: np.ndarray) -> float:
    """Return Cohen's kappa of two judges' categories; nan if agreement by chance is certain."""
    names = np.union1d(x, y)
    chance = sum(float((x == name).mean() * (y == name).mean()) for name in names)
    return (float((x == y).mean()) - chance) / (1 - chance) if chance < 1 - 1e-12 else math.nan


@dataclass(frozen=True)
class PositionBias:
    """A judge's reviews in both orders of the two answers; each estimate has the metrics, the dimensions and Overall.

    Attributes:
        consistency: Share of reviews with the same winner, or a tie, in both orders.
        preference: Advantage of the first place in score points.
        averaged: Per agent's folder: its mean ratio, averaged over both orders.
        reviews: How many reviews were read in both orders.
    """

    consistency: Estimate
    preference: Estimate
    averaged: dict[str, Estimate]
    reviews: int


def position_bias(judge: Sequence[Record], swapped: Sequence[Record]) -> PositionBias | None:
    """Compare a judge's reviews with those in which it saw the reference first; None without a common review."""
    both = common(judge, swapped)
    if not both.names:
        return None
    usual, other_order = both.leads
    same = np.where(np.isnan(usual), np.nan, np.sign(usual) == np.sign(other_order))
    return PositionBias(
        mean(same, both.clusters),
        mean((usual - other_order) / 2, both.clusters),  # the first place adds to one and takes from the other
        {
            name: mean(both.ratios.mean(axis=0)[both.agents == i], _renumbered(both.clusters[both.agents == i]))
            for i, name in enumerate(both.names)
        },
        int((~np.isnan(same)).sum()),
    )


class Spread(NamedTuple):
    """The spread of a judge's repeated reviews of an agent: standard deviations of ratios.

    Attributes:
        agent: The agent's folder.
        review: Of a single review.
        row: Of a row's Overall.
        mean: Of the agent's Overall.
        same: Share of reviews with equal scores each time.
    """

    agent: str
    review: float
    row: float
    mean: float
    same: float


def spread(*repeats: Sequence[Record]) -> list[Spread]:
    """Compare a judge's repeated reviews of the same answers."""
    all_of_them = common(*repeats)
    found = []
    for i, name in enumerate(all_of_them.names):
        chosen = all_of_them.agents == i
        ratios, scores = all_of_them.ratios[:, chosen], all_of_them.scores[:, chosen]
        overall = np.nanmean(ratios, axis=2)
        equal = (scores == scores[:1]).all(axis=(0, 3))[~np.isnan(ratios[0])]
        found.append(
            Spread(
                name,
                math.sqrt(float(np.nanmean(ratios.var(axis=0, ddof=1)))),
                math.sqrt(float(overall.var(axis=0, ddof=1).mean())),
                float(overall.mean(axis=1).std(ddof=1)),
                float(equal.mean()),
            )
        )
    return found


def _renumbered(clusters: np.ndarray) -> np.ndarray:
    return cluster_numbers(clusters.tolist())
