"""Importance of units from LoRA's gradients: against dense algebra, and against the gradient that it stands in for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_edge.fedspine import importance
from fl_edge.fedspine.importance import Smoothing, UnitScores, join, map_saliency, unit_scores
from fl_edge.fedspine.lora import attach
from fl_edge.pruning import full_plan, members, prune
from tests.tiny_fedspine import draw_factors
from tests.tiny_transformers import FAMILIES, draw_batch, draw_plan, make_model

SEEDS = st.integers(0, 2**32 - 1)
COLUMN_SIDE = ("attention.output.dense", ".output.dense", "out_lin", "lin2", "o_proj", "down_proj", "out_proj", "fc2")
CHANNEL_SIDE = ("intermediate.dense", "lin1", "lin2", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")


def dense_saliency(weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float) -> Tensor:
    """I of one map, element by element, in float64."""
    weight, a, b, grad_a, grad_b = (tensor.double() for tensor in (weight, a, b, grad_a, grad_b))
    gradient = grad_b @ a + b @ grad_a - grad_b @ grad_a
    return (gradient * (weight + scale * b @ a)).abs()


def draw(seed: int, d_out: int, d_in: int, rank: int) -> Any:
    """W, A, B and the gradients of A and B."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(d_out, d_in), (rank, d_in), (d_out, rank), (rank, d_in), (d_out, rank)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@given(seed=SEEDS, d_out=st.integers(1, 40), d_in=st.integers(1, 40), rank=st.integers(1, 6), rows=st.integers(1, 50))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("axis", [0, 1])
