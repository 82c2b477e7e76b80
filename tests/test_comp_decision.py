"""What one dense layer becomes, against least squares on its data: tuned, with a bias, in blocks, folded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fl_edge.comp.decision import Decision, decide
from tests.tiny_comp_core import (
    Layer,
    configured,
    draw_layer,
    duplicate,
    mask_damping,
    masked_error,
    solve_mask,
    solve_weight,
)

SEEDS = st.integers(0, 999)
SCORES = st.sampled_from(["conditioning", "sensitivity", "perturbation"])


def decided(layer: Layer, quota: int = 5, width: int = 1, present: Tensor | None = None, **changes: Any) -> Decision:
    return decide(layer.statistics, layer.weight, present, quota, width, configured(**changes))


def new_weight(layer: Layer, decision: Decision, width: int = 1) -> Tensor:
    """The map after the decision, (o, n) with zeros where units went."""
    stay = [unit * width + place for unit in decision.kept for place in range(width)]
    whole = torch.zeros_like(layer.weight)
    whole[:, stay] = layer.weight[:, stay] * decision.mask if decision.weight is None else decision.weight  # type: ignore[operator]
    return whole


def error_of(layer: Layer, weight: Tensor, bias: Tensor | float = 0.0) -> float:
    return float((layer.targets - layer.inputs @ weight.T - bias).square().sum())


@given(
    seed=SEEDS,
    width=st.sampled_from([1, 2, 3]),
    quota=st.integers(0, 3),
    score=SCORES,
    restore=st.sampled_from(["mask", "weights", "none"]),
    bias=st.booleans(),
    block=st.sampled_from([16, 2048]),
)
@settings(max_examples=40, deadline=None)
def test_errors_kept_and_order_are_what_they_say(
    seed: int, width: int, quota: int, score: str, restore: str, bias: bool, block: int
) -> None:
    layer = draw_layer(seed, neurons=24, noise=0.5, mean=1.0)
    found = decided(layer, quota, width, score=score, restore=restore, bias=bias, block=block)
    assert sorted((*found.kept, *found.order)) == list(range(24 // width))
    assert list(found.kept) == sorted(found.kept)
    assert (len(found.order), found.guarded) == (quota, False)
    assert (found.mask is None, found.weight is None) == (restore == "weights", restore != "weights")
    assert (found.bias is None) == (not bias)
    stay = [unit * width + place for unit in found.kept for place in range(width)]
    bare = torch.zeros_like(layer.weight)
    bare[:, stay] = layer.weight[:, stay]
    energy = float(layer.targets.square().sum())
    assert found.untuned == pytest.approx(error_of(layer, bare) / energy, rel=1e-6, abs=1e-10)
    added = 0.0 if found.bias is None else found.bias
    assert found.tuned == pytest.approx(
        error_of(layer, new_weight(layer, found, width), added) / energy, rel=1e-6, abs=1e-10
    )
    if restore == "none":
        assert found.mask is not None
        assert bool((found.mask == 1).all())


@given(
    seed=SEEDS,
    quota=st.integers(0, 10),
    damping=st.sampled_from([1e-9, 1e-3, 1e-1, 10.0]),
    noise=st.sampled_from([0.0, 1.0]),
    restore=st.sampled_from(["mask", "weights"]),
    bias=st.booleans(),
    score=SCORES,
)
@settings(max_examples=40, deadline=None)
def test_tuning_never_raises_the_calibration_error(
    seed: int, quota: int, damping: float, noise: float, restore: str, bias: bool, score: str
) -> None:
    """Holds for any damping and target when the system is solved whole: what is minimised, error + lambda ||m - 1||^2
    (or the weights' like), is the bare error at m = 1, so at its minimum the error is at most that; a free bias only
    lowers it."""
    layer = draw_layer(seed, noise=noise, mean=1.0)
    found = decided(layer, quota, damping=damping, restore=restore, bias=bias, score=score)
    assert found.tuned <= found.untuned + 1e-10


@pytest.mark.parametrize("restore", ["mask", "weights"])
def test_tuning_lowers_the_error_of_correlated_neurons(restore: str) -> None:
    found = decided(draw_layer(1, neurons=24), 8, restore=restore)
    assert 0 < found.tuned < 0.9 * found.untuned


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_the_masks_are_least_squares_with_an_intercept(bias: bool, width: int) -> None:
    layer = draw_layer(3, noise=1.0, mean=2.0)
    found = decided(layer, 3, width, bias=bias, damping=1e-9)
    stay = [unit * width + place for unit in found.kept for place in range(width)]
    parts = (layer.inputs[:, stay, None] * layer.weight.T[stay]).permute(0, 2, 1)  # (T, o, s)
    if bias:
        parts = torch.cat([parts, torch.eye(5, dtype=torch.float64).expand(len(parts), 5, 5)], 2)
    solution = torch.linalg.lstsq(parts.reshape(-1, parts.shape[2]), layer.targets.reshape(-1, 1)).solution[:, 0]
    assert found.mask is not None
    torch.testing.assert_close(found.mask, solution[: len(stay)], rtol=1e-5, atol=1e-5)
    if bias:
        assert found.bias is not None
        torch.testing.assert_close(found.bias, solution[len(stay) :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_weights_are_least_squares_with_an_intercept(bias: bool) -> None:
    layer = draw_layer(3, noise=1.0, mean=2.0)
    found = decided(layer, 3, bias=bias, damping=1e-9, restore="weights")
    inputs = layer.inputs[:, list(found.kept)]
    if bias:
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(inputs, layer.targets).solution
    assert found.weight is not None
    torch.testing.assert_close(found.weight, solution[: len(found.kept)].T, rtol=1e-5, atol=1e-5)
    if bias:
        assert found.bias is not None
        torch.testing.assert_close(found.bias, solution[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("restore", ["mask", "weights", "none"])
@pytest.mark.parametrize("free", [False, True])
def test_a_bias_that_is_there_counts_with_the_output(restore: str, free: bool) -> None:
    """Wanted is what the map gives with its bias; what comes out is the same as for the output less the bias."""
    layer = draw_layer(4, noise=0.5, mean=1.0)
    bias = torch.arange(5, dtype=torch.float64)
    shifted = Layer(layer.inputs, layer.weight, layer.targets + bias)
    changes: dict[str, Any] = {"restore": restore, "bias": free}
    without, with_bias = decided(layer, **changes), decided(shifted, present=bias, **changes)
    assert with_bias.order == without.order
    torch.testing.assert_close(new_weight(layer, with_bias), new_weight(layer, without))
    assert with_bias.tuned == pytest.approx(without.tuned)
    if free:
        assert with_bias.bias is not None
        assert without.bias is not None
        torch.testing.assert_close(with_bias.bias, without.bias + bias)
    else:
        assert with_bias.bias is None


def test_a_bias_alone_makes_up_for_the_mean_of_what_is_gone() -> None:
    layer = draw_layer(4, mean=2.0)
    found = decided(layer, restore="none", bias=True)
    gone = list(found.order)
    assert found.bias is not None
    torch.testing.assert_close(found.bias, layer.weight[:, gone] @ layer.inputs[:, gone].mean(0))


@pytest.mark.parametrize("score", ["conditioning", "sensitivity", "perturbation"])
@pytest.mark.parametrize("restore", ["mask", "weights"])
def test_the_score_is_the_one_that_is_asked_for(score: str, restore: str) -> None:
    layer = draw_layer(11, neurons=16, outputs=20, noise=1.0)
    every = list(range(16))
    inputs, weight = layer.inputs, layer.weight
    if restore == "mask":
        values = solve_mask(layer, every, mask_damping(layer, 1e-3))[:, None] * weight.T
        absolute = mask_damping(layer, 1e-3)
    else:
        absolute = 1e-3 * float(inputs.square().sum(0).mean())
        values = solve_weight(layer, every, absolute).T

    def tuned(gone: int) -> float:
        kept = [neuron for neuron in every if neuron != gone]
        if restore == "mask":
            mask = torch.zeros(16, dtype=torch.float64)
            mask[kept] = solve_mask(layer, kept, absolute)
            return masked_error(layer, mask) + absolute * float((mask - 1).square().sum())
        whole = torch.zeros_like(weight)
        whole[:, kept] = solve_weight(layer, kept, absolute)
        return error_of(layer, whole) + absolute * float((whole - weight).square().sum())

    def bound(gone: int) -> float:
        kept = [neuron for neuron in every if neuron != gone]
        return float(torch.linalg.cond(weight[:, kept]) * inputs[:, gone].norm())

    by = {
        "sensitivity": lambda neuron: float(inputs[:, neuron].norm() * values[neuron].norm()),
        "conditioning": tuned,
        "perturbation": bound,
    }[score]
    found = decided(layer, 3, score=score, restore=restore, steps=1)
    assert list(found.order) == sorted(every, key=by)[:3]


def test_of_a_duplicate_one_goes_and_the_folded_output_is_the_same() -> None:
    layer = duplicate(draw_layer(9), 2, 7)
    found = decided(layer, 1, damping=1e-9)
    assert found.order[0] in {2, 7}
    assert found.untuned > 1e-3
    assert found.tuned == pytest.approx(0, abs=1e-10)
    assert found.mask is not None
    assert float(found.mask[found.kept.index(9 - found.order[0])]) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("restore", ["mask", "weights", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_folded_map_is_the_masked_map(restore: str, bias: bool, there: bool) -> None:
    layer = draw_layer(5, noise=0.5, mean=1.0)
    linear = nn.Linear(12, 5, bias=there).requires_grad_(False)
    linear.weight.data = layer.weight.float()
    old = linear.bias.double() if there else torch.zeros(5, dtype=torch.float64)
    found = decide(layer.statistics, linear.weight, linear.bias, 4, 1, configured(restore=restore, bias=bias))
    expected = layer.inputs @ new_weight(layer, found).T + (old if found.bias is None else found.bias)
    linear.weight = nn.Parameter(linear.weight[:, list(found.kept)].clone(), requires_grad=False)
    found.fold(linear)
    folded = linear(layer.inputs[:, list(found.kept)].float())
    torch.testing.assert_close(folded.double(), expected, rtol=1e-4, atol=1e-4)
    assert not folded.requires_grad
    assert linear.weight.dtype == torch.float32
    assert (linear.bias is not None) == (bias or there)


def test_a_coarse_map_stays_coarse() -> None:
    linear = nn.Linear(12, 5, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = draw_layer(5)
    for restore in ("mask", "weights"):
        found = decide(layer.statistics, linear.weight, None, 0, 1, configured(restore=restore, bias=True))
        found.fold(linear)
        assert (linear.weight.dtype, linear.bias.dtype) == (torch.bfloat16, torch.bfloat16)


def by_hand(layer: Layer, blocks: list[list[int]], gone: set[int], damping: float, restore: str) -> Tensor:
    """Blocks one after another by least squares on what the others leave of the output; the new (o, n)."""
    now = layer.weight.clone()
    for block in blocks:
        now[:, block] = 0
        left = [neuron for neuron in block if neuron not in gone]
        part = Layer(layer.inputs[:, block], layer.weight[:, block], layer.targets - layer.inputs @ now.T)
        inside = [block.index(neuron) for neuron in left]
        if restore == "mask":
            now[:, left] = layer.weight[:, left] * solve_mask(part, inside, mask_damping(part, damping))
        else:
            absolute = damping * float(part.inputs.square().sum(0).mean())
            now[:, left] = solve_weight(part, inside, absolute)
    return now


@pytest.mark.parametrize("restore", ["mask", "weights"])
@pytest.mark.parametrize(("width", "count"), [(1, 3), (4, 3)])
def test_blocks_are_tuned_one_after_another(restore: str, width: int, count: int) -> None:
    layer = draw_layer(2, tokens=120, neurons=48, noise=0.3)
    found = decided(layer, 24 // width, width, restore=restore, block=16, damping=1e-2)
    matters = (layer.inputs.square().sum(0) * layer.weight.square().sum(0)).view(-1, width).sum(1)
    ranked = matters.argsort()
    blocks = [ranked[first::count].sort().values.tolist() for first in range(count)]
    assert [len(set(found.order) & set(block)) for block in blocks] == [24 // width // count] * count
    neurons = [[unit * width + place for unit in block for place in range(width)] for block in blocks]
    gone = {unit * width + place for unit in found.order for place in range(width)}
    expected = by_hand(layer, neurons, gone, 1e-2, restore)
    torch.testing.assert_close(new_weight(layer, found, width), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("restore", ["mask", "weights"])
def test_tuning_in_blocks_lowers_the_error_nearly_always(restore: str) -> None:
    """No theorem as for one block: a block is tuned before later ones lose units, which can cost a little."""
    drawn = (draw_layer(seed, tokens=120, neurons=48, noise=0.3) for seed in range(40))
    changes = [
        found.tuned / found.untuned for found in (decided(each, 24, block=16, restore=restore) for each in drawn)
    ]
    assert max(changes) < 1.01
    assert sum(change < 1 for change in changes) >= 38


@given(seed=SEEDS, quota=st.integers(0, 40), restore=st.sampled_from(["mask", "weights"]))
@settings(max_examples=20, deadline=None)
def test_tuning_the_last_block_never_raises_the_error(seed: int, quota: int, restore: str) -> None:
    """With the others as they are by then."""
    layer = draw_layer(seed, tokens=120, neurons=48, noise=0.3)
    found = decided(layer, quota, block=16, restore=restore)
    ranked = (layer.inputs.square().sum(0) * layer.weight.square().sum(0)).argsort()
    last = [neuron for neuron in ranked[2::3].tolist() if neuron in found.kept]
    tuned = new_weight(layer, found)
    untuned = tuned.clone()
    untuned[:, last] = layer.weight[:, last]
    assert error_of(layer, tuned) <= error_of(layer, untuned) * (1 + 1e-9)


@pytest.mark.parametrize("restore", ["mask", "weights"])
def test_one_block_is_the_whole_layer(restore: str) -> None:
    layer = draw_layer(2, neurons=24, noise=0.3)
    one, many = decided(layer, block=24, restore=restore), decided(layer, block=2048, restore=restore)
    assert one.order == many.order
    assert torch.equal(new_weight(layer, one), new_weight(layer, many))
    assert decided(layer, block=23, restore=restore).tuned != one.tuned


@pytest.mark.parametrize("quota", [1, 7, 24, 46, 47])
@pytest.mark.parametrize("width", [1, 3])
def test_blocks_share_the_quota_and_leave_one_unit(quota: int, width: int) -> None:
    found = decided(draw_layer(2, tokens=200, neurons=48 * width), quota, width, block=16)
    assert len(found.order) == len(set(found.order)) == quota
    assert len(found.kept) == 48 - quota


@pytest.mark.parametrize("score", ["conditioning", "sensitivity", "perturbation"])
def test_blocks_of_a_single_unit(score: str) -> None:
    found = decided(draw_layer(2, neurons=96), 2, 32, block=16, score=score)
    assert len(found.order) == 2


def half_noisy(seed: int) -> Layer:
    """Orthogonal inputs, so that masks are independent of each other; of every second neuron, in the order of their
    sensitivity, the wanted mask varies."""
    layer = draw_layer(seed, tokens=64, neurons=32, outputs=32)
    inputs = torch.linalg.qr(layer.inputs).Q
    weight = torch.diag(torch.linspace(1, 2, 32, dtype=torch.float64))
    mask = torch.ones(32, dtype=torch.float64)
    mask[::2] = torch.linspace(-2, 4, 16, dtype=torch.float64)
    return Layer(inputs, weight, (inputs * mask) @ weight.T)


@pytest.mark.parametrize(("quota", "gone"), [(8, 8), (16, 16), (24, 16), (31, 16)])
def test_what_a_guarded_block_does_not_lose_the_next_does(quota: int, gone: int) -> None:
    found = decided(half_noisy(1), quota, block=16, max_variance=0.01)
    assert all(unit % 2 for unit in found.order)
    assert (len(found.order), found.guarded) == (gone, gone < quota)


def test_the_variance_is_that_of_the_whole_mask() -> None:
    layer = draw_layer(3, noise=1.0)
    found = decided(layer)
    assert found.mask is not None
    assert found.variance == pytest.approx(float(found.mask.var(correction=0)))
    weighted = decided(layer, restore="weights")
    assert weighted.weight is not None
    old = layer.weight[:, list(weighted.kept)]
    factors = (weighted.weight * old).sum(0) / old.square().sum(0)
    assert weighted.variance == pytest.approx(float(factors.var(correction=0)))


def test_ten_tokens_trip_the_guard_and_it_says_so() -> None:
    changes: dict[str, Any] = {"max_variance": 0.05, "steps": 10}
    few, many = (decided(draw_layer(7, count, 64, 4, 1.0), 20, **changes) for count in (10, 4000))
    assert (few.guarded, many.guarded) == (True, False)
    assert len(few.order) < len(many.order) == 20
    assert not few.order or few.variance <= 0.05


def test_what_is_given_is_not_changed() -> None:
    layer = draw_layer(3, noise=1.0)
    sums, weight = layer.statistics, layer.weight.clone()
    copies = [sums.gram.clone(), sums.cross.clone()]
    for restore in ("mask", "weights"):
        decide(sums, layer.weight, torch.ones(5, dtype=torch.float64), 5, 1, configured(restore=restore, bias=True))
    assert torch.equal(layer.weight, weight)
    assert torch.equal(sums.gram, copies[0])
    assert torch.equal(sums.cross, copies[1])
