"""Who takes part in a round: the problem that all solvers share, and the two plain ones (MergeSFL, section 4.4).

A cohort is a boolean array over all workers. Genetic search is in ``genetic``, swap search in ``polish``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fl_edge.mergesfl.distribution import EPS, kl_divergence
from fl_edge.mergesfl.workers import Bools, Floats, Ints

# Numbers (candidates times classes) that one step of a search scores with the exact divergence.
EXACT = 2**13
POOL = 1024  # workers among whom the greedy search looks ...
POOL_STEPS = 8  # ... for so many steps


@dataclass(frozen=True)
class Problem:
    """Choose a cohort with the least KL(Phi || Phi_0) that fits (eqs. 10-12); batch sizes are given.

    Parameters
    ----------
    labels
        V, (N, C).
    batch_sizes
        d, (N,), none above the budget.
    priorities
        (N,), from :func:`priorities`.
    reference
        Phi_0, (C,).
    budget
        B^h / c: samples that the server takes in one iteration.
    smallest, largest
        Limits of the cohort's size. The ``smallest`` smallest batches fit into the budget.
    """

    labels: Floats
    batch_sizes: Ints
    priorities: Floats
    reference: Floats
    budget: int
    smallest: int
    largest: int

    @cached_property
    def metric(self) -> Floats:
        """Standard deviations sqrt(phi_0j) of the chi-squared distance, (C,)."""
        return np.asarray(np.sqrt(np.maximum(self.reference, EPS)))

    @cached_property
    def deviations(self) -> Floats:
        """u_i = d_i (V_i - Phi_0) / sqrt(Phi_0), (N, C): what worker i adds to the cohort's imbalance.

        To second order KL = |sum_i u_i|^2 / (2 (sum_i d_i)^2), so matrix products rank very many moves at once (ours);
        only the most promising ones are then scored with the exact divergence.
        """
        return (self.labels - self.reference) * (self.batch_sizes[:, None] / self.metric)

    @cached_property
    def squares(self) -> Floats:
        """|u_i|^2, (N,)."""
        return np.asarray(np.einsum("ij,ij->i", self.deviations, self.deviations))

    @cached_property
    def ranking(self) -> Ints:
        """Workers by falling priority, then by growing batch, (N,): the last are the first to be dropped."""
        return np.lexsort((self.batch_sizes, -self.priorities))

    def divergence(self, imbalance: Floats, total: Floats | Ints | int) -> Floats:
        """Return the exact KL of cohorts given as sum_i u_i, (..., C), and sum_i d_i, (...,)."""
        mix = self.reference + imbalance * self.metric / np.asarray(total)[..., None]
        return kl_divergence(np.maximum(mix, 0.0), self.reference)  # rounding leaves absent classes just below zero

    def score(self, cohorts: Bools) -> tuple[Floats, Floats]:
        """Return KL and unused samples of the cohorts, (P,) each; fitness is lexicographic in the two."""
        chosen = cohorts.astype(np.float64)
        total = chosen @ self.batch_sizes
        return self.divergence(chosen @ self.deviations, np.maximum(total, 1)), self.budget - total

    def best(self, cohorts: Bools) -> int:
        """Return the index of the fittest cohort."""
        divergence, unused = self.score(cohorts)
        return int(np.lexsort((unused, divergence))[0])


def priorities(participation: Ints) -> Floats:
    """Return sum_j (K_j + 1) / (K_i + 1), (N,): who took part seldom comes first (eq. 13)."""
    return np.asarray((participation + 1).sum() / (participation + 1))


def repair(problem: Problem, cohorts: Bools, ranking: Ints | None = None) -> Bools:
    """Make cohorts feasible: drop the last of the ranking until they fit, add the first ones if too few remain.

    Where even that leaves too few, because large batches stand in the way, the workers of the smallest batches take
    their place.

    Parameters
    ----------
    cohorts
        (P, N).
    ranking
        Order of the workers, first kept, (N,); by default by priority and batch size (section 4.4).
    """
    order = problem.ranking if ranking is None else ranking
    sizes = problem.batch_sizes[order]
    kept = cohorts[:, order]
    # a running sum only grows, so what fits is a prefix, and dropping from the end is one comparison
    kept &= np.cumsum(kept * sizes, axis=1) <= problem.budget
    kept &= np.cumsum(kept, axis=1) <= problem.largest
    for index in np.flatnonzero(kept.sum(axis=1) < problem.smallest):
        kept[index] = _enlarge(kept[index], sizes, problem.budget, problem.smallest)
    repaired = np.empty_like(kept)
    repaired[:, order] = kept
    return repaired


def _enlarge(row: Bools, sizes: Ints, budget: int, smallest: int) -> Bools:
    row, room, missing = row.copy(), budget - int(row @ sizes), smallest - int(row.sum())
    for worker in np.flatnonzero(~row):
        if missing and sizes[worker] <= room:
            row[worker], room, missing = True, room - sizes[worker], missing - 1
    if missing:
        row[:] = False
        row[np.argsort(sizes, kind="stable")[:smallest]] = True
    return row


def random_cohort(problem: Problem, rng: np.random.Generator) -> Bools:
    """Draw workers uniformly, one after another, until the next does not fit any more, (N,) (released code)."""
    everyone = np.ones((1, len(problem.labels)), dtype=bool)
    return np.asarray(repair(problem, everyone, rng.permutation(len(problem.labels)))[0])


def all_workers(problem: Problem) -> Bools:
    """Return the cohort of everybody, (N,) (ours)."""
    return np.ones(len(problem.labels), dtype=bool)


def greedy_cohort(problem: Problem) -> Bools:
    """Add the worker that lowers KL most while one fits, and keep the best cohort met on the way, (N,).

    Going on beyond the first rise costs little and often leads lower. Of very many workers, a pool of those that the
    quadratic form of :attr:`Problem.deviations` ranks first is drawn up anew every few steps, and the first of the pool
    are scored exactly (both ours).
    """
    deviations, sizes = problem.deviations, problem.batch_sizes
    imbalance, total = np.zeros(deviations.shape[1]), 0
    free = np.ones(len(sizes), dtype=bool)
    pool = np.arange(len(sizes))
    chosen: list[int] = []
    best, length = (np.inf, np.inf), 0
    while len(chosen) < problem.largest:
        if len(sizes) > POOL and len(chosen) % POOL_STEPS == 0:
            pool = _first(problem, np.flatnonzero(free), imbalance, total, POOL)
        room = _room(problem, chosen, total, free)
        candidates = pool[free[pool] & (sizes[pool] <= room)]
        if not len(candidates):
            candidates = pool = np.flatnonzero(free & (sizes <= room))
            if not len(candidates):
                break
        candidates = _first(problem, candidates, imbalance, total, max(64, EXACT // deviations.shape[1]))
        divergence = problem.divergence(imbalance + deviations[candidates], total + sizes[candidates])
        pick = int(np.argmin(divergence))
        worker = int(candidates[pick])
        chosen.append(worker)
        free[worker] = False
        imbalance, total = imbalance + deviations[worker], total + int(sizes[worker])
        fitness = (float(divergence[pick]), float(problem.budget - total))
        if len(chosen) >= problem.smallest and fitness < best:
            best, length = fitness, len(chosen)
    cohort = np.zeros(len(sizes), dtype=bool)
    cohort[chosen[:length]] = True
    return cohort


def _first(problem: Problem, workers: Ints, imbalance: Floats, total: int, count: int) -> Ints:
    """Return the workers that would lead to the least imbalance by the quadratic form, ``count`` at most."""
    if len(workers) <= count:
        return workers
    estimate = problem.squares[workers] + 2 * problem.deviations[workers] @ imbalance + imbalance @ imbalance
    estimate /= (total + problem.batch_sizes[workers]) ** 2
    return np.asarray(workers[np.argpartition(estimate, count)[:count]])


def _room(problem: Problem, chosen: list[int], total: int, free: Bools) -> int:
    """Return the largest batch that may be added so that ``smallest`` workers still fit afterwards."""
    missing = problem.smallest - len(chosen) - 1
    room = problem.budget - total
    if missing <= 0:
        return room
    sizes = problem.batch_sizes[free]
    return room - int(np.partition(sizes, missing - 1)[:missing].sum())
