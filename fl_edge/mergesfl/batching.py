"""Batch size regulation: batches that let all workers finish an iteration together (MergeSFL, eqs. 7-9)."""

from __future__ import annotations

import numpy as np

from fl_edge.mergesfl.workers import Floats, Ints


def durations(batch_sizes: Ints, cost_s: Floats, tau: int) -> Floats:
    """Return t_i = tau d_i (mu_i + beta_i), the seconds of each worker's round, (m,) (eq. 7)."""
    return tau * batch_sizes * cost_s


def average_waiting(durations_s: Floats) -> float:
    """Return W = mean_i (max_k t_k - t_i), the seconds that a worker waits in a round on average (eq. 8)."""
    return float(durations_s.max() - durations_s.mean())


def regulate(cost_s: Floats, samples: Ints, largest: int) -> Ints:
    """Return d_i = max(1, floor(D c_l / c_i)) with l the fastest worker, at most n_i, (N,) (eq. 9).

    Without the caps, d_i c_i of any two workers differ by less than one sample of the slower one.

    Parameters
    ----------
    cost_s
        c = mu + beta, seconds a sample, (N,).
    samples
        n, local samples, (N,): a loader that drops the last batch would yield nothing beyond it.
    largest
        D, the batch of the fastest worker.
    """
    exact = largest * cost_s.min() / cost_s
    # the quotient of equal costs may round to just below the integer that it is
    return np.asarray(np.clip(np.floor(exact * (1 + 1e-12)), 1, samples), dtype=np.int64)


def equal(samples: Ints, largest: int) -> Ints:
    """Return D for every worker, at most n_i, (N,): no regulation (released code)."""
    return np.minimum(samples, largest)


def shrink(batch_sizes: Ints, count: int, budget: int) -> Ints:
    """Scale all batches down, by one factor, until the ``count`` smallest fit into the budget (ours).

    Needed when everybody must take part, or ``min_workers`` do, and full batches are too much for the server. One
    factor for all keeps the durations balanced; no batch falls below one sample.

    Parameters
    ----------
    batch_sizes
        d, (N,).
    count
        How many workers must fit, at most ``budget``.
    budget
        B^h / c, samples an iteration (eq. 10).
    """

    def scaled(factor: float) -> Ints:
        return np.maximum(1, (batch_sizes * factor).astype(np.int64))

    def fits(sizes: Ints) -> bool:
        return int(np.sort(sizes)[:count].sum()) <= budget

    if fits(batch_sizes):
        return batch_sizes
    low, high = 0.0, 1.0
    for _ in range(40):  # bisection: the sum grows with the factor
        middle = (low + high) / 2
        low, high = (middle, high) if fits(scaled(middle)) else (low, middle)
    return scaled(low)


def bottom_learning_rates(learning_rate: float, batch_sizes: Ints, largest: int, scale: str) -> Floats:
    """Return eta_i of each worker's bottom model, (m,) (section 4.6).

    ``scale="batch"``: eta d_i / D, so that every *sample* makes an equally long step (D as normaliser is ours).
    ``scale="none"``: eta (released code).
    """
    factors = batch_sizes / largest if scale == "batch" else np.ones(len(batch_sizes))
    return learning_rate * factors
