"""The solvers that :mod:`benchmarks.plan` compares with: a local search, and pygad, both tuned for this problem."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from fl_edge.mergesfl.distribution import kl_divergence
from fl_edge.mergesfl.selection import Problem, random_cohort
from fl_edge.mergesfl.workers import Bools, Floats, Ints

# Numbers (moves times classes) that the local search scores at once: what fits into the caches.
_AT_ONCE = 2**20


def local_search(problem: Problem, rng: np.random.Generator, seconds: float) -> float:
    """Steepest one-flip and swap search on the exact divergence, restarted from random cohorts until time is up.

    Every step takes the best flip; where none helps, the best swap, of all of them or of as many drawn ones as are
    scored in a few milliseconds. A restart ends when 3 such draws in a row do not help.
    """
    weighted = problem.labels * problem.batch_sizes[:, None]
    best, end = np.inf, time.perf_counter() + seconds
    while True:
        cohort = random_cohort(problem, rng)
        best = min(best, _descend(problem, weighted, cohort, rng, end))
        if time.perf_counter() >= end:
            return best


def _descend(problem: Problem, weighted: Floats, cohort: Bools, rng: np.random.Generator, end: float) -> float:
    sizes, classes = problem.batch_sizes, problem.labels.shape[1]
    mix, total = weighted[cohort].sum(axis=0), int(sizes[cohort].sum())
    current = float(kl_divergence(mix / total, problem.reference))
    failures = 0
    while failures < 3 and time.perf_counter() < end:
        sign = np.where(cohort, -1, 1)
        totals = total + sign * sizes
        fits = np.flatnonzero((totals <= problem.budget) & (totals > 0))
        moved = (mix + sign[fits, None] * weighted[fits]) / totals[fits, None]
        scores = kl_divergence(moved, problem.reference)
        if len(fits) and scores.min() < current - 1e-15:
            worker = int(fits[np.argmin(scores)])
            mix, total = mix + sign[worker] * weighted[worker], int(totals[worker])
            cohort[worker] = not cohort[worker]
            current = float(scores.min())
            continue
        inside, outside = np.flatnonzero(cohort), np.flatnonzero(~cohort)
        every = len(inside) * len(outside)
        if every * classes <= _AT_ONCE:
            pairs: Ints = np.arange(every)
            failures = 3
        else:
            pairs, failures = rng.integers(every, size=_AT_ONCE // classes), failures + 1
        leaving, joining = inside[pairs // len(outside)], outside[pairs % len(outside)]
        totals = total - sizes[leaving] + sizes[joining]
        light = totals <= problem.budget
        leaving, joining, totals = leaving[light], joining[light], totals[light]
        scores = kl_divergence((mix - weighted[leaving] + weighted[joining]) / totals[:, None], problem.reference)
        if len(scores) and scores.min() < current - 1e-15:
            pick = int(np.argmin(scores))
            mix, total = mix - weighted[leaving[pick]] + weighted[joining[pick]], int(totals[pick])
            cohort[leaving[pick]], cohort[joining[pick]] = False, True
            current, failures = float(scores.min()), 0
    return current


def pygad_search(problem: Problem, seed: int, seconds: float) -> float:
    """Run pygad until time is up: the whole population scored at once, infeasible ones ranked by their excess.

    Mutation and crossover are vectorised, as pygad's own visit every gene in Python: uniform crossover, and some random
    exchanges of members and outsiders. Population and number of exchanges are the best of six pairs tried at each size.
    """
    import pygad

    rng = np.random.default_rng(seed)
    population, swaps = (100, 2) if len(problem.labels) < 500 else (50, 1)
    sizes = problem.batch_sizes.astype(np.float64)
    weighted = problem.labels * sizes[:, None]

    def fitness(_: Any, genes: Any, __: Any) -> Any:
        chosen = np.atleast_2d(genes).astype(np.float64)
        total = chosen @ sizes
        divergence = kl_divergence(chosen @ weighted / np.maximum(total, 1)[:, None], problem.reference)
        excess = np.maximum(total - problem.budget, 0) / problem.budget + (total == 0)
        return np.where(excess > 0, -1e3 * (1 + excess), -divergence)

    def crossover(parents: Any, shape: tuple[int, int], _: Any) -> Any:
        first = np.arange(shape[0]) % len(parents)
        second = rng.permutation(shape[0]) % len(parents)
        return np.where(rng.random(shape) < 0.5, parents[first], parents[second])

    def mutation(offspring: Any, _: Any) -> Any:
        # random keys: one outsider joins, and one member leaves, each in half of the children
        for _ in range(swaps):
            for wanted in (0, 1):
                keys = np.where(offspring == wanted, rng.random(offspring.shape), -1)
                rows = np.flatnonzero(rng.random(len(offspring)) < 0.5)
                offspring[rows, keys.argmax(axis=1)[rows]] = 1 - wanted
        return offspring

    end = time.perf_counter() + seconds
    start = np.stack([random_cohort(problem, rng) for _ in range(population)]).astype(np.int8)
    search = pygad.GA(
        num_generations=1_000_000,
        num_parents_mating=population // 2,
        fitness_func=fitness,
        fitness_batch_size=population,
        initial_population=start,
        gene_type=np.int8,
        gene_space=[0, 1],
        parent_selection_type="tournament",
        K_tournament=3,
        crossover_type=crossover,
        mutation_type=mutation,
        keep_elitism=5,
        on_generation=lambda _: "stop" if time.perf_counter() >= end else None,
        random_seed=seed,
        suppress_warnings=True,
    )
    search.run()
    return -float(search.best_solution()[1])
