"""Batch sizes of a chosen cohort: tuned until KL is low enough, then enlarged to the budget (MergeSFL, section 4.5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl_edge.mergesfl.distribution import kl_divergence, kl_gradient, label_mix
from fl_edge.mergesfl.workers import Floats, Ints


@dataclass(frozen=True)
class Cohort:
    """The chosen workers, and what their batches must keep to.

    Parameters
    ----------
    labels
        V, (m, C).
    cost_s
        mu + beta, seconds a sample, (m,).
    limits
        Largest batch of each, (m,).
    reference
        Phi_0, (C,).
    budget
        B^h / c, samples an iteration (eq. 10).
    """

    labels: Floats
    cost_s: Floats
    limits: Ints
    reference: Floats
    budget: int

    def divergence(self, batch_sizes: Ints | Floats) -> Floats:
        """Return KL of one vector of batch sizes, (m,), or of many, (..., m)."""
        return kl_divergence(label_mix(self.labels, batch_sizes), self.reference)

    def added_time(self, batch_sizes: Ints | Floats, start: Ints) -> float:
        """Return the objective of eq. 14 without its constant tau: mean_i |d_i - d_i0| (mu_i + beta_i), seconds."""
        return float(np.mean(np.abs(batch_sizes - start) * self.cost_s))


def tune(cohort: Cohort, batch_sizes: Ints, target: float) -> Ints:
    """Move one sample at a time until KL <= target (eq. 14, greedy; the solver is ours).

    Every move is the one with the largest KL decrease a second of added time; moves that lower KL *and* bring a batch
    back towards its start come first. Ends when the target is reached or no move lowers KL: a target out of reach
    gives the lowest KL found, and whoever asks compares (it is never relaxed here).

    Parameters
    ----------
    batch_sizes
        d_0, (m,), within the limits and the budget.
    target
        epsilon, nats.
    """
    start, sizes = batch_sizes, batch_sizes.copy()
    weighted, total = sizes @ cohort.labels, int(sizes.sum())
    direction = np.repeat([1, -1], len(sizes))  # every worker once up, once down
    worker = np.tile(np.arange(len(sizes)), 2)
    steps = direction[:, None] * cohort.labels[worker]
    current = float(cohort.divergence(sizes))
    while current > target:
        moved = sizes[worker] + direction
        allowed = (moved >= 1) & (moved <= cohort.limits[worker]) & (total + direction <= cohort.budget)
        mixes = (weighted + steps) / np.maximum(total + direction, 1)[:, None]
        gain = np.where(allowed, current - kl_divergence(mixes, cohort.reference), -np.inf)
        away = direction * np.sign(sizes - start)[worker] >= 0
        # a way back costs less than nothing: any of them goes before all ways out, the largest decrease first
        worth = np.where(away, gain / cohort.cost_s[worker], gain * 1e9 / cohort.cost_s.min())
        pick = int(np.argmax(np.where(gain > 1e-15, worth, -np.inf)))
        if not gain[pick] > 1e-15:
            break
        sizes[worker[pick]] += direction[pick]
        weighted, total = sizes @ cohort.labels, total + int(direction[pick])
        current = float(cohort.divergence(sizes))
    return sizes


def tune_dual(cohort: Cohort, batch_sizes: Ints, target: float) -> Ints:
    """Solve eq. 14 by its Lagrange dual, then round (the solver is ours).

    For a multiplier lambda the relaxed problem min_d time(d) + lambda KL(d) is solved by proximal gradient steps; the
    multiplier that meets KL = target is found by bisection, which needs no step size where the ascent
    lambda <- [lambda + rho (KL - target)]_+ does. Every iterate is rounded; the feasible one of the least added time is
    returned, or the one of the lowest KL when none reaches the target.
    """
    relaxed = batch_sizes.astype(np.float64)
    gradient = np.abs(kl_gradient(cohort.labels, relaxed, cohort.reference))
    if gradient.max() < 1e-12:  # all mixes are alike, or KL is at its least
        return batch_sizes
    low = high = float((cohort.cost_s / np.maximum(gradient, 1e-12)).min())  # below this nobody moves
    candidates = [batch_sizes]
    for _ in range(30):  # up, until the target is met
        relaxed = _proximal_gradient(cohort, batch_sizes, relaxed, high)
        candidates.append(_round(cohort, relaxed))
        if cohort.divergence(relaxed) <= target:
            break
        low, high = high, 2 * high
    for _ in range(12):
        middle = float(np.sqrt(low * high))
        relaxed = _proximal_gradient(cohort, batch_sizes, relaxed, middle)
        candidates.append(_round(cohort, relaxed))
        low, high = (low, middle) if cohort.divergence(relaxed) <= target else (middle, high)
    divergences = cohort.divergence(np.stack(candidates))
    reached = [sizes for sizes, kl in zip(candidates, divergences, strict=True) if kl <= target]
    if reached:
        return min(reached, key=lambda sizes: cohort.added_time(sizes, batch_sizes))
    return candidates[int(np.argmin(divergences))]


def _proximal_gradient(cohort: Cohort, start: Ints, sizes: Floats, multiplier: float) -> Floats:
    """Minimise sum_i c_i |d_i - d_i0| + multiplier KL(d) over real batch sizes within limits and budget, (m,)."""
    current = float(cohort.divergence(sizes))
    step = float("inf")
    for _ in range(50):
        gradient = multiplier * kl_gradient(cohort.labels, sizes, cohort.reference)
        # the first try would move the steepest batch over its whole range; later ones start from the last good step
        step = min(2 * step, float(cohort.limits.max() / max(np.abs(gradient).max(), 1e-300)))
        for _ in range(40):
            moved = _proximal(cohort, start, sizes - step * gradient, step)
            change = moved - sizes
            divergence = float(cohort.divergence(moved))
            if multiplier * (divergence - current) <= gradient @ change + change @ change / (2 * step):
                break
            step /= 2
        else:
            return sizes
        sizes, current = moved, divergence
        if np.abs(change).max() < 0.01:
            break
    return sizes


def _proximal(cohort: Cohort, start: Ints, sizes: Floats, step: float) -> Floats:
    """Pull batches towards their start by step * cost each, then into the limits and, by one shift, the budget."""

    def shifted(shift: float) -> Floats:
        away = sizes - shift - start
        pulled = start + np.sign(away) * np.maximum(np.abs(away) - step * cohort.cost_s, 0)
        return np.asarray(np.clip(pulled, 1, cohort.limits))

    low, high = 0.0, 0.0
    if shifted(0.0).sum() > cohort.budget:
        high = float(sizes.max() + (step * cohort.cost_s).max())  # far enough to leave one sample each
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if shifted(middle).sum() > cohort.budget else (low, middle)
    return shifted(high)


def _round(cohort: Cohort, sizes: Floats) -> Ints:
    """Round to whole samples; what rounding adds beyond the budget goes where it added most."""
    rounded = np.clip(np.rint(sizes), 1, cohort.limits).astype(np.int64)
    over = int(rounded.sum()) - cohort.budget
    for worker in np.argsort(sizes - rounded, kind="stable"):
        if over > 0 and rounded[worker] > 1:
            rounded[worker], over = rounded[worker] - 1, over - 1
    return rounded


def fill(batch_sizes: Ints, samples: Ints, largest: int, budget: int) -> Ints:
    """Return d_i <- floor(d_i B^h / (c sum d)), (m,): all batches grow by one factor, so durations stay balanced.

    The factor ends where the largest batch would meet the memory cap: were the others to grow on, the fast workers
    would wait for the slow ones (ours). Where a worker has no more samples, the others share what it leaves, again by
    one factor. No batch shrinks.

    Parameters
    ----------
    batch_sizes
        d, (m,), within the budget.
    samples
        n, (m,).
    largest
        Memory cap of one batch, samples.
    budget
        B^h / c, samples an iteration (eq. 10).
    """
    cap = max(1.0, largest / int(batch_sizes.max()))
    growing = np.ones(len(batch_sizes), dtype=bool)
    while True:
        left = budget - int(samples[~growing].sum())
        factor = min(cap, left / max(int(batch_sizes[growing].sum()), 1))
        grown = np.where(growing, (batch_sizes * factor).astype(np.int64), samples)
        exhausted = growing & (grown >= samples)
        if not exhausted.any():
            return np.asarray(grown)
        growing &= ~exhausted
