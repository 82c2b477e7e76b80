"""Swap search on one cohort: it takes a good cohort to a very good one (ours)."""

from __future__ import annotations

import numpy as np

from fl_edge.mergesfl.selection import EXACT, Problem
from fl_edge.mergesfl.workers import Bools, Floats, Ints

BLOCK = 512  # members, and outsiders, that one step looks at: all of them, or a part chosen anew each step
TENURE = (2, 8)  # steps for which a worker that has just moved stays where it is


def polish(problem: Problem, cohort: Bools, rng: np.random.Generator, steps: int | None = None) -> Bools:
    """Improve a cohort by swaps, additions and drops; never returns a worse one, (N,).

    Tabu search: every step makes the best move there is, also when it leads uphill, and what has moved rests for some
    steps; the best cohort on the way is returned. An addition is a swap with nobody, so that one matrix product ranks
    all moves (see :attr:`Problem.deviations`), and only the best of each row and column are scored exactly.

    Parameters
    ----------
    cohort
        A feasible cohort, (N,).
    steps
        Moves to make; by default 250 plus one for every eight workers.
    """
    workers = len(cohort)
    nobody = workers  # an index behind the last worker: no imbalance, no samples
    deviations = np.vstack([problem.deviations, np.zeros(problem.deviations.shape[1])])
    squares, sizes = np.append(problem.squares, 0.0), np.append(problem.batch_sizes, 0)
    inside = cohort.copy()
    imbalance, total = problem.deviations[cohort].sum(axis=0), int(problem.batch_sizes[cohort].sum())
    best = (float(problem.divergence(imbalance, total)), problem.budget - total)
    best_cohort = cohort
    rests_until = np.zeros(workers, dtype=np.int64)
    for step in range(250 + workers // 8 if steps is None else steps):
        awake = rests_until <= step
        count = int(inside.sum())
        leaving = _part(np.flatnonzero(inside & awake), problem, -imbalance, rng)
        joining = _part(np.flatnonzero(~inside & awake), problem, imbalance, rng)
        leaving = np.append(leaving, nobody) if count < problem.largest else leaving
        joining = np.append(joining, nobody) if count > problem.smallest else joining
        if not len(leaving) or not len(joining):
            break
        # |R - u_i + u_j|^2 as one product of rows that carry their own offsets
        rows = np.column_stack([-2 * deviations[leaving], squares[leaving] - 2 * deviations[leaving] @ imbalance])
        columns = np.column_stack([deviations[joining], np.ones(len(joining))])
        estimate = rows @ columns.T
        estimate += squares[joining] + 2 * deviations[joining] @ imbalance + imbalance @ imbalance
        change = sizes[joining] - sizes[leaving][:, None]
        estimate /= np.square(total + change)
        estimate[change > problem.budget - total] = np.inf
        if leaving[-1] == nobody and joining[-1] == nobody:
            estimate[-1, -1] = np.inf
        i, j = _promising(estimate, deviations.shape[1])
        if not len(i):
            break
        leaving, joining = leaving[i], joining[j]
        moved = imbalance - deviations[leaving] + deviations[joining]
        totals = total - sizes[leaving] + sizes[joining]
        divergence = problem.divergence(moved, totals)
        pick = int(np.argmin(divergence))
        imbalance, total = moved[pick], int(totals[pick])
        for worker, joins in ((leaving[pick], False), (joining[pick], True)):
            if worker != nobody:
                inside[worker] = joins
                rests_until[worker] = step + 1 + rng.integers(*TENURE)
        fitness = (float(divergence[pick]), problem.budget - total)
        if fitness < best:
            best, best_cohort = fitness, inside.copy()
    return best_cohort


def _part(workers: Ints, problem: Problem, imbalance: Floats, rng: np.random.Generator) -> Ints:
    """Return at most BLOCK of the workers: half those that help most on their own, half drawn."""
    if len(workers) <= BLOCK:
        return workers
    alone = problem.squares[workers] + 2 * (problem.deviations[workers] @ imbalance)
    order = np.argpartition(alone, BLOCK // 2)
    drawn = rng.choice(order[BLOCK // 2 :], BLOCK // 2, replace=False, shuffle=False)
    return np.asarray(workers[np.concatenate([order[: BLOCK // 2], drawn])])


def _promising(estimate: Floats, classes: int) -> tuple[Ints, Ints]:
    """Return rows and columns of the moves that deserve an exact score: all, or the best of each row and column."""
    if estimate.size * classes <= EXACT:
        i, j = np.nonzero(np.isfinite(estimate))
        return i, j
    i, j = np.arange(estimate.shape[0]), np.arange(estimate.shape[1])
    rows, columns = np.append(i, estimate.argmin(axis=0)), np.append(estimate.argmin(axis=1), j)
    finite = np.isfinite(estimate[rows, columns])
    return rows[finite], columns[finite]
