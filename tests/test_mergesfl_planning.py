"""The control module of MergeSFL: who is chosen, and that every plan can be carried out."""

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.errors import ConfigError
from fl_edge.mergesfl.batching import average_waiting, durations
from fl_edge.mergesfl.config import MergeSFLConfig, released
from fl_edge.mergesfl.distribution import kl_divergence, label_mix
from fl_edge.mergesfl.genetic import evolve
from fl_edge.mergesfl.planning import Plan, make_plan, pose, select
from fl_edge.mergesfl.polish import polish, tabu_search
from fl_edge.mergesfl.selection import Problem, greedy_cohort, priorities, random_cohort, repair
from fl_edge.mergesfl.workers import Workers

seeds = st.integers(0, 2**32 - 1)
SMALL = MergeSFLConfig(population=6, generations=3)


def draw_workers(seed: int, count: int = 40, classes: int = 10, wild: bool = False, alpha: float = 0.1) -> Workers:
    rng = np.random.default_rng(seed)
    labels = rng.dirichlet(np.full(classes, alpha), count)
    labels /= labels.sum(axis=1, keepdims=True)
    samples, compute_s = rng.integers(64, 500, count), 0.01 * 30 ** rng.random(count)
    if wild:  # single-class workers, one sample, one worker a thousand times slower
        single = rng.random(count) < 0.5
        labels[single] = np.eye(classes)[rng.integers(classes, size=int(single.sum()))]
        samples[rng.random(count) < 0.3] = 1
        compute_s[rng.integers(count)] *= 1000
    return Workers(labels, samples, compute_s, np.full(count, 1e-3), rng.integers(0, 20, count))


def assert_feasible(plan: Plan, workers: Workers, config: MergeSFLConfig) -> None:
    assert plan.workers.dtype == plan.batch_sizes.dtype == np.int64
    assert (np.diff(plan.workers) > 0).all()
    assert (plan.batch_sizes >= 1).all()
    assert (plan.batch_sizes <= workers.samples[plan.workers]).all()
    assert (plan.batch_sizes <= config.largest_batch).all()
    assert plan.batch_sizes.sum() <= config.ingress_samples
    assert config.min_workers <= len(plan.workers) <= (config.max_workers or len(workers))


