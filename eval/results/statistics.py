"""Estimates with intervals for clustered rows, and comparisons of agents on the same rows.

Rows of one character are not independent, so a character is a cluster. Every estimate here is a smooth function of
means; it is linearized, the influences of its rows are summed per cluster, and the variance is that of the clusters'
sums (the CR1 sandwich estimator) with a t quantile at clusters - 1 degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from eval.judging.metrics import METRIC_NAMES, METRICS

LEVEL = 0.95
POWER = 0.8
FEWEST_CLUSTERS = 8  # with fewer, an estimate has no interval
FLIPS = 9_999
DIMENSIONS = tuple(dict.fromkeys(metric.dimension for metric in METRICS))
OVERALL = "Overall"
COLUMNS = (*METRIC_NAMES, *DIMENSIONS, OVERALL)  # of an estimate
METRIC_COLUMNS = (*METRIC_NAMES, OVERALL)  # of the paper's table, and of most others


def _weights() -> np.ndarray:
    dimensions = np.array([[metric.dimension == name for name in DIMENSIONS] for metric in METRICS], dtype=float)
    overall = np.full((len(METRICS), 1), 1 / len(METRICS))
    return np.concatenate([np.eye(len(METRICS)), dimensions / dimensions.sum(axis=0), overall], axis=1)


WEIGHTS = _weights()  # (metrics, columns): each column is a weighted mean of metrics


@dataclass(frozen=True)
class Estimate:
    """Estimates of several columns; each array is (columns,).

    Attributes:
        value: The estimate; nan without data.
        error: Its standard error; nan below `FEWEST_CLUSTERS`.
        low: Lower end of the 95 % interval; nan below `FEWEST_CLUSTERS`.
        high: Its upper end.
        rows: How many rows contribute.
        clusters: How many clusters contribute.
        design_effect: Variance over that of as many independent rows.
    """

    value: np.ndarray
    error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray
    clusters: np.ndarray
    design_effect: np.ndarray


def linearized(value: np.ndarray, influence: np.ndarray, present: np.ndarray, clusters: np.ndarray) -> Estimate:
    """Return the interval of an estimate from the influences of its rows.

    Args:
        value: (columns,) the estimate.
        influence: (rows, columns) first-order change of the estimate by each row; sums to 0 in each column.
        present: (rows, columns) whether a row contributes.
        clusters: (rows,) number of each row's cluster, from 0.
    """
    rows = present.sum(axis=0)
    count = int(clusters.max()) + 1 if len(clusters) else 0
    belongs = np.zeros((count, len(clusters)))
    belongs[clusters, np.arange(len(clusters))] = 1
    number = (belongs @ present > 0).sum(axis=0)
    influence = np.where(present, influence, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        together = ((belongs @ influence) ** 2).sum(axis=0) * (number / (number - 1))
        alone = (influence**2).sum(axis=0) * (rows / (rows - 1))
        effect = np.where((alone > 0) & (number > 1), together / alone, np.nan)
        error = np.where((number >= FEWEST_CLUSTERS) & np.isfinite(value), np.sqrt(together), np.nan)
        half = error * stdtrit(np.maximum(number - 1, 1), (1 + LEVEL) / 2)
    return Estimate(value, error, value - half, value + half, rows, number, effect)


def mean(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """Means over rows: the metrics, the dimensions and Overall, which are means of metrics' means.

    Args:
        values: (rows, metrics), nan where there is none.
        clusters: (rows,) number of each row's cluster.
    """
    return _of_metrics(values, np.where(np.isnan(values), np.nan, 1.0), clusters)


def ratio_of_means(a: np.ndarray, b: np.ndarray, clusters: np.ndarray) -> Estimate:
    """Mean of `a` over mean of `b`, which no single small `b` can dominate; arguments as for `mean`."""
    return _of_metrics(a, b, clusters)


def _of_metrics(a: np.ndarray, b: np.ndarray, clusters: np.ndarray) -> Estimate:
    """sum(a) / sum(b) per metric, and the weighted means of these."""
    valid = ~(np.isnan(a) | np.isnan(b))
    a, b = np.where(valid, a, 0.0), np.where(valid, b, 0.0)
    total = b.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(total > 0, a.sum(axis=0) / total, np.nan)
        influence = np.where(total > 0, (a - value * b) / total, 0.0)
    missing = np.isnan(value)
    weighted = np.where(missing @ WEIGHTS > 0, np.nan, np.where(missing, 0.0, value) @ WEIGHTS)
    return linearized(weighted, influence @ WEIGHTS, valid @ WEIGHTS > 0, clusters)


def difference(first: np.ndarray, second: np.ndarray, clusters: np.ndarray) -> tuple[Estimate, np.ndarray]:
    """Return the mean difference of two agents on the same rows.

    Args:
        first: (rows, metrics), nan where there is none.
        second: The same rows of the other agent; only pairs without nan count.
        clusters: (rows,) number of each row's cluster.

    Returns:
        The estimate of each column, and the contribution of each row to it (rows, columns), for `sign_flip`.
    """
    paired = first - second
    valid = ~np.isnan(paired)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(valid, paired / valid.sum(axis=0), 0.0) @ WEIGHTS
    return mean(paired, clusters), np.where(valid @ WEIGHTS > 0, shares, np.nan)


def cluster_numbers(names: Sequence[object]) -> np.ndarray:
    """Number clusters from 0 in order of first appearance."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=int)


