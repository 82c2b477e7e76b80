"""Swap search from several cohorts at once: it takes good cohorts to a very good one (ours)."""

from __future__ import annotations

import math

import numpy as np

from fl_edge.mergesfl.selection import Problem
from fl_edge.mergesfl.workers import Bools, Floats, Ints

MOVES = 2**18  # swaps that one step ranks, over all searches: every one there is, or a part chosen anew each step
EXACT_MOVES = 16  # moves that one step scores with the exact divergence
GRAM = 1024  # up to so many workers, all products u_i u_j are kept (8 MiB)
TENURE = (2, 8)  # steps for which a worker that has just moved stays where it is
STAGES = ((30, 6), (70, 1))  # steps of every search, and how many of the leading ones go on
LAST_STEPS = 1250  # steps of the last search: one for every eight workers, but no more than these


def polish(problem: Problem, cohorts: Bools, rng: np.random.Generator) -> Bools:
    """Improve cohorts by swaps, additions and drops, and return the fittest one met, (N,).

    All searches run side by side, and after each stage only the leading ones go on. They start with the budget filled
    up: what imbalance is left weighs less in a larger batch.

    Parameters
    ----------
    cohorts
        Feasible cohorts to start from, (P, N).
    """
    best = cohorts[problem.best(cohorts)]
    leading = _filled_up(problem, cohorts, rng)
    for steps, survivors in (*STAGES, (min(cohorts.shape[1] // 8, LAST_STEPS), 1)):
        leading = tabu_search(problem, leading, steps, rng)
        divergence, unused = problem.score(leading)
        leading = leading[np.lexsort((unused, divergence))[:survivors]]
    finalists = np.stack([best, leading[0]])
    return np.asarray(finalists[problem.best(finalists)])


def _filled_up(problem: Problem, cohorts: Bools, rng: np.random.Generator) -> Bools:
    """Add workers, drawn with probability proportional to priority, until the next one does not fit, (P, N)."""
    order = np.argsort(np.where(cohorts, 0.0, rng.exponential(size=cohorts.shape) / problem.priorities), axis=1)
    fits = np.cumsum(problem.batch_sizes[order], axis=1) <= problem.budget
    fits[:, problem.largest :] = False
    filled = np.zeros_like(cohorts)
    np.put_along_axis(filled, order, fits, axis=1)
    return filled


def tabu_search(problem: Problem, cohorts: Bools, steps: int, rng: np.random.Generator) -> Bools:
    """Return the fittest cohort that each search met, (P, N); none is worse than its start.

    Every step makes the best move there is, also when it leads uphill, and what has moved rests for some steps. An
    addition is a swap with nobody, so that one matrix product ranks all moves by the quadratic form of
    :attr:`Problem.deviations`; the most promising ones are then scored with the exact divergence.
    """
    searches, nobody = cohorts.shape  # nobody: an index behind the last worker, without imbalance or samples
    most = math.isqrt(MOVES // searches)
    each, every = np.arange(searches), np.arange(searches)[:, None]
    deviations = np.vstack([problem.deviations, np.zeros(problem.deviations.shape[1])])
    squares, sizes = np.append(problem.squares, 0.0), np.append(problem.batch_sizes, 0).astype(np.float64)
    products = -2 * deviations @ deviations.T if nobody <= GRAM else None
    inside = np.column_stack([cohorts, np.zeros(searches, dtype=bool)])
    imbalance, total = inside @ deviations, inside @ sizes
    best, best_divergence = inside.copy(), problem.divergence(imbalance, total)
    rests_until = np.zeros(inside.shape, dtype=np.int64)
    for step in range(steps):
        # |R - u_i + u_j|^2 = |R|^2 + leave_i + join_j - 2 u_i u_j
        along, awake, count = 2 * imbalance @ deviations.T, rests_until <= step, inside.sum(axis=1)
        leave_cost = np.where(inside & awake, squares - along, np.inf)
        join_cost = np.where(~inside & awake, squares + along, np.inf)
        leave_cost[:, nobody] = np.where(count < problem.largest, 0.0, np.inf)
        join_cost[:, nobody] = np.where(count > problem.smallest, 0.0, np.inf)
        leaving, joining = _candidates(leave_cost, most, rng), _candidates(join_cost, most, rng)
        if products is None:
            estimate = deviations[leaving] @ (-2 * deviations[joining]).swapaxes(1, 2)
        else:
            estimate = products[leaving[:, :, None], joining[:, None, :]]
        estimate += (leave_cost[every, leaving] + np.square(imbalance).sum(axis=1, keepdims=True))[:, :, None]
        estimate += join_cost[every, joining][:, None, :]
        totals = (total[:, None] - sizes[leaving])[:, :, None] + sizes[joining][:, None, :]
        np.putmask(estimate, totals > problem.budget, np.inf)
        estimate[:, -1, -1] = np.inf  # nobody for nobody
        estimate /= np.square(totals, out=totals)
        i, j, allowed = _promising(estimate)
        leaving, joining = leaving[every, i], joining[every, j]
        moved = imbalance[:, None] - deviations[leaving] + deviations[joining]
        moved_totals = np.maximum(total[:, None] - sizes[leaving] + sizes[joining], 1)
        divergence = np.where(allowed, problem.divergence(moved, moved_totals), np.inf)
        pick = divergence.argmin(axis=1)
        stays = ~allowed[each, pick]
        leave, join = np.where(stays, nobody, leaving[each, pick]), np.where(stays, nobody, joining[each, pick])
        inside[each, leave], inside[each, join] = False, True
        rests_until[each, leave], rests_until[each, join] = step + 1 + rng.integers(*TENURE, size=(2, searches))
        inside[:, nobody], rests_until[:, nobody] = False, 0
        imbalance = imbalance - deviations[leave] + deviations[join]
        total = total - sizes[leave] + sizes[join]
        better = divergence[each, pick] < best_divergence
        best[better], best_divergence[better] = inside[better], divergence[each, pick][better]
    return np.asarray(best[:, :nobody])


def _candidates(costs: Floats, most: int, rng: np.random.Generator) -> Ints:
    """Return workers that may move, by search, nobody last, (P, k).

    Of more than ``most`` workers, seven eighths are those of the least cost on their own, the rest are drawn: near the
    optimum, small changes are what helps, and those of least cost make the smallest ones.
    """
    possible = np.isfinite(costs[:, :-1])
    width = int(possible.sum(axis=1).max())
    if width <= most:
        workers = np.argsort(~possible, axis=1, kind="stable")[:, :width]
    else:
        drawn = np.where(possible, rng.random(possible.shape), np.inf)
        parts = ((costs[:, :-1], most - most // 8), (drawn, most // 8))
        workers = np.hstack([np.argpartition(keys, count, axis=1)[:, :count] for keys, count in parts])
    return np.column_stack([workers, np.full(len(workers), possible.shape[1])])


def _promising(estimate: Floats) -> tuple[Ints, Ints, Bools]:
    """Return rows and columns of the moves that deserve an exact score, and which of them are allowed, (P, k).

    These are the best of each row and of each column, and of them the best EXACT_MOVES.
    """
    searches, rows, columns = estimate.shape
    i, j = np.empty((2, searches, rows + columns), dtype=np.int64)
    i[:, :rows], j[:, :rows] = np.arange(rows), estimate.argmin(axis=2)
    i[:, rows:], j[:, rows:] = estimate.argmin(axis=1), np.arange(columns)
    every = np.arange(searches)[:, None]
    values = estimate[every, i, j]
    if rows + columns > EXACT_MOVES:
        keep = np.argpartition(values, EXACT_MOVES, axis=1)[:, :EXACT_MOVES]
        i, j, values = i[every, keep], j[every, keep], values[every, keep]
    return i, j, np.isfinite(values)
