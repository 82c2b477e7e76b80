"""Agreement of rankings, against scipy and against what can be counted by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from fl_edge.imbnas import ranking

scores = st.lists(st.integers(0, 5), min_size=2, max_size=12)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_tau_b_is_the_share_of_pairs_in_order(data: st.DataObject) -> None:
    one = np.array(data.draw(scores), dtype=float)
    two = np.array(data.draw(st.lists(st.integers(0, 5), min_size=len(one), max_size=len(one))), dtype=float)
    pairs = [(np.sign(one[i] - one[j]), np.sign(two[i] - two[j])) for i in range(len(one)) for j in range(i)]
    untied = [sum(a != 0 for a, _ in pairs), sum(b != 0 for _, b in pairs)]
    if not all(untied):
        assert math.isnan(ranking.kendall(one, two))
        assert math.isnan(ranking.spearman(one, two))
        return
    assert ranking.kendall(one, two) == pytest.approx(sum(a * b for a, b in pairs) / math.sqrt(untied[0] * untied[1]))
    places = np.corrcoef(stats.rankdata(one), stats.rankdata(two))[0, 1]
    assert ranking.spearman(one, two) == pytest.approx(places)


def test_regret_is_what_the_winner_lacks() -> None:
    truth = [0.5, 0.9, 0.7, 0.8]
    assert ranking.regret([1, 5, 2, 3], truth) == 0
    assert ranking.regret([1, 2, 9, 3], truth) == pytest.approx(0.2)
    assert ranking.regret([7, 2, 7, 3], truth) == pytest.approx(0.9 - (0.5 + 0.7) / 2)


def test_ceiling_is_the_mean_over_pairs_of_trainings() -> None:
    runs = np.random.default_rng(0).normal(size=(3, 9))
    expected = [stats.kendalltau(runs[i], runs[j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
    assert ranking.ceiling(runs) == pytest.approx(np.mean(expected))


def test_scores_of_different_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="same architectures"):
        ranking.kendall([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="cannot be compared"):
        ranking.tau_interval(np.zeros((2, 3)), np.zeros((3, 3)))


def test_bootstrapped_taus_are_those_of_the_drawn_architectures() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 8, 20).astype(float), rng.integers(0, 8, 20).astype(float)
    drawn = rng.integers(20, size=(30, 20))
    counts = np.stack([np.bincount(row, minlength=20) for row in drawn]).astype(float)
    expected = [stats.kendalltau(x[row], y[row]).statistic for row in drawn]
    np.testing.assert_allclose(ranking._taus(x, y, counts), expected, atol=1e-12)


def related(seed: int, noise: float, seeds: int = 4, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(seeds, count))
    return truth + noise * rng.normal(size=truth.shape), truth


def test_an_interval_holds_the_value_and_shrinks_with_more_architectures() -> None:
    widths = []
    for count in (20, 200):
        proxy, truth = related(0, 1.0, count=count)
        found = ranking.tau_interval(proxy, truth)
        assert found.low < found.value < found.high
        assert found.value == pytest.approx(np.mean([ranking.kendall(x, y) for x, y in zip(proxy, truth, strict=True)]))
        widths.append(found.high - found.low)
    assert widths[1] < 0.6 * widths[0]


def test_intervals_cover_the_tau_of_the_population() -> None:
    """Of normal scores with correlation r, tau is 2 / pi asin(r)."""
    expected = 2 / math.pi * math.asin(1 / math.sqrt(2))
    found = [ranking.tau_interval(*related(seed, 1.0), draws=200) for seed in range(60)]
    assert sum(one.low <= expected <= one.high for one in found) >= 48


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    better, truth = related(3, 0.5, seeds=3)
    worse = better + 0.4 * np.random.default_rng(4).normal(size=better.shape)
    found = ranking.tau_difference(better, worse, truth)
    one, two = ranking.tau_interval(better, truth), ranking.tau_interval(worse, truth)
    assert found.value == pytest.approx(one.value - two.value)
    assert found.low < found.value < found.high
    assert found.high - found.low < (one.high - one.low) + (two.high - two.low)
    same = ranking.tau_difference(better, better, truth)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_scores_that_are_all_equal_have_no_interval() -> None:
    found = ranking.tau_interval(np.ones((3, 6)), np.arange(18.0).reshape(3, 6))
    assert all(math.isnan(bound) for bound in (found.value, found.low, found.high))


def test_bootstrap_of_seeds() -> None:
    values = [0.2, 0.5, 0.3, 0.4, 0.35, 0.1]
    found = ranking.bootstrap(values, level=0.9)
    reference = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="percentile", n_resamples=5000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.value == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(reference.low, abs=0.015)
    assert found.high == pytest.approx(reference.high, abs=0.015)
    assert found == ranking.bootstrap(values, level=0.9)
    assert ranking.bootstrap([0.4]) == ranking.Interval(0.4, 0.4, 0.4)