def sign_flip(differences: np.ndarray, clusters: np.ndarray, seed: int = 0, flips: int = FLIPS) -> np.ndarray:
    """Two-sided p values of "no difference" by flipping the signs of whole clusters.

    Args:
        differences: (rows, comparisons); nan where a row cannot be compared. Equal seeds flip equal clusters.
        clusters: (rows,) number of each row's cluster.
        seed: Seed of the flips.
        flips: The number of draws.

    Returns:
        (comparisons,) p values, at least 1 / (flips + 1); nan below `FEWEST_CLUSTERS`.
    """
    present = ~np.isnan(differences)
    count = int(clusters.max()) + 1 if len(clusters) else 0
    belongs = np.zeros((count, len(clusters)))
    belongs[clusters, np.arange(len(clusters))] = 1
    totals = belongs @ np.where(present, differences, 0.0)
    number = (belongs @ present > 0).sum(axis=0)
    signs = np.random.default_rng(seed).integers(0, 2, size=(flips, count)) * 2.0 - 1.0
    observed = np.abs(totals.sum(axis=0))
    tolerance = 1e-12 * np.abs(totals).sum(axis=0)
    beaten = (np.abs(signs @ totals) >= observed - tolerance).sum(axis=0)
    return np.where(number >= FEWEST_CLUSTERS, (1 + beaten) / (1 + flips), np.nan)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values of a family of comparisons; nan does not belong to the family."""
    adjusted = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p, kind="stable") if not np.isnan(p[i])]
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def smallest_difference(error: np.ndarray, clusters: np.ndarray, comparisons: int = 1) -> np.ndarray:
    """Return the smallest true difference that a two-sided test at 5 % shows with 80 % power.

    Args:
        error: Standard error of a difference.
        clusters: The number of clusters.
        comparisons: Size of the family; above 1, for the hardest step of Holm's procedure.
    """
    freedom = np.maximum(clusters - 1, 1)
    return error * (stdtrit(freedom, 1 - (1 - LEVEL) / 2 / comparisons) + stdtrit(freedom, POWER))


def length_regression(
    a: np.ndarray, b: np.ndarray, answer: np.ndarray, reference: np.ndarray, clusters: np.ndarray
) -> tuple[Estimate, int]:
    """Regress a row's mean log ratio on its log length difference.

    Args:
        a: (rows, metrics) scores of the answers; a score of 0 has no logarithm and is left out.
        b: (rows, metrics) scores of the references.
        answer: (rows,) lengths of the answers.
        reference: (rows,) lengths of the references.
        clusters: (rows,) number of each row's cluster.

    Returns:
        Estimates of three columns: the slope, the geometric mean ratio, and that ratio adjusted to answers as long as
        their references; and how many rows were left out for a score or a length of 0.
    """
    scored = ~(np.isnan(a) | np.isnan(b)).any(axis=1)
    usable = scored & (a > 0).all(axis=1) & (b > 0).all(axis=1) & (answer > 0) & (reference > 0)
    left_out = int(scored.sum() - usable.sum())
    y = np.log(a[usable] / b[usable]).mean(axis=1)
    x = np.log(answer[usable] / reference[usable])
    design = np.column_stack([np.ones_like(x), x])
    if len(y) < 3 or np.ptp(x) == 0:
        nothing = np.full(3, np.nan)
        zero = np.zeros(3, dtype=int)
        return Estimate(nothing, nothing, nothing, nothing, zero, zero, nothing), left_out
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ y
    influence = (y - design @ coefficients)[:, None] * (design @ inverse)
    logs = np.array([coefficients[1], y.mean(), coefficients[0]])
    columns = np.column_stack([influence[:, 1], (y - y.mean()) / len(y), influence[:, 0]])
    numbers = cluster_numbers(clusters[usable].tolist())
    estimate = linearized(logs, columns, np.ones_like(columns, dtype=bool), numbers)

    def scaled(values: np.ndarray) -> np.ndarray:
        return np.append(values[:1], np.exp(values[1:]))

    return (
        Estimate(
            scaled(estimate.value), estimate.error, scaled(estimate.low), scaled(estimate.high),
            estimate.rows, estimate.clusters, estimate.design_effect,
        ),
        left_out,
    )  # fmt: skip
