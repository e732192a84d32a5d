"""Sample means and their bootstrap intervals."""

import numpy as np
import pytest

from eval.results.statistics import sample_means


def made(rows: int = 60, seed: int = 3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(1, 0.1, (rows, 1)) + generator.normal(0, 0.02, (rows, 8))


def test_same_input_and_seed_give_the_same_interval() -> None:
    first, again, other = sample_means(made()), sample_means(made()), sample_means(made(), seed=1)
    assert np.array_equal(first.low, again.low) and np.array_equal(first.high, again.high)
    assert not np.array_equal(first.low, other.low)
    assert np.array_equal(first.mean, other.mean)


def test_agrees_with_a_plain_bootstrap() -> None:
    ratios = made()
    estimate = sample_means(ratios)
    generator = np.random.default_rng(99)
    draws = np.array([ratios[generator.integers(60, size=60)].mean(axis=0) for _ in range(3000)])
    draws = np.column_stack([draws, draws.mean(axis=1)])
    np.testing.assert_allclose(estimate.mean, np.append(ratios.mean(axis=0), ratios.mean()))
    width = np.percentile(draws, 97.5, axis=0) - np.percentile(draws, 2.5, axis=0)
    np.testing.assert_allclose(estimate.high - estimate.low, width, rtol=0.1)
    np.testing.assert_allclose(estimate.low, np.percentile(draws, 2.5, axis=0), atol=0.1 * width.max())


def test_overalls_interval_keeps_the_rows_together() -> None:
    """A row's ratios go up and down together; drawn one by one, Overall's interval would be far too narrow."""
    estimate = sample_means(made())
    width = estimate.high - estimate.low
    assert width[-1] > 0.8 * width[:-1].mean()


def test_failed_reviews_are_left_out() -> None:
    ratios = made()
    ratios[::2, 1] = np.nan
    estimate = sample_means(ratios)
    np.testing.assert_allclose(estimate.mean[1], np.nanmean(ratios[:, 1]))
    np.testing.assert_allclose(estimate.mean[-1], estimate.mean[:-1].mean())
    assert estimate.low[1] < estimate.mean[1] < estimate.high[1]
    assert estimate.high[1] - estimate.low[1] > estimate.high[0] - estimate.low[0]


def test_a_metric_without_ratios_is_nan_and_so_is_overall() -> None:
    ratios = made()
    ratios[:, 2] = np.nan
    estimate = sample_means(ratios)
    assert np.isnan([estimate.mean[2], estimate.low[2], estimate.high[2], estimate.mean[-1], estimate.low[-1]]).all()
    assert np.isfinite(np.delete(estimate.low, [2, 8])).all()


def test_very_few_rows() -> None:
    assert np.isnan(sample_means(np.empty((0, 8))).mean).all()
    one = sample_means(made(rows=1))
    np.testing.assert_allclose(one.low, one.mean)
    np.testing.assert_allclose(one.high, one.mean)
    lonely = made(rows=3)
    lonely[:2, 0] = np.nan  # some draws have no ratio at all for this metric
    assert sample_means(lonely).low[0] == pytest.approx(lonely[2, 0])


def test_many_rows_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.results.statistics._BLOCK", 60 * 7)
    blocks = sample_means(made(), resamples=100)
    monkeypatch.setattr("eval.results.statistics._BLOCK", 60 * 100)
    whole = sample_means(made(), resamples=100)
    np.testing.assert_allclose(blocks.low, whole.low)
    np.testing.assert_allclose(blocks.high, whole.high)