def test_saliency_is_the_dense_formula_whatever_the_blocks(
    axis: int, seed: int, d_out: int, d_in: int, rank: int, rows: int
) -> None:
    w, a, b, da, db = draw(seed, d_out, d_in, rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "_ROW_ELEMENTS", rows * d_in)
        found = map_saliency(w, a, b, da, db, scale=0.7, axis=axis)
    assert found.dtype == torch.float32
    expected = dense_saliency(w, a, b, da, db, scale=0.7).sum(1 - axis)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_several_blocks_of_half_precision_weights(axis: int) -> None:
    w, a, b, da, db = draw(1, 700, 450, 4)  # 315 000 elements: three blocks
    w = w.bfloat16()
    found = map_saliency(w, a, b, da, db, scale=2.0, axis=axis)
    assert torch.allclose(found.double(), dense_saliency(w, a, b, da, db, scale=2.0).sum(1 - axis), rtol=1e-5)
    a, b, da, db = (tensor.bfloat16() for tensor in (a, b, da, db))
    found = map_saliency(w, a, b, da, db, scale=2.0, axis=axis)
    assert torch.allclose(found.double(), dense_saliency(w, a, b, da, db, scale=2.0).sum(1 - axis), rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("trained", [False, True])
def test_the_stand_in_ranks_entries_as_the_true_gradient_does(seed: int, trained: bool) -> None:
    """Also at LoRA's start, where B is zero and A has no gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    d_out, d_in, rank, scale = 12, 16, 8, 2.0
    weight: Any = normal(d_out, d_in).requires_grad_()
    a: Any = (normal(rank, d_in) / math.sqrt(d_in)).requires_grad_()
    b: Any = (0.1 * normal(d_out, rank) * trained).requires_grad_()
    inputs, target = normal(64, d_in) * torch.linspace(0.2, 2, d_in), normal(64, d_out) * torch.linspace(0.2, 3, d_out)
    loss: Any = (inputs @ (weight + scale * b @ a).T - target).square().mean()
    loss.backward()
    w, a, b, grad_w, grad_a, grad_b = (t.detach() for t in (weight, a, b, *(t.grad for t in (weight, a, b))))
    columns = [  # of a single column, the sum over a row is the entry
        map_saliency(w[:, [c]], a[:, [c]], b, grad_a[:, [c]], grad_b, scale, axis=0) for c in range(d_in)
    ]
    found, true = torch.stack(columns, 1), (grad_w * (w + scale * b @ a)).abs()
    assert rank_correlation(found.flatten(), true.flatten()) > 0.4
    assert rank_correlation(found.sum(0), true.sum(0)) > 0.1
    assert rank_correlation(found.sum(1), true.sum(1)) > 0.3


def rank_correlation(one: Tensor, other: Tensor) -> float:
    ranks = torch.stack([tensor.argsort().argsort().double() for tensor in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def model_with_gradients(family: str, pruned: bool) -> tuple[Any, Any, list[Any]]:
    model = make_model(family)
    plan = draw_plan(model, np.random.default_rng(3), 0.4) if pruned else full_plan(model)
    prune(model, plan)
    maps = attach(model, members(model), draw_factors(members(model), model, 3), scale=2.0, dropout=0.0)
    batch = draw_batch(np.random.default_rng(1))
    model(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
    return model, plan, maps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_scores_of_a_whole_model_against_dense_sums_by_name(family: str, pruned: bool, normalise: bool) -> None:
    """Which rows and columns belong to which unit is worked out here from the names of the maps alone."""
    model, plan, maps = model_with_gradients(family, pruned)
    found = unit_scores(maps, len(plan.layers), normalise)
    expected: list[dict[str, Any]] = [{"heads": 0, "channels": 0} for _ in plan.layers]
    touched = 0
    for name, module in model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        touched += 1
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert module.base_layer.weight.grad is None
        full = dense_saliency(module.base_layer.weight, a, b, a.grad, b.grad, 2.0)
        sums = full.sum(0) if name.endswith(COLUMN_SIDE) else full.sum(1)
        ffn = name.endswith(CHANNEL_SIDE) or (name.endswith(".output.dense") and "attention" not in name)
        unit, layer = "channels" if ffn else "heads", next(int(part) for part in name.split(".") if part.isdecimal())
        units = len(plan.kept(layer, unit))
        score = torch.stack([chunk.sum() for chunk in sums.chunk(units)])
        expected[layer][unit] += score / score.square().sum().sqrt() if normalise else score
    assert touched == len(members(model)) == len(maps)
    for layer, scores in enumerate(found):
        for unit, score in scores.items():
            assert score.dtype == torch.float32
            assert torch.allclose(score.double(), expected[layer][unit], rtol=2e-4), (layer, unit)


def test_a_map_without_gradients_does_not_count() -> None:
    _, plan, maps = model_with_gradients("bert", pruned=False)
    whole = unit_scores(maps, len(plan.layers), normalise=False)
    (query,) = [each for each in maps if each.member.path.endswith("0.attention.self.query")]
    alone = unit_scores([query], len(plan.layers), normalise=False)
    query.b.grad = None
    rest = unit_scores(maps, len(plan.layers), normalise=False)
    assert torch.allclose(rest[0]["heads"] + alone[0]["heads"], whole[0]["heads"])
    assert torch.equal(rest[1]["heads"], whole[1]["heads"])


def some_scores(seed: int, count: int, units: int = 3) -> list[UnitScores]:
    rng = np.random.default_rng(seed)
    return [[{"heads": torch.tensor(rng.random(units) * 10.0 ** rng.integers(-3, 3))}] for _ in range(count)]


def running_average(each: list[UnitScores], weight: float) -> Any:
    """The textbook's running average with its bias taken out; with weight 1, the mean."""
    if weight == 1.0:
        return torch.stack([scores[0]["heads"] for scores in each]).mean(0)
    total: Any = 0.0
    for scores in each:
        total = weight * total + (1 - weight) * scores[0]["heads"]
    return total / (1 - weight ** len(each))


WEIGHTS = st.one_of(st.sampled_from([0.0, 0.9, 1.0]), st.floats(0, 0.999))


@given(seed=SEEDS, weight=WEIGHTS, count=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_smoothing_is_the_running_average(seed: int, weight: float, count: int) -> None:
    scores, smoothing = some_scores(seed, count), Smoothing(weight)
    for each in scores:
        smoothing.add(each)
    assert smoothing.steps == count
    assert smoothing.mean is not None
    assert torch.allclose(smoothing.mean[0]["heads"], running_average(scores, weight), rtol=1e-9)


@given(seed=SEEDS, weight=WEIGHTS, past=st.integers(0, 8), new=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_rounds_join_to_the_average_over_all_their_iterations(seed: int, weight: float, past: int, new: int) -> None:
    scores = some_scores(seed, past + new)
    before: UnitScores = [{"heads": torch.zeros(3, dtype=torch.float64)}]
    if past:
        before = [{"heads": running_average(scores[:past], weight)}]
    after: UnitScores = [{"heads": running_average(scores[past:], weight)}]
    joined = join(before, after, weight, past, new)
    assert torch.allclose(joined[0]["heads"], running_average(scores, weight), rtol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_passed_over(bad: float) -> None:
    scores, smoothing = some_scores(0, 3), Smoothing(0.9)
    broken: UnitScores = [{"heads": torch.tensor([1.0, bad, 2.0], dtype=torch.float64)}]
    for each in [broken, scores[0], broken, scores[1], scores[2], broken]:
        smoothing.add(each)
    assert smoothing.steps == 3
    assert smoothing.mean is not None
    assert torch.allclose(smoothing.mean[0]["heads"], running_average(scores, 0.9))
    nothing = Smoothing(0.9)
    nothing.add(broken)
    assert (nothing.mean, nothing.steps) == (None, 0)