@given(
    seed=seeds,
    count=st.integers(1, 25),
    classes=st.integers(1, 12),
    selection=st.sampled_from(["genetic", "greedy", "random", "all"]),
    batches=st.sampled_from(["regulated", "equal"]),
    tuning=st.sampled_from(["greedy", "dual", "none"]),
    fill=st.booleans(),
    memory=st.sampled_from([0, 1, 40]),
    share=st.floats(0, 1),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_every_plan_can_be_carried_out(
    seed: int,
    count: int,
    classes: int,
    selection: str,
    batches: str,
    tuning: str,
    fill: bool,
    memory: int,
    share: float,
    data: st.DataObject,
) -> None:
    workers = draw_workers(seed, count, classes, wild=True)
    smallest = data.draw(st.integers(1, count))
    largest = 0 if selection == "all" else data.draw(st.sampled_from([0, *range(smallest, count + 1)]))
    needed = count if selection == "all" else smallest
    config = replace(
        SMALL, selection=selection, batches=batches, tuning=tuning, fill=fill, memory_batch=memory,
        min_workers=smallest, max_workers=largest, ingress_batches=(needed + share * 64 * count + 0.5) / 64,
    )  # fmt: skip
    plan = make_plan(workers, config, np.random.default_rng(seed))
    assert_feasible(plan, workers, config)
    again = make_plan(workers, config, np.random.default_rng(seed))
    assert again.workers.tolist() == plan.workers.tolist()
    assert again.batch_sizes.tolist() == plan.batch_sizes.tolist()
    if selection == "all":
        assert len(plan.workers) == count
    # what the plan says about itself
    times = durations(plan.batch_sizes, workers.cost_s[plan.workers], config.tau)
    assert plan.duration_s == times.max()
    assert plan.waiting_s == average_waiting(times)
    assert plan.label_mix == pytest.approx(label_mix(workers.labels[plan.workers], plan.batch_sizes))
    assert plan.reference == pytest.approx(workers.labels.mean(axis=0))
    assert plan.kl == pytest.approx(float(kl_divergence(plan.label_mix, plan.reference)), abs=1e-12)
    assert plan.kl_reached == (plan.kl <= config.kl_target)


@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_tuning_is_not_undone_by_filling(seed: int) -> None:
    workers = draw_workers(seed)
    config = replace(SMALL, selection="random", ingress_batches=4.0)
    tuned = make_plan(workers, replace(config, fill=False), np.random.default_rng(seed))
    filled = make_plan(workers, config, np.random.default_rng(seed))
    assert filled.workers.tolist() == tuned.workers.tolist()
    assert filled.kl <= max(tuned.kl, config.kl_target)
    assert filled.kl_reached >= tuned.kl_reached


@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_genetic_search_and_polishing_are_never_worse_than_greedy(seed: int) -> None:
    problem = pose(draw_workers(seed), MergeSFLConfig(ingress_batches=3.0))
    rng = np.random.default_rng(seed)
    population = evolve(problem, SMALL, rng)
    cohorts = np.stack([greedy_cohort(problem), population[0], polish(problem, population, rng)])
    greedy, genetic, polished = problem.score(cohorts)[0]
    rounding = 1e-14
    assert genetic <= greedy + rounding
    assert polished <= genetic + rounding


@given(seed=seeds, smallest=st.integers(1, 3), largest=st.integers(3, 9))
@settings(max_examples=20, deadline=None)
def test_polished_cohorts_come_close_to_the_best_of_all_subsets(seed: int, smallest: int, largest: int) -> None:
    workers = draw_workers(seed, count=9, classes=4)
    problem = pose(workers, MergeSFLConfig(ingress_batches=2.5, min_workers=smallest, max_workers=largest))
    subsets = np.array(list(itertools.product([False, True], repeat=9)))
    size, total = subsets.sum(axis=1), subsets @ problem.batch_sizes
    feasible = subsets[(size >= smallest) & (size <= largest) & (total <= problem.budget)]
    least = problem.score(feasible)[0].min()
    rng = np.random.default_rng(seed)
    found = polish(problem, evolve(problem, MergeSFLConfig(), rng), rng)
    assert (feasible == found).all(axis=1).any()
    assert problem.score(found[None])[0][0] <= 1.1 * least + 1e-3


@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_greedy_choice_does_not_depend_on_the_order_of_the_workers(seed: int) -> None:
    workers = draw_workers(seed)
    order = np.random.default_rng(seed).permutation(len(workers))
    shuffled = Workers(
        **{
            name: getattr(workers, name)[order]
            for name in ("labels", "samples", "compute_s", "transfer_s", "participation")
        }
    )
    config = MergeSFLConfig(ingress_batches=3.0, selection="greedy")
    plan, other = (make_plan(state, config, np.random.default_rng(0)) for state in (workers, shuffled))
    assert sorted(order[other.workers]) == plan.workers.tolist()
    assert other.kl == pytest.approx(plan.kl, abs=1e-12)


@given(seed=seeds, smallest=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_searches_keep_to_the_limits_at_every_step(seed: int, smallest: int) -> None:
    problem = pose(draw_workers(seed, 20), MergeSFLConfig(ingress_batches=1.5, min_workers=smallest, max_workers=7))
    rng = np.random.default_rng(seed)
    drawn = rng.random((8, 20)) < rng.random((8, 1))
    for cohorts in (repair(problem, drawn), tabu_search(problem, repair(problem, drawn), 15, rng)):
        assert (cohorts @ problem.batch_sizes <= problem.budget).all()
        assert (cohorts.sum(axis=1) >= smallest).all()
        assert (cohorts.sum(axis=1) <= 7).all()


def test_repair_drops_the_lowest_priority_then_the_largest_batch() -> None:
    problem = Problem(
        labels=np.eye(4),
        batch_sizes=np.array([4, 3, 2, 1]),
        priorities=np.array([2.0, 1.0, 1.0, 3.0]),
        reference=np.full(4, 0.25),
        budget=7,
        smallest=2,
        largest=3,
    )
    everybody, nobody = np.ones((1, 4), dtype=bool), np.zeros((1, 4), dtype=bool)
    assert repair(problem, everybody).tolist() == [[True, False, True, True]]
    assert repair(problem, nobody).tolist() == [[True, False, False, True]]


def test_priority_favours_who_took_part_seldom() -> None:
    assert priorities(np.array([0, 1, 3])).tolist() == [7.0, 3.5, 1.75]


def test_large_problems_are_searched_in_parts() -> None:
    problem = pose(draw_workers(0, count=1500), MergeSFLConfig(ingress_batches=60.0))
    rng = np.random.default_rng(0)
    start = np.stack([random_cohort(problem, rng)])
    found = tabu_search(problem, start, 60, rng)
    assert found @ problem.batch_sizes <= problem.budget
    assert problem.score(found)[0][0] < 1e-3 * problem.score(start)[0][0]


def test_forty_workers_come_within_a_thousandth_of_the_uniform_mix() -> None:
    """The worker-choice bar of the peers: 40 workers, 10 classes, a budget of 40 %."""
    workers = draw_workers(1, alpha=0.35)  # all workers are about as far from uniform as in the peers' case, 0.024
    problem = pose(workers, MergeSFLConfig(ingress_batches=16.0, batches="equal"))
    problem = replace(problem, reference=np.full(10, 0.1))
    chosen = select(problem, MergeSFLConfig(), np.random.default_rng(0))
    assert problem.score(chosen[None])[0][0] <= 1e-3


def test_the_released_variant_draws_uniformly_and_gives_everyone_the_same_batch() -> None:
    workers, config = draw_workers(5), released(MergeSFLConfig())
    counts = np.zeros(len(workers))
    for seed in range(400):
        plan = make_plan(workers, config, np.random.default_rng(seed))
        assert plan.batch_sizes.tolist() == [64] * 10
        counts[plan.workers] += 1
    assert counts.min() > 60  # 100 expected, standard deviation 9
    assert counts.max() < 140


def test_everybody_takes_part_with_shrunken_batches_when_the_budget_is_small() -> None:
    workers = draw_workers(6)
    plan = make_plan(workers, MergeSFLConfig(selection="all", ingress_batches=40 / 64), np.random.default_rng(0))
    assert plan.batch_sizes.tolist() == [1] * 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_workers": 41}, "min_workers=41: more workers asked for than exist; it must be at most 40"),
        (
            {"min_workers": 20, "ingress_batches": 0.25},
            "ingress_batches=0.25 takes 16 samples an iteration, too few for 20 workers; it must be at least 0.3125",
        ),
        (
            {"selection": "all", "ingress_batches": 0.5},
            "ingress_batches=0.5 takes 32 samples an iteration, too few for 40 workers; it must be at least 0.625",
        ),
        (
            {"selection": "all", "max_workers": 5},
            "max_workers=5 contradicts selection=all with 40 workers; it must be 0 or at least as many",
        ),
    ],
)
def test_impossible_plans_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make_plan(draw_workers(7), replace(MergeSFLConfig(), **changes), np.random.default_rng(0))
