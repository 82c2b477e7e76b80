"""The control module of MergeSFL: estimates, batch regulation, label mixes, tuning."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.errors import ReplyError
from fl_edge.mergesfl.batching import average_waiting, bottom_learning_rates, durations, equal, regulate, shrink
from fl_edge.mergesfl.distribution import kl_divergence, kl_gradient, label_mix, reference_mix
from fl_edge.mergesfl.estimation import measured_transfer_s, smooth
from fl_edge.mergesfl.tuning import Cohort, fill, tune, tune_dual
from fl_edge.mergesfl.workers import Floats, Ints, Workers

seeds = st.integers(0, 2**32 - 1)
Solver = Callable[[Cohort, Ints, float], Ints]


def draw_cohort(seed: int, count: int = 12, classes: int = 10, budget: int = 600) -> tuple[Cohort, Ints]:
    rng = np.random.default_rng(seed)
    labels = rng.dirichlet(np.full(classes, 0.1), 80)
    cost_s = 20 ** rng.random(count)
    sizes = regulate(cost_s, rng.integers(1, 300, count), 64)
    limits = np.maximum(sizes, rng.integers(1, 65, count))
    return Cohort(labels[:count], cost_s, limits, reference_mix(labels), max(budget, int(sizes.sum()))), sizes


def test_first_observation_is_the_estimate_and_later_ones_are_smoothed() -> None:
    assert smooth(None, 3.0, 0.8) == 3.0
    assert smooth(1.0, 2.0, 0.8) == pytest.approx(1.2)


def test_transfer_is_what_an_exchange_takes_beyond_the_workers_own_seconds() -> None:
    assert measured_transfer_s(3.0, 1.0, 8) == 0.25
    assert measured_transfer_s(1.0, 1.5, 8) == 0.0  # two clocks need not agree


def test_durations_and_waiting_by_hand() -> None:
    times = durations(np.array([4, 2]), np.array([0.5, 0.25]), tau=10)
    assert times.tolist() == [20.0, 5.0]
    assert average_waiting(times) == 7.5


@given(seed=seeds, count=st.integers(1, 40), largest=st.integers(1, 200))
def test_regulated_batches_end_within_one_sample_of_each_other(seed: int, count: int, largest: int) -> None:
    cost_s = 50 ** np.random.default_rng(seed).random(count)
    sizes = regulate(cost_s, np.full(count, 10**6), largest)
    assert sizes[np.argmin(cost_s)] == largest
    unforced = sizes * cost_s <= largest * cost_s.min() * (1 + 1e-9)  # others are too slow for even one sample
    assert (sizes[~unforced] == 1).all()
    ends = (sizes * cost_s)[unforced]
    assert ends.max() - ends.min() <= cost_s[unforced].max()


def test_batches_never_exceed_the_samples_a_worker_has() -> None:
    assert regulate(np.array([1.0, 1.0, 2.0]), np.array([3, 100, 100]), 49).tolist() == [3, 49, 24]
    assert equal(np.array([3, 100]), 64).tolist() == [3, 64]


@given(seed=seeds, count=st.integers(1, 30))
def test_shrinking_makes_room_for_as_many_as_asked(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, wanted = rng.integers(1, 65, count), int(rng.integers(1, count + 1))
    budget = int(rng.integers(wanted, 65 * count + 1))
    shrunk = shrink(sizes, wanted, budget)
    assert (shrunk >= 1).all()
    assert (shrunk <= sizes).all()
    assert np.sort(shrunk)[:wanted].sum() <= budget
    if np.sort(sizes)[:wanted].sum() <= budget:
        assert shrunk.tolist() == sizes.tolist()


def test_bottom_learning_rates_follow_the_batches() -> None:
    assert bottom_learning_rates(0.1, np.array([64, 16]), 64, "batch").tolist() == pytest.approx([0.1, 0.025])
    assert bottom_learning_rates(0.1, np.array([64, 16]), 64, "none").tolist() == [0.1, 0.1]


def test_label_mix_and_divergence_by_hand() -> None:
    mix = label_mix(np.eye(2), np.array([3, 1]))
    assert mix.tolist() == [0.75, 0.25]
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert kl_divergence(mix, np.array([0.5, 0.5])) == pytest.approx(expected, abs=1e-11)
    assert kl_divergence(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0.0
    many = label_mix(np.eye(2), np.array([[3, 1], [1, 1]]))
    assert kl_divergence(many, np.array([0.5, 0.5])).tolist() == pytest.approx([expected, 0.0], abs=1e-11)


@given(seed=seeds)
def test_gradient_of_the_divergence_agrees_with_differences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, reference = rng.dirichlet(np.ones(6), 8), rng.dirichlet(np.full(6, 5.0))
    sizes = rng.uniform(5, 60, 8)

    def slope(step: float) -> Floats:
        moves = step * np.eye(8)
        ahead, behind = (label_mix(labels, sizes + sign * moves) for sign in (1, -1))
        return (kl_divergence(ahead, reference) - kl_divergence(behind, reference)) / (2 * step)

    richardson = (4 * slope(0.01) - slope(0.02)) / 3
    assert kl_gradient(labels, sizes, reference) == pytest.approx(richardson, abs=1e-9)


@pytest.mark.parametrize("solver", [tune, tune_dual])
@given(seed=seeds, target=st.sampled_from([0.01, 0.05, 0.2]))
@settings(max_examples=25, deadline=None)
def test_tuning_reaches_its_target_or_lowers_the_divergence_within_the_limits(
    solver: Solver, seed: int, target: float
) -> None:
    cohort, sizes = draw_cohort(seed)
    before = float(cohort.divergence(sizes))
    tuned = solver(cohort, sizes, target)
    assert (tuned >= 1).all()
    assert (tuned <= cohort.limits).all()
    assert tuned.sum() <= cohort.budget
    assert tuned.dtype == np.int64
    assert float(cohort.divergence(tuned)) <= max(target, before)


@pytest.mark.parametrize("solver", [tune, tune_dual])
def test_tuning_adds_little_time_against_exhaustive_search(solver: Solver) -> None:
    rng = np.random.default_rng(3)
    labels, start = rng.dirichlet(np.full(3, 0.3), 3), np.array([10, 6, 3])
    cohort = Cohort(labels, np.array([1.0, 1.7, 3.0]), np.full(3, 12), np.full(3, 1 / 3), 30)
    grid = np.stack(np.meshgrid(*[np.arange(1, 13)] * 3), axis=-1).reshape(-1, 3)
    grid = grid[grid.sum(axis=1) <= 30]
    divergences = cohort.divergence(grid)
    target = float((cohort.divergence(start) + divergences.min()) / 2)
    best = min(cohort.added_time(sizes, start) for sizes in grid[divergences <= target])
    tuned = solver(cohort, start, target)
    assert cohort.divergence(tuned) <= target
    assert cohort.added_time(tuned, start) <= best + cohort.cost_s.max()  # within one sample of the slowest worker


def test_a_target_out_of_reach_is_not_claimed() -> None:
    cohort = Cohort(np.array([[1.0, 0.0]]), np.ones(1), np.array([64]), np.array([0.5, 0.5]), 64)
    for solver in (tune, tune_dual):
        assert cohort.divergence(solver(cohort, np.array([8]), 0.05)) == pytest.approx(np.log(2))


@given(seed=seeds, count=st.integers(1, 20), largest=st.integers(1, 128))
def test_filling_grows_all_batches_by_one_factor_within_budget_samples_and_memory(
    seed: int, count: int, largest: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 65, count)
    samples = sizes + rng.integers(0, 200, count)
    budget = int(sizes.sum() + rng.integers(0, 2000))
    filled = fill(sizes, samples, largest, budget)
    assert (filled >= sizes).all()
    assert (filled <= samples).all()
    assert (filled <= max(largest, sizes.max())).all()
    assert filled.sum() <= budget
    growing = filled < samples
    if growing.any():  # d_i / d_i0 of any two differ by less than one sample of each
        low, high = filled[growing] / sizes[growing], (filled[growing] + 1) / sizes[growing]
        assert low.max() < high.min() + 1e-9


WORKER: dict[str, Any] = {
    "labels": [[0.5, 0.5], [1.0, 0.0]],
    "samples": [3, 4],
    "compute_s": [0.1, 0.2],
    "transfer_s": [0.1, 0.1],
    "participation": [0, 0],
}


def test_workers_hold_arrays_and_add_up_costs() -> None:
    workers = Workers(**WORKER)
    assert len(workers) == 2
    assert workers.cost_s == pytest.approx([0.2, 0.3])
    assert workers.samples.dtype == np.int64


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("labels", [[0.5, 0.5], [0.7, 0.0]], "worker 1 has label shares that sum to 0.7; the sum must be 1"),
        ("labels", [[0.5, 0.5], [np.nan, 1.0]], "worker 1 has label shares that sum to nan; the sum must be 1"),
        ("labels", [[1.5, -0.5], [1.0, 0.0]], "worker 0 has a label share of -0.5; it must be at least 0"),
        ("labels", np.zeros((0, 2)), "labels has shape (0, 2); it must be (workers, classes), at least 1 of each"),
        ("samples", [3, 0], "worker 1 has 0 samples; it must have at least 1"),
        ("samples", [3], "samples has shape (1,); it must be (2,)"),
        ("compute_s", [0.1, np.nan], "worker 1 has compute_s=nan; it must be a positive number of seconds"),
        ("transfer_s", [-1.0, 1.0], "worker 0 has transfer_s=-1.0; it must be a number of seconds, at least 0"),
        ("participation", [0, -1], "worker 1 has participation=-1; it must be at least 0"),
    ],
)
def test_impossible_workers_are_refused_in_one_line(field: str, value: Any, message: str) -> None:
    with pytest.raises(ReplyError, match=f"^{re.escape(message)}$"):
        Workers(**{**WORKER, field: value})
