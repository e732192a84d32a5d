"""Clustered estimates against oracles and in simulations with fixed seeds."""

from collections.abc import Callable

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.multitest import multipletests

from eval.judging.metrics import METRICS
from eval.results.statistics import (
    COLUMNS,
    DIMENSIONS,
    difference,
    holm,
    length_regression,
    mean,
    ratio_of_means,
    sign_flip,
    smallest_difference,
)

M = len(METRICS)
OVERALL = COLUMNS.index("Overall")


def made(clusters: np.ndarray, seed: int = 3) -> np.ndarray:
    """(rows, metrics) ratios with effects of the cluster, of the row and of the metric."""
    generator = np.random.default_rng(seed)
    effect = generator.normal(1, 0.1, (clusters.max() + 1, 1))[clusters]
    return effect + generator.normal(0, 0.05, (len(clusters), 1)) + generator.normal(0, 0.02, (len(clusters), M))


def uneven(clusters: int = 20) -> np.ndarray:
    return np.repeat(np.arange(clusters), 1 + np.arange(clusters) % 5)


def test_the_mean_is_what_least_squares_with_clustered_errors_gives() -> None:
    clusters = uneven()
    ratios = made(clusters)
    estimate = mean(ratios, clusters)
    for column, values in ((0, ratios[:, 0]), (OVERALL, ratios.mean(axis=1))):
        fit = sm.OLS(values, np.ones(len(values))).fit(
            cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": True}, use_t=True
        )
        assert estimate.value[column] == pytest.approx(fit.params[0])
        assert estimate.error[column] == pytest.approx(fit.bse[0])
        assert (estimate.low[column], estimate.high[column]) == pytest.approx(tuple(fit.conf_int()[0]))
    assert (estimate.rows == len(clusters)).all() and (estimate.clusters == 20).all()


def test_rows_of_a_cluster_that_agree_have_a_design_effect_of_the_clusters_size() -> None:
    clusters = np.repeat(np.arange(40), 5)
    alike = np.repeat(np.random.default_rng(0).normal(1, 0.1, (40, M)), 5, axis=0)
    assert mean(alike, clusters).design_effect == pytest.approx(np.full(len(COLUMNS), 5), rel=0.03)
    alone = mean(made(np.arange(200)), np.arange(200))
    assert alone.design_effect == pytest.approx(np.ones(len(COLUMNS)))


def test_dimensions_and_overall_are_means_of_their_metrics() -> None:
    ratios = made(uneven())
    value = mean(ratios, uneven()).value
    for dimension in DIMENSIONS:
        chosen = [i for i, metric in enumerate(METRICS) if metric.dimension == dimension]
        assert value[COLUMNS.index(dimension)] == pytest.approx(ratios[:, chosen].mean())
    assert value[OVERALL] == pytest.approx(ratios.mean())


def test_failed_reviews_are_left_out_of_their_metric_alone() -> None:
    ratios = made(uneven())
    ratios[::2, 1] = np.nan
    estimate = mean(ratios, uneven())
    np.testing.assert_allclose(estimate.value[:M], np.nanmean(ratios, axis=0))
    assert estimate.value[OVERALL] == pytest.approx(estimate.value[:M].mean())
    assert estimate.rows[1] == np.isfinite(ratios[:, 1]).sum() and estimate.rows[OVERALL] == len(ratios)
    assert estimate.error[1] > estimate.error[0]


def test_a_metric_without_ratios_has_no_number_and_makes_none() -> None:
    ratios = made(uneven())
    ratios[:, 0] = np.nan
    estimate = mean(ratios, uneven())
    without = np.isnan(estimate.value)
    assert [COLUMNS[i] for i in np.flatnonzero(without)] == [METRICS[0].name, METRICS[0].dimension, "Overall"]
    assert np.isnan(estimate.low[without]).all() and np.isfinite(estimate.low[~without]).all()


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_hardly_any_rows(rows: int) -> None:
    estimate = mean(made(np.arange(5))[:rows], np.arange(rows))
    assert np.isfinite(estimate.value).all() == (rows > 0)
    assert np.isnan(estimate.low).all()


def test_the_ratio_of_means_is_not_moved_by_one_low_denominator() -> None:
    clusters = uneven()
    b = np.full((len(clusters), M), 10.0)
    a = 10 * made(clusters)
    plain, other = mean(a / b, clusters), ratio_of_means(a, b, clusters)
    np.testing.assert_allclose(plain.value, other.value)
    np.testing.assert_allclose(plain.error, other.error)
    b[7] = 0.1
    assert mean(a / b, clusters).value[0] > 2
    assert ratio_of_means(a, b, clusters).value[0] == pytest.approx(a[:, 0].sum() / b[:, 0].sum())


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.normal(0, 1, shape)


