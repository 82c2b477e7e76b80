"""How well a cheap score ranks architectures: Kendall's tau-b, Spearman's rho, regret, and intervals.

Source: which pairs of scores to compare, and two trainings' agreement as the ceiling, are section 8 of the
specification. *Ours*: the bootstrap over trainings and architectures, regret.

Where all scores of one side are equal there is no order to agree with: tau and rho are not a number (NaN) then.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats  # type: ignore[import-untyped]

from fl_edge.seeding import numpy_rng

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its interval."""

    value: float
    low: float
    high: float


def kendall(first: ArrayLike, second: ArrayLike) -> float:
    """Return Kendall's tau-b of two scores of the same architectures, (K,) each, in [-1, 1] or NaN."""
    one, two = _pair(first, second)
    return float(stats.kendalltau(one, two).statistic) if _ordered(one, two) else float("nan")


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Return Spearman's rho of two scores of the same architectures, (K,) each, in [-1, 1] or NaN."""
    one, two = _pair(first, second)
    return float(stats.spearmanr(one, two).statistic) if _ordered(one, two) else float("nan")


def ceiling(truths: ArrayLike) -> float:
    """Return the mean tau-b between two trainings of the same architectures: what the truth's own noise leaves.

    Parameters
    ----------
    truths
        Accuracy of K architectures in S trainings of different seeds, (S, K), S at least 2.
    """
    return float(np.mean([kendall(one, two) for one, two in combinations(np.asarray(truths, dtype=np.float64), 2)]))


def regret(proxy: ArrayLike, truth: ArrayLike) -> float:
    """Return what the proxy's winner lacks of the best architecture's truth, (K,) each; 0 is best.

    Where several architectures have the highest proxy score, the mean over them: what a fair draw would lack.
    """
    one, two = _pair(proxy, truth)
    return float(two.max() - two[one == one.max()].mean())


def bootstrap(values: ArrayLike, level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of S seeds' values and its percentile bootstrap interval.

    Of few seeds (S < 10) such an interval is too short: of three seeds' means 95 % is nearer 75 %. For a difference of
    two methods pass the seeds' differences.

    Parameters
    ----------
    values
        (S,), one value a seed.
    level
        Share of the bootstrap means inside.
    draws
        Bootstrap samples.
    seed
        Of the bootstrap's own draws.
    """
    sample = np.asarray(values, dtype=np.float64)
    rng = numpy_rng(seed, "bootstrap", "values")
    means = sample[rng.integers(len(sample), size=(draws, len(sample)))].mean(axis=1)
    return _interval(float(sample.mean()), means, level)


def tau_interval(
    proxies: ArrayLike, truths: ArrayLike, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> Interval:
    """Return the mean tau-b over seeds and its bootstrap interval over seeds and architectures.

    Parameters
    ----------
    proxies, truths
        Scores of K architectures for each of S seeds, (S, K).
    level, draws, seed
        As in :func:`bootstrap`.
    """
    means, value = _bootstrap_taus(proxies, truths, draws, seed)
    return _interval(value, means, level)


def tau_difference(
    better: ArrayLike, worse: ArrayLike, truths: ArrayLike, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> Interval:
    """Return by how much one proxy's mean tau-b is above another's, and the paired bootstrap interval.

    Both are measured on the same drawn seeds and architectures, so what they share cancels.

    Parameters
    ----------
    better, worse, truths
        (S, K), as in :func:`tau_interval`.
    """
    one, first = _bootstrap_taus(better, truths, draws, seed)
    two, second = _bootstrap_taus(worse, truths, draws, seed)
    return _interval(first - second, one - two, level)


def _bootstrap_taus(proxies: ArrayLike, truths: ArrayLike, draws: int, seed: int) -> tuple[Floats, float]:
    """Return the mean over seeds of tau-b in every bootstrap sample, (draws,), and in the data.

    An architecture drawn n times counts n times, and a pair of copies is a tie on both sides. With the signs of all
    pairs' differences as matrices X and Y, (K, K), tau-b of a sample with counts c is c'(X*Y)c / sqrt(c'X^2c c'Y^2c),
    products and squares by element.
    """
    one, two = np.atleast_2d(np.asarray(proxies, dtype=np.float64)), np.atleast_2d(np.asarray(truths, dtype=np.float64))
    if one.shape != two.shape:
        raise ValueError(f"scores of shape {one.shape} cannot be compared with scores of shape {two.shape}")
    rng = numpy_rng(seed, "bootstrap", "architectures")
    seeds, architectures = one.shape
    counts = rng.multinomial(architectures, np.full(architectures, 1 / architectures), size=draws).astype(np.float64)
    taus = np.stack([_taus(x, y, counts) for x, y in zip(one, two, strict=True)])  # (S, draws)
    drawn = rng.integers(seeds, size=(seeds, draws))
    means: Floats = np.take_along_axis(taus, drawn, axis=0).mean(axis=0)
    return means, float(np.mean([kendall(x, y) for x, y in zip(one, two, strict=True)]))


def _taus(x: Floats, y: Floats, counts: Floats) -> Floats:
    first, second = np.sign(x[:, None] - x), np.sign(y[:, None] - y)

    def total(matrix: Floats) -> Floats:
        return np.asarray(((counts @ matrix) * counts).sum(axis=1))

    untied = np.sqrt(total(first**2) * total(second**2))
    taus: Floats = np.divide(total(first * second), untied, out=np.full(len(counts), np.nan), where=untied > 0)
    return taus


def _interval(value: float, sample: Floats, level: float) -> Interval:
    kept = sample[~np.isnan(sample)]  # a sample in which all scores were equal says nothing
    if not len(kept):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape or one.ndim != 1:
        raise ValueError(f"two scores (K,) of the same architectures, not of shapes {one.shape} and {two.shape}")
    return one, two


def _ordered(one: Floats, two: Floats) -> bool:
    """Whether each side has at least two different values."""
    return all(len(side) > 1 and bool((side != side[0]).any()) for side in (one, two))
