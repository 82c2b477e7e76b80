"""One round's plan: who takes part, and with how many samples an iteration (MergeSFL, sections 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fl_edge.errors import ConfigError
from fl_edge.mergesfl.batching import average_waiting, durations, equal, regulate, shrink
from fl_edge.mergesfl.config import MergeSFLConfig
from fl_edge.mergesfl.distribution import kl_divergence, label_mix, reference_mix
from fl_edge.mergesfl.genetic import evolve
from fl_edge.mergesfl.polish import polish
from fl_edge.mergesfl.selection import Problem, all_workers, greedy_cohort, priorities, random_cohort
from fl_edge.mergesfl.tuning import Cohort, fill, tune, tune_dual
from fl_edge.mergesfl.workers import Bools, Floats, Ints, Workers


@dataclass(frozen=True)
class Plan:
    """What the server asks of the workers in one round.

    Parameters
    ----------
    workers
        S, int64 (m,): the chosen workers, ascending.
    batch_sizes
        d, int64 (m,): samples an iteration of each of them.
    kl
        KL(Phi || Phi_0) of the merged batch, nats (eq. 12).
    kl_reached
        Whether it is at or below ``kl_target``.
    label_mix
        Phi, (C,): label distribution of the merged batch (eq. 11).
    reference
        Phi_0, (C,).
    duration_s
        Predicted seconds of the round, tau times those of its slowest iteration (eq. 7).
    waiting_s
        Predicted seconds that a worker waits in the round, on average (eq. 8).
    """

    workers: Ints
    batch_sizes: Ints
    kl: float
    kl_reached: bool
    label_mix: Floats
    reference: Floats
    duration_s: float
    waiting_s: float


def make_plan(workers: Workers, config: MergeSFLConfig, rng: np.random.Generator) -> Plan:
    """Choose a cohort and its batch sizes for one round.

    Batch sizes come first (eq. 9), then the cohort that brings the label mix closest to the reference within the
    server's budget (eqs. 10-13), then the tuning of its batches if that was not close enough (eq. 14), then their
    enlargement to the budget. Where the smallest cohort asked for (or everybody, with ``selection="all"``) does not
    fit with these batches, all batches shrink by one factor first, down to one sample each (ours).

    The plan is always feasible: 1 <= d_i <= n_i, sum d_i <= B^h / c, and the cohort's size is within its limits.

    Raises
    ------
    ConfigError
        No cohort can meet the limits.
    """
    problem = pose(workers, config)
    chosen = np.flatnonzero(select(problem, config, rng))
    cost_s, samples = workers.cost_s[chosen], workers.samples[chosen]
    limits = np.minimum(samples, min(config.batch_size, config.largest_batch))
    cohort = Cohort(workers.labels[chosen], cost_s, limits, problem.reference, problem.budget)
    batch_sizes = _tuned(cohort, problem.batch_sizes[chosen], config)
    if config.fill:
        batch_sizes = _filled(cohort, batch_sizes, samples, config)
    mix = label_mix(cohort.labels, batch_sizes)
    kl = float(kl_divergence(mix, problem.reference))
    durations_s = durations(batch_sizes, cost_s, config.tau)
    return Plan(
        workers=chosen,
        batch_sizes=batch_sizes,
        kl=kl,
        kl_reached=kl <= config.kl_target,
        label_mix=mix,
        reference=problem.reference,
        duration_s=float(durations_s.max()),
        waiting_s=average_waiting(durations_s),
    )


def pose(workers: Workers, config: MergeSFLConfig) -> Problem:
    """Return the selection problem of a round: initial batch sizes, priorities, reference and limits.

    Raises
    ------
    ConfigError
        No cohort can meet the limits.
    """
    count, budget = len(workers), config.ingress_samples
    smallest = _smallest_cohort(count, config)
    if config.batches == "equal":
        sizes = equal(workers.samples, config.batch_size)
    else:
        sizes = regulate(workers.cost_s, workers.samples, config.batch_size)
    sizes = shrink(np.minimum(sizes, min(budget, config.largest_batch)), smallest, budget)
    return Problem(
        labels=workers.labels,
        batch_sizes=sizes,
        priorities=priorities(workers.participation),
        reference=reference_mix(workers.labels),
        budget=budget,
        smallest=smallest,
        largest=min(config.max_workers or count, count),
    )


def select(problem: Problem, config: MergeSFLConfig, rng: np.random.Generator) -> Bools:
    """Return the cohort that ``config.selection`` asks for, (N,)."""
    if config.selection == "all":
        return all_workers(problem)
    if config.selection == "random":
        return random_cohort(problem, rng)
    if config.selection == "greedy":
        return greedy_cohort(problem)
    population = evolve(problem, config, rng)
    return polish(problem, population, rng) if config.polish else population[0]


def _smallest_cohort(count: int, config: MergeSFLConfig) -> int:
    """Return how many workers must fit, or say in one line why no cohort can."""
    if config.min_workers > count:
        raise ConfigError(
            f"min_workers={config.min_workers}: more workers asked for than exist; it must be at most {count}"
        )
    if config.selection == "all" and 0 < config.max_workers < count:
        raise ConfigError(
            f"max_workers={config.max_workers} contradicts selection=all with {count} workers; "
            "it must be 0 or at least as many"
        )
    smallest = count if config.selection == "all" else config.min_workers
    if config.ingress_samples < smallest:
        raise ConfigError(
            f"ingress_batches={config.ingress_batches} takes {config.ingress_samples} samples an iteration, too few "
            f"for {smallest} workers; it must be at least {smallest / config.batch_size:g}"
        )
    return smallest


def _tuned(cohort: Cohort, sizes: Ints, config: MergeSFLConfig) -> Ints:
    if config.tuning == "none" or cohort.divergence(sizes) <= config.kl_target:
        return sizes
    return (tune_dual if config.tuning == "dual" else tune)(cohort, sizes, config.kl_target)


def _filled(cohort: Cohort, sizes: Ints, samples: Ints, config: MergeSFLConfig) -> Ints:
    """Enlarge the batches, unless that costs the label mix what selection and tuning achieved (ours).

    Rounding shifts the mix. A target that was met stays met, and one that was not gets no further away: otherwise the
    enlarged batches are tuned once more, and if that does not help either, the batches stay as they were.
    """
    bar = max(config.kl_target, float(cohort.divergence(sizes)))
    enlarged = fill(sizes, samples, config.largest_batch, cohort.budget)
    roomier = replace(cohort, limits=np.minimum(samples, config.largest_batch))
    enlarged = _tuned(roomier, enlarged, replace(config, kl_target=bar))
    return enlarged if cohort.divergence(enlarged) <= bar else sizes