def skewed(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.exponential(1, shape) - 1


@pytest.mark.parametrize(("clusters", "most"), [(13, 7), (13, 12), (72, 5)])
@pytest.mark.parametrize("draw", [normal, skewed])
def test_intervals_cover_the_truth(draw: Callable[..., np.ndarray], clusters: int, most: int) -> None:
    """Each of the eight metrics is a data set of its own here: 8 x 250 intervals of rows in clusters of 2 to `most`."""
    generator = np.random.default_rng(11)
    covered = []
    for _ in range(250):
        numbers = np.repeat(np.arange(clusters), generator.integers(2, most + 1, clusters))
        values = 0.5 * draw(generator, (clusters, M))[numbers] + draw(generator, (len(numbers), M))
        estimate = mean(values, numbers)
        covered.append(((estimate.low < 0) & (estimate.high > 0))[:M])
    assert 0.93 <= np.mean(covered) <= 0.97


def test_equal_agents_hardly_ever_seem_different() -> None:
    """Whether any of the ten pairs of five equal agents seems different: at most in 5 % of the simulations."""
    generator = np.random.default_rng(5)
    numbers = np.repeat(np.arange(13), 4)
    first, second = np.triu_indices(5, 1)
    wins = 0
    for seed in range(400):
        agents = skewed(generator, (13, 1))[numbers] + skewed(generator, (13, 5))[numbers]
        agents = agents + skewed(generator, (len(numbers), 5))
        p = sign_flip(agents[:, first] - agents[:, second], numbers, seed, flips=499)
        wins += bool((holm(p) < 0.05).any())
    assert wins / 400 <= 0.05


def test_sign_flips_agree_with_the_exact_test() -> None:
    totals = np.random.default_rng(2).normal(0.4, 1, 10)
    exact = stats.permutation_test((totals,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip(totals[:, None], np.arange(10), flips=50_000)[0] == pytest.approx(exact, abs=0.01)


def test_a_difference_is_tested_by_what_each_row_adds_to_it() -> None:
    clusters = uneven()
    first, second = made(clusters), made(clusters, seed=4) - 0.1
    second[3] = np.nan
    estimate, shares = difference(first, second, clusters)
    np.testing.assert_allclose(np.nansum(shares, axis=0), estimate.value)
    assert np.isnan(shares[3]).all() and (estimate.rows == len(clusters) - 1).all()
    assert (sign_flip(shares, clusters) < 0.05).all()


def test_few_clusters_are_not_tested() -> None:
    assert np.isnan(sign_flip(np.ones((7, 1)), np.arange(7)))
    assert sign_flip(np.ones((8, 1)), np.arange(8)) == pytest.approx(2 / 256, abs=0.003)


def test_holm() -> None:
    p = np.array([0.01, 0.04, 0.03, np.nan, 0.005, 0.9])
    there = ~np.isnan(p)
    np.testing.assert_allclose(holm(p)[there], multipletests(p[there], method="holm")[1])
    assert np.isnan(holm(p)[3])


def test_the_smallest_difference_is_shown_at_its_power() -> None:
    generator = np.random.default_rng(8)
    clusters, n = 30, 2000
    difference_ = float(smallest_difference(np.array(1 / np.sqrt(clusters)), np.array(clusters)))
    samples = generator.normal(difference_, 1, (n, clusters))
    p = stats.ttest_1samp(samples, 0, axis=1).pvalue
    assert 0.77 < (p < 0.05).mean() < 0.83
    many = smallest_difference(np.array(1.0), np.array(clusters), comparisons=28)
    assert many > smallest_difference(np.array(1.0), np.array(clusters))


def test_length_regression_finds_what_was_planted() -> None:
    generator = np.random.default_rng(1)
    clusters = uneven(60)
    answer = generator.integers(200, 2000, len(clusters))
    reference = generator.integers(200, 2000, len(clusters))
    b = np.full((len(clusters), M), 8.0)
    logs = np.log(0.9) + 0.2 * np.log(answer / reference) + generator.normal(0, 0.05, len(clusters))
    a = b * np.exp(logs)[:, None]
    estimate, left_out = length_regression(a, b, answer, reference, clusters)
    assert left_out == 0
    for found, truth in zip((0, 2), (0.2, 0.9), strict=True):
        assert estimate.low[found] < truth < estimate.high[found]
    assert estimate.value[1] == pytest.approx(np.exp(logs.mean()))
    fit = sm.OLS(logs, sm.add_constant(np.log(answer / reference))).fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False}
    )
    correction = np.sqrt(60 / 59)
    assert estimate.value[[0, 2]] == pytest.approx([fit.params[1], np.exp(fit.params[0])])
    assert estimate.error[[0, 2]] == pytest.approx(np.array([fit.bse[1], fit.bse[0]]) * correction)
    a[0, 0] = 0
    assert length_regression(a, b, answer, reference, clusters)[1] == 1


def test_length_regression_without_enough_rows() -> None:
    ones = np.ones((2, M))
    estimate, left_out = length_regression(ones, ones, np.array([5, 6]), np.array([5, 6]), np.arange(2))
    assert np.isnan(estimate.value).all() and left_out == 0
