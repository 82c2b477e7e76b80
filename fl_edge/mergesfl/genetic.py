"""Worker selection by a genetic algorithm (MergeSFL, section 4.4; the operators are ours, the paper names none)."""

from __future__ import annotations

import numpy as np

from fl_edge.mergesfl.config import MergeSFLConfig
from fl_edge.mergesfl.selection import Problem, greedy_cohort, repair
from fl_edge.mergesfl.workers import Bools


def evolve(problem: Problem, config: MergeSFLConfig, rng: np.random.Generator) -> Bools:
    """Return the population after ``config.generations``, fittest first, (population, N).

    The fittest is never worse than the greedy cohort if that is seeded (``config.greedy_seed``).

    Each generation keeps its best individual (elitism); all others are children of two tournament winners, by one-point
    crossover, bit flips, and repair.
    """
    population = _first_population(problem, config, rng)
    if config.greedy_seed:
        population[0] = greedy_cohort(problem)
    children, workers = len(population) - 1, population.shape[1]
    for _ in range(config.generations):
        divergence, unused = problem.score(population)
        rank = np.argsort(np.lexsort((unused, divergence)))
        rivals = rng.integers(len(population), size=(2, children, config.tournament))
        winners = np.take_along_axis(rivals, rank[rivals].argmin(axis=2)[..., None], axis=2)[..., 0]
        cut = rng.integers(1, max(workers, 2), size=(children, 1))
        offspring = np.where(np.arange(workers) < cut, population[winners[0]], population[winners[1]])
        offspring ^= rng.random(offspring.shape) < config.mutation
        population = np.concatenate([population[rank == 0], repair(problem, offspring)])
    divergence, unused = problem.score(population)
    return np.asarray(population[np.lexsort((unused, divergence))])


def _first_population(problem: Problem, config: MergeSFLConfig, rng: np.random.Generator) -> Bools:
    """Draw workers with probability proportional to priority, as many as a uniform size says, (population, N).

    Sizes are uniform between the smallest cohort and what fits of the drawn order: were they uniform up to N, repair
    would cut most individuals to the same few workers of highest priority.
    """
    shape = (config.population, len(problem.labels))
    # the order of Exp(1) / weight is that of weighted draws without replacement (Efraimidis and Spirakis)
    order = np.argsort(rng.exponential(size=shape) / problem.priorities, axis=1)
    fitting = (np.cumsum(problem.batch_sizes[order], axis=1) <= problem.budget).sum(axis=1)
    high = np.maximum(np.minimum(fitting, problem.largest), problem.smallest)
    size = rng.integers(problem.smallest, high + 1)
    population = np.zeros(shape, dtype=bool)
    np.put_along_axis(population, order, np.arange(shape[1]) < size[:, None], axis=1)
    return repair(problem, population)
