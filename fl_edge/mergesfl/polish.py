"""Swap search from several cohorts at once: it takes good cohorts to a very good one (ours)."""

from __future__ import annotations

import numpy as np

from fl_edge.mergesfl.selection import Problem
from fl_edge.mergesfl.workers import Bools, Floats, Ints

BLOCK = 128  # members, and outsiders, that one step looks at: all of them, or a part chosen anew each step
EXACT_MOVES = 16  # moves that one step scores with the exact divergence
TENURE = (2, 8)  # steps for which a worker that has just moved stays where it is
STAGES = ((30, 5), (60, 1))  # steps of every search, and how many of the leading ones go on
LAST_STAGE = (120, 10)  # steps of the last search: so many, and one more for every so many workers


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
    for steps, survivors in (*STAGES, (LAST_STAGE[0] + cohorts.shape[1] // LAST_STAGE[1], 1)):
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
    each = np.arange(searches)
    deviations = np.vstack([problem.deviations, np.zeros(problem.deviations.shape[1])])
    squares, sizes = np.append(problem.squares, 0.0), np.append(problem.batch_sizes, 0).astype(np.float64)
    inside = np.column_stack([cohorts, np.zeros(searches, dtype=bool)])
    imbalance, total = inside @ deviations, inside @ sizes
    best, best_divergence = inside.copy(), problem.divergence(imbalance, total)
    rests_until = np.zeros(inside.shape, dtype=np.int64)
    for step in range(steps):
        count = inside.sum(axis=1)
        leaving, out_u, out_cost = _candidates(problem, deviations, squares, inside, -imbalance, rng)
        joining, in_u, in_cost = _candidates(problem, deviations, squares, ~inside, imbalance, rng)
        resting = rests_until > step
        out_cost[np.take_along_axis(resting | ~inside, leaving, axis=1)] = np.inf
        in_cost[np.take_along_axis(resting | inside, joining, axis=1)] = np.inf
        out_cost[:, -1] = np.where(count < problem.largest, 0.0, np.inf)
        in_cost[:, -1] = np.where(count > problem.smallest, 0.0, np.inf)
        # |R - u_i + u_j|^2 / (T - d_i + d_j)^2, (P, leaving, joining)
        estimate = out_u @ (-2 * in_u).swapaxes(1, 2)
        estimate += (out_cost + np.einsum("pc,pc->p", imbalance, imbalance)[:, None])[:, :, None]
        estimate += in_cost[:, None, :]
        totals = (total[:, None] - sizes[leaving])[:, :, None] + sizes[joining][:, None, :]
        estimate[totals > problem.budget] = np.inf
        estimate /= np.square(totals, out=totals)
        estimate[:, -1, -1] = np.inf
        i, j, finite = _promising(estimate)
        leaving, joining = np.take_along_axis(leaving, i, axis=1), np.take_along_axis(joining, j, axis=1)
        moved = imbalance[:, None] - deviations[leaving] + deviations[joining]
        moved_totals = total[:, None] - sizes[leaving] + sizes[joining]
        divergence = np.where(finite, problem.divergence(moved, np.maximum(moved_totals, 1)), np.inf)
        pick = divergence.argmin(axis=1)
        stuck = ~finite[each, pick]
        leave, join = np.where(stuck, nobody, leaving[each, pick]), np.where(stuck, nobody, joining[each, pick])
        inside[each, leave], inside[each, join] = False, True
        inside[:, nobody] = False
        rest = step + 1 + rng.integers(*TENURE, size=(2, searches))
        rests_until[each, leave], rests_until[each, join] = rest
        imbalance = imbalance - deviations[leave] + deviations[join]
        total = total - sizes[leave] + sizes[join]
        better = divergence[each, pick] < best_divergence
        best[better], best_divergence[better] = inside[better], divergence[each, pick][better]
    return np.asarray(best[:, :nobody])


def _candidates(
    problem: Problem, deviations: Floats, squares: Floats, among: Bools, imbalance: Floats, rng: np.random.Generator
) -> tuple[Ints, Floats, Floats]:
    """Return workers that may move, nobody last, their u, and what each alone adds to |R|^2, (P, k) and (P, k, C).

    Of more than BLOCK workers, half are those that help most on their own, half are drawn.
    """
    among = among[:, :-1]
    width = int(among.sum(axis=1).max(initial=0))
    if width <= BLOCK:
        workers = np.argsort(~among, axis=1, kind="stable")[:, :width]
    else:
        alone = np.where(among, problem.squares + 2 * imbalance @ problem.deviations.T, np.inf)
        drawn = np.where(among, rng.random(among.shape), np.inf)
        half = BLOCK // 2
        workers = np.hstack([np.argpartition(keys, half, axis=1)[:, :half] for keys in (alone, drawn)])
    workers = np.column_stack([workers, np.full(len(workers), among.shape[1])])
    chosen = deviations[workers]
    return workers, chosen, squares[workers] + 2 * np.einsum("pkc,pc->pk", chosen, imbalance)


def _promising(estimate: Floats) -> tuple[Ints, Ints, Bools]:
    """Return rows and columns of the moves that deserve an exact score, and which of them are allowed, (P, k)."""
    searches, rows, columns = estimate.shape
    i = np.concatenate([np.broadcast_to(np.arange(rows), (searches, rows)), estimate.argmin(axis=1)], axis=1)
    j = np.concatenate([estimate.argmin(axis=2), np.broadcast_to(np.arange(columns), (searches, columns))], axis=1)
    values = estimate[np.arange(searches)[:, None], i, j]
    if values.shape[1] > EXACT_MOVES:
        keep = np.argpartition(values, EXACT_MOVES, axis=1)[:, :EXACT_MOVES]
        i, j, values = (np.take_along_axis(array, keep, axis=1) for array in (i, j, values))
    return i, j, np.isfinite(values)
