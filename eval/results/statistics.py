"""Sample means with bootstrap percentile intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4_000
LEVEL = 0.95
_BLOCK = 2_000_000  # drawn row numbers at a time, to bound memory for any number of rows


@dataclass(frozen=True)
class Estimate:
    """Means with their intervals; each array is (9,): the eight metrics, then their mean, Overall."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def sample_means(ratios: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean ratio per metric over all samples, and Overall, with 95 % bootstrap percentile intervals.

    Whole rows are drawn, so that Overall's interval keeps the correlation of a row's eight ratios. Equal input and seed
    give equal intervals. (scipy.stats.bootstrap would do; importing it takes longer than all of this.)

    Args:
        ratios: (rows, 8), nan where a review failed; a failed one is left out of its metric's mean.
        seed: Of the draws.
        resamples: How many draws of all rows.

    Returns:
        Means and interval ends; nan where no row is left.
    """
    rows, metrics = ratios.shape
    valid = ~np.isnan(ratios)
    # One product gives sums and counts of every draw: (rows, 2 * metrics).
    table = np.concatenate([np.where(valid, ratios, 0.0), valid.astype(np.float64)], axis=1)
    mean = _with_overall(table.sum(axis=0, keepdims=True), metrics)[0]
    if not rows:
        return Estimate(mean, mean, mean)
    generator = np.random.default_rng(seed)
    block = max(1, min(resamples, _BLOCK // rows))
    draws = [
        _with_overall(_draw(generator, min(block, resamples - start), rows) @ table, metrics)
        for start in range(0, resamples, block)
    ]
    tail = 100 * (1 - LEVEL) / 2
    ends = np.array([_percentiles(column, tail) for column in np.concatenate(draws).T])
    return Estimate(mean, ends[:, 0], ends[:, 1])


def _draw(generator: np.random.Generator, draws: int, rows: int) -> np.ndarray:
    """(draws, rows) how often each row was drawn, `rows` drawn with replacement each time."""
    chosen = generator.integers(rows, size=(draws, rows)) + np.arange(draws)[:, None] * rows
    return np.bincount(chosen.ravel(), minlength=draws * rows).reshape(draws, rows).astype(np.float64)


def _with_overall(sums: np.ndarray, metrics: int) -> np.ndarray:
    """(draws, 2 * metrics) sums and counts -> (draws, metrics + 1) means and their mean; nan where a count is 0."""
    counts = sums[:, metrics:]
    means = np.divide(sums[:, :metrics], counts, out=np.full_like(counts, math.nan), where=counts > 0)
    return np.concatenate([means, means.mean(axis=1, keepdims=True)], axis=1)


def _percentiles(values: np.ndarray, tail: float) -> np.ndarray:
    values = values[~np.isnan(values)]
    return np.percentile(values, [tail, 100 - tail]) if len(values) else np.full(2, math.nan)
