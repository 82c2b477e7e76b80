"""Neurons that go step by step: which, how many at once, and the guard that stops it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_edge.comp import elimination as elimination_module
from fl_edge.comp.elimination import Elimination, eliminate, variance
from fl_edge.comp.scores import conditioning, sensitivity
from fl_edge.comp.system import Solution, System, solve, weight_system
from tests.tiny_comp_core import (
    LOOSE,
    Layer,
    draw_layer,
    duplicate,
    mask_damping,
    mask_system,
    masked_error,
    solve_mask,
)

SEEDS = st.integers(0, 999)


def mask_of(layer: Layer, damping: float = 1e-3) -> System:
    neurons = layer.weight.shape[1]
    ones = torch.ones(neurons, 1, dtype=torch.float64)
    return mask_system(layer.statistics, layer.weight, damping, torch.arange(neurons), ones)


def run(system: System, quota: int, width: int = 1, steps: int = 100, most: float = LOOSE) -> Elimination:
    return eliminate(system, solve(system), partial(conditioning, width=width), quota, width, steps, most)


def by_index(solution: Solution) -> Tensor:
    return solution.kept.double()


def mask_in(found: Elimination, neurons: int) -> Tensor:
    mask = torch.zeros(neurons, dtype=torch.float64)
    mask[found.solution.kept] = found.solution.values[:, 0]
    return mask


@given(seed=SEEDS, of=st.integers(0, 11), at=st.integers(0, 11))
@settings(max_examples=25, deadline=None)
def test_of_a_duplicate_neuron_one_goes_and_the_other_is_tuned_to_two(seed: int, of: int, at: int) -> None:
    if of == at:
        return
    layer = duplicate(draw_layer(seed), of, at)
    found = run(mask_of(layer, 1e-9), 1)
    assert found.order[0] in {of, at}
    mask = mask_in(found, 12)
    expected = torch.ones(12, dtype=torch.float64)
    expected[found.order[0]], expected[of + at - found.order[0]] = 0, 2
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-5)
    assert masked_error(layer, mask) == pytest.approx(0, abs=1e-8 * float(layer.targets.square().sum()))


@pytest.mark.parametrize("dead", ["inputs", "weight"])
@pytest.mark.parametrize("seed", range(4))
def test_a_channel_of_zero_norm_goes_first(dead: str, seed: int) -> None:
    layer = draw_layer(seed)
    getattr(layer, dead)[:, 5] = 0
    layer = Layer(layer.inputs, layer.weight, layer.output)
    system = mask_of(layer)
    for score in (partial(conditioning, width=1), partial(sensitivity, system, width=1)):
        found = eliminate(system, solve(system), score, 4, 1, 2, LOOSE)
        assert found.order[0] == 5


@given(seed=SEEDS, quota=st.integers(1, 8), damping=st.sampled_from([1e-4, 1e-2]))
@settings(max_examples=15, deadline=None)
def test_one_at_a_time_is_the_greedy_search_over_tuned_errors(seed: int, quota: int, damping: float) -> None:
    layer = draw_layer(seed, neurons=10, noise=1.0)
    absolute = mask_damping(layer, damping)

    def tuned(kept: list[int]) -> float:
        mask = torch.zeros(10, dtype=torch.float64)
        mask[kept] = solve_mask(layer, kept, absolute)
        return masked_error(layer, mask) + absolute * float((mask - 1).square().sum())

    kept, order = list(range(10)), []
    for _ in range(quota):
        order.append(min(kept, key=lambda neuron: tuned([other for other in kept if other != neuron])))
        kept.remove(order[-1])
    found = run(mask_of(layer, damping), quota)
    assert (found.order, found.solution.kept.tolist(), found.guarded) == (tuple(order), kept, False)
    torch.testing.assert_close(found.solution.values[:, 0], solve_mask(layer, kept, absolute), rtol=1e-5, atol=1e-6)


@given(seed=SEEDS, width=st.sampled_from([1, 2, 3]), quota=st.integers(0, 3), steps=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_groups_go_whole_and_are_named_in_order(seed: int, width: int, quota: int, steps: int) -> None:
    layer = draw_layer(seed, noise=0.5)
    found = run(mask_of(layer), quota, width, steps)
    assert len(set(found.order)) == len(found.order) == quota
    left = [group for group in range(12 // width) if group not in found.order]
    assert found.solution.kept.tolist() == [group * width + place for group in left for place in range(width)]


@pytest.mark.parametrize(
    ("quota", "steps", "sizes"),
    [(10, 4, [3, 3, 3, 1]), (10, 1, [10]), (3, 10, [1, 1, 1]), (8, 4, [2, 2, 2, 2]), (0, 4, [])],
)
def test_a_quota_goes_in_about_equal_steps(quota: int, steps: int, sizes: list[int]) -> None:
    system = mask_of(draw_layer(1))
    seen: list[int] = []

    def score(solution: Solution) -> Tensor:
        seen.append(len(solution.kept))
        return by_index(solution)

    found = eliminate(system, solve(system), score, quota, 1, steps, LOOSE)
    assert seen == [12 - sum(sizes[:number]) for number in range(len(sizes))]
    assert found.order == tuple(range(quota))


def test_within_a_step_the_least_goes_first() -> None:
    system = mask_of(draw_layer(1))
    found = eliminate(system, solve(system), lambda solution: -solution.kept.double(), 6, 1, 2, LOOSE)
    assert found.order == (11, 10, 9, 8, 7, 6)


def test_the_score_sees_what_has_been_tuned_so_far() -> None:
    layer = draw_layer(3, noise=1.0)
    system, seen = mask_of(layer), list[Solution]()

    def score(solution: Solution) -> Tensor:
        seen.append(solution)
        return by_index(solution)

    eliminate(system, solve(system), score, 4, 1, 2, LOOSE)
    expected = solve_mask(layer, range(2, 12), mask_damping(layer, 1e-3))
    torch.testing.assert_close(seen[1].values[:, 0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", [1, 2])
def test_a_step_that_the_guard_refuses_is_halved_and_grows_again(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 are to go, 4 a step. Tried are 4 and 2 (refused), 1, 4, the last 3 (refused), 1 and 2."""
    verdicts = iter([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    tried: list[int] = []

    def judge(_system: System, solution: Solution) -> float:
        tried.append(len(solution.kept) // width)
        return next(verdicts)

    monkeypatch.setattr(elimination_module, "variance", judge)
    system = mask_of(draw_layer(1, neurons=12 * width))
    found = eliminate(system, solve(system), lambda s: s.kept.view(-1, width)[:, 0].double(), 8, width, 2, 0.5)
    assert tried == [8, 10, 11, 7, 4, 6, 4]
    assert (found.order, found.guarded) == (tuple(range(8)), False)


def test_where_not_one_can_go_the_elimination_stops_as_it_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([0.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(elimination_module, "variance", lambda *_: next(verdicts))
    layer = draw_layer(1, noise=0.5)
    system = mask_of(layer)
    found = eliminate(system, solve(system), by_index, 8, 1, 2, 0.5)
    assert (found.order, found.guarded) == ((0, 1, 2, 3), True)
    expected = solve_mask(layer, range(4, 12), mask_damping(layer, 1e-3))
    torch.testing.assert_close(found.solution.values[:, 0], expected, rtol=1e-6, atol=1e-7)


@given(seed=SEEDS, most=st.sampled_from([1e-4, 1e-2, 1e-1, 1.0]), quota=st.integers(1, 11))
@settings(max_examples=30, deadline=None)
def test_the_mask_of_what_is_left_never_varies_by_more_than_allowed(seed: int, most: float, quota: int) -> None:
    system = mask_of(draw_layer(seed, tokens=8, noise=1.0))
    found = run(system, quota, steps=3, most=most)
    if found.order:
        assert float(found.solution.values.var(correction=0)) <= most
    assert found.guarded == (len(found.order) < quota)


def test_the_guard_triggers_on_a_calibration_set_of_ten_tokens() -> None:
    """The same layer and bound: many tokens let all go that were asked, ten do not."""
    drawn = {tokens: draw_layer(7, tokens=tokens, neurons=64, outputs=4, noise=1.0) for tokens in (10, 4000)}
    few, many = (run(mask_of(layer), 20, steps=10, most=0.05) for layer in drawn.values())
    assert few.guarded
    assert len(few.order) < 20
    assert not many.guarded
    assert len(many.order) == 20


def test_the_variance_of_a_mask() -> None:
    layer = draw_layer(3, noise=1.0)
    system = mask_of(layer)
    solution = solve(system).without(torch.tensor([2, 3]))
    mask = solution.values[:, 0]
    assert variance(system, solution) == pytest.approx(float(((mask - mask.mean()) ** 2).mean()))
    assert variance(system, solution.without(torch.arange(10))) == 0


def test_the_variance_of_weights_is_that_of_the_factors_nearest_to_them() -> None:
    layer = draw_layer(3, noise=1.0)
    current = layer.weight.T.clone()
    system = weight_system(layer.statistics, layer.weight, 1e-3, torch.arange(12), current)
    solution = solve(system).without(torch.tensor([2, 3]))
    factors = [
        float(torch.linalg.lstsq(layer.weight[:, neuron, None], values[:, None]).solution)
        for neuron, values in zip(solution.kept.tolist(), solution.values, strict=True)
    ]
    mask = torch.tensor(factors, dtype=torch.float64)
    assert variance(system, solution) == pytest.approx(float(mask.var(correction=0)))
