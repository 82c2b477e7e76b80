"""Least-squares systems against least squares on the data; elimination by Schur complement against solving anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_edge.comp.statistics import Statistics
from fl_edge.comp.system import Solution, System, solve, weight_system
from fl_edge.errors import DataError
from fl_edge.seeding import numpy_rng, torch_rng
from tests.tiny_comp_core import Layer, draw_layer, mask_damping, mask_system, masked_error, solve_mask, solve_weight

NEURONS = 12
ALL = torch.arange(NEURONS)
CLOSE: Any = {"rtol": 1e-7, "atol": 1e-8}
SEEDS = st.integers(0, 999)


def whole_mask(layer: Layer, damping: float) -> System:
    return mask_system(layer.statistics, layer.weight, damping, ALL, torch.ones(NEURONS, 1, dtype=torch.float64))


def whole_weight(layer: Layer, damping: float) -> System:
    return weight_system(layer.statistics, layer.weight, damping, ALL, layer.weight.T.clone())


def dense(system: System, kept: Tensor) -> Tensor:
    """The solution for some unknowns, anew."""
    damped = system.matrix[kept][:, kept] + system.damping * torch.eye(len(kept), dtype=torch.float64)
    found: Tensor = torch.linalg.solve(damped, (system.right + system.damping * system.prior)[kept])
    return found


@given(seed=SEEDS, masked=st.lists(st.floats(-2, 3), min_size=NEURONS, max_size=NEURONS))
@settings(max_examples=30, deadline=None)
def test_identity_of_the_quadratic_form(seed: int, masked: list[float]) -> None:
    """(1 - m)^T G (1 - m) = ||Y - X diag(m) W||^2."""
    layer, mask = draw_layer(seed), torch.tensor(masked, dtype=torch.float64)
    gram = whole_mask(layer, 0.0).matrix
    found = float((1 - mask) @ gram @ (1 - mask))
    assert found == pytest.approx(masked_error(layer, mask), rel=1e-9, abs=1e-9)


@given(seed=SEEDS, damping=st.sampled_from([1e-9, 1e-3, 1.0]))
@settings(max_examples=20, deadline=None)
def test_a_mask_of_ones_is_optimal_when_nothing_is_removed(seed: int, damping: float) -> None:
    values = solve(whole_mask(draw_layer(seed), damping)).values
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-6)


@given(seed=SEEDS, damping=st.sampled_from([1e-9, 1e-3, 1.0]))
@settings(max_examples=10, deadline=None)
def test_the_old_weights_are_optimal_when_nothing_is_removed(seed: int, damping: float) -> None:
    layer = draw_layer(seed)
    torch.testing.assert_close(solve(whole_weight(layer, damping)).values, layer.weight.T, rtol=0, atol=1e-6)


@given(seed=SEEDS, damping=st.sampled_from([1e-6, 1e-2, 1.0]), gone=st.sets(st.integers(0, 11), max_size=10))
@settings(max_examples=30, deadline=None)
def test_masks_are_least_squares_on_the_data(seed: int, damping: float, gone: set[int]) -> None:
    layer = draw_layer(seed, noise=1.0, mean=1.0)
    kept = sorted(set(range(NEURONS)) - gone)
    found = solve(whole_mask(layer, damping)).without(torch.tensor(sorted(gone), dtype=torch.int64))
    assert found.kept.tolist() == kept
    expected = solve_mask(layer, kept, mask_damping(layer, damping))
    torch.testing.assert_close(found.values[:, 0], expected, rtol=1e-5, atol=1e-6)


@given(seed=SEEDS, damping=st.sampled_from([1e-6, 1e-2, 1.0]), gone=st.sets(st.integers(0, 11), max_size=10))
@settings(max_examples=30, deadline=None)
def test_weights_are_least_squares_on_the_data(seed: int, damping: float, gone: set[int]) -> None:
    layer = draw_layer(seed, noise=1.0, mean=1.0)
    kept = sorted(set(range(NEURONS)) - gone)
    found = solve(whole_weight(layer, damping)).without(torch.tensor(sorted(gone), dtype=torch.int64))
    expected = solve_weight(layer, kept, damping * float(layer.inputs.square().sum(0).mean()))
    torch.testing.assert_close(found.values.T, expected, rtol=1e-5, atol=1e-6)


@given(seed=SEEDS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_elimination_step_by_step_is_solving_anew(seed: int, data: st.DataObject) -> None:
    rng, unknowns, columns = torch_rng(seed, "system"), data.draw(st.integers(2, 14)), data.draw(st.integers(1, 4))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    root = draw(unknowns + 2, unknowns)
    system = System(root.T @ root, draw(unknowns, columns), draw(unknowns, columns), 0.1)
    solution = solve(system)
    torch.testing.assert_close(solution.values, dense(system, torch.arange(unknowns)), **CLOSE)
    while len(solution.kept) > 1:
        positions = st.sets(st.integers(0, len(solution.kept) - 1), min_size=1, max_size=len(solution.kept) - 1)
        removed = torch.tensor(list(data.draw(positions)))  # in any order
        left = [int(kept) for place, kept in enumerate(solution.kept) if place not in removed.tolist()]
        solution = solution.without(removed)
        assert solution.kept.tolist() == left
        torch.testing.assert_close(solution.values, dense(system, solution.kept), **CLOSE)
        damped = system.matrix[left][:, left] + 0.1 * torch.eye(len(left), dtype=torch.float64)
        torch.testing.assert_close(solution.inverse, torch.linalg.inv(damped), **CLOSE)


def test_an_elimination_leaves_the_solution_before_it_as_it_was() -> None:
    before = solve(whole_mask(draw_layer(3), 1e-3))
    copies = [before.kept.clone(), before.values.clone(), before.inverse.clone()]
    before.without(torch.tensor([1, 4]))
    for tensor, copy in zip((before.kept, before.values, before.inverse), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_everything_may_go() -> None:
    found = solve(whole_mask(draw_layer(3), 1e-3)).without(ALL)
    assert (len(found.kept), len(found.values), found.inverse.shape) == (0, 0, (0, 0))


@pytest.mark.parametrize("seed", range(5))
def test_a_block_is_solved_with_the_rest_as_it_is(seed: int) -> None:
    layer = draw_layer(seed, noise=1.0)
    block = torch.from_numpy(numpy_rng(seed, "block").permutation(NEURONS)[:5].copy()).sort().values
    outside = torch.randn(NEURONS, generator=torch_rng(seed, "mask"), dtype=torch.float64)
    rest = outside.index_fill(0, block, 0)
    left = Layer(layer.inputs, layer.weight, layer.targets - (layer.inputs * rest) @ layer.weight.T)
    part = Layer(layer.inputs[:, block], layer.weight[:, block], left.targets)

    masked = mask_system(layer.statistics, layer.weight, 1e-2, block, outside[:, None])
    expected = solve_mask(part, range(5), mask_damping(part, 1e-2))
    torch.testing.assert_close(solve(masked).values[:, 0], expected, rtol=1e-6, atol=1e-7)

    current = layer.weight.T * outside[:, None]
    weighted = weight_system(layer.statistics, layer.weight, 1e-2, block, current)
    expected = solve_weight(part, range(5), 1e-2 * float(part.inputs.square().sum(0).mean()))
    torch.testing.assert_close(solve(weighted).values.T, expected, rtol=1e-6, atol=1e-7)


def test_systems_are_in_float64_whatever_the_sums_are_in() -> None:
    layer = draw_layer(1)
    sums = layer.statistics
    coarse = Statistics(
        sums.tokens, sums.gram.float(), sums.cross.float(), sums.inputs.float(), sums.targets.float(), sums.energy
    )
    for weight in (layer.weight.bfloat16(), layer.weight.float()):
        for system in (
            mask_system(coarse, weight, 1e-3, ALL, torch.ones(NEURONS, 1, dtype=torch.float64)),
            weight_system(coarse, weight, 1e-3, ALL, layer.weight.T.clone()),
        ):
            assert {system.matrix.dtype, system.right.dtype, system.prior.dtype} == {torch.float64}


@pytest.mark.parametrize("spoiled", ["inputs", "targets"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(spoiled: str, value: float) -> None:
    layer = draw_layer(1)
    getattr(layer, spoiled)[0, 0] = value
    for system in (whole_mask(layer, 1e-3), whole_weight(layer, 1e-3)):
        with pytest.raises(DataError, match="not finite") as raised:
            solve(system)
        assert "\n" not in str(raised.value)


def test_activations_that_are_all_zero_are_refused() -> None:
    layer = draw_layer(1)
    nothing = Layer(0 * layer.inputs, layer.weight, layer.targets)
    with pytest.raises(DataError, match="zero"):
        solve(whole_mask(nothing, 1e-3))


def test_an_exact_duplicate_has_a_solution_thanks_to_the_damping() -> None:
    layer = draw_layer(1)
    layer.inputs[:, 3], layer.weight[:, 3] = layer.inputs[:, 7], layer.weight[:, 7]
    values = solve(whole_mask(Layer(layer.inputs, layer.weight, layer.output), 1e-6)).values
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-4)


def test_solutions_keep_their_numbers_over_several_eliminations() -> None:
    solution: Solution = solve(whole_mask(draw_layer(2), 1e-3))
    solution = solution.without(torch.tensor([0, 5])).without(torch.tensor([0]))
    assert solution.kept.tolist() == [2, 3, 4, 6, 7, 8, 9, 10, 11]
