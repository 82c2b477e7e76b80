"""Sums over tokens against the tokens themselves: statistics, errors, similarities."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fl_edge.comp import statistics as statistics_module
from fl_edge.comp.decision import decide
from fl_edge.comp.similarity import Similarity
from fl_edge.comp.statistics import Statistics, relative_error
from fl_edge.seeding import torch_rng
from tests.tiny_comp_core import Layer, configured, draw_layer

CLOSE: Any = {"rtol": 1e-9, "atol": 1e-9}
SHAPES = {"tokens": st.integers(2, 40), "neurons": st.integers(1, 9), "outputs": st.integers(1, 7)}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_rng(seed, "draw", *shape), dtype=torch.float64)


def assert_same(one: Statistics, two: Statistics) -> None:
    assert one.tokens == two.tokens
    for field in dataclasses.fields(Statistics)[1:]:
        found, expected = getattr(one, field.name), getattr(two, field.name)
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), **CLOSE)


@given(seed=st.integers(0, 99), **SHAPES)
@settings(max_examples=25, deadline=None)
def test_statistics_are_the_sums_that_they_say(seed: int, tokens: int, neurons: int, outputs: int) -> None:
    x, y = draw(seed, tokens, neurons), draw(seed + 1, tokens, outputs)
    found = Statistics.of(x, y)
    assert found.tokens == tokens
    torch.testing.assert_close(found.gram, torch.einsum("ti,tj->ij", x, x), **CLOSE)
    torch.testing.assert_close(found.cross, torch.einsum("ti,to->io", x, y), **CLOSE)
    torch.testing.assert_close(found.inputs, torch.einsum("ti->i", x), **CLOSE)
    torch.testing.assert_close(found.targets, torch.einsum("to->o", y), **CLOSE)
    assert found.energy == pytest.approx(float(torch.linalg.matrix_norm(y) ** 2))


@given(seed=st.integers(0, 99), cut=st.integers(1, 39))
@settings(max_examples=20, deadline=None)
def test_pooled_statistics_are_those_of_all_tokens(seed: int, cut: int) -> None:
    layer = draw_layer(seed, tokens=40, noise=0.5, mean=1.0)
    parts = [Statistics.of(layer.inputs[rows], layer.targets[rows]) for rows in (slice(cut), slice(cut, None))]
    assert_same(parts[0] + parts[1], layer.statistics)


@pytest.mark.parametrize("restore", ["mask", "weights"])
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_decided_on_pooled_statistics_is_what_is_decided_centrally(restore: str, bias: bool) -> None:
    layer = draw_layer(5, tokens=90, noise=0.3, mean=1.0)
    texts = zip(*(torch.split(each, [10, 50, 30]) for each in (layer.inputs, layer.targets)), strict=True)
    first, second, third = (Statistics.of(x, y) for x, y in texts)
    config = configured(restore=restore, bias=bias)
    pooled, central = (
        decide(each, layer.weight, None, 5, 1, config) for each in (third + (first + second), layer.statistics)
    )
    assert (pooled.kept, pooled.order) == (central.kept, central.order)
    for name in ("mask", "weight", "bias"):
        one, two = getattr(pooled, name), getattr(central, name)
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def test_sums_are_exact_up_to_a_width_and_small_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_module, "_EXACT", 3)
    for neurons, dtype in ((3, torch.float64), (4, torch.float32)):
        found = Statistics.of(draw(0, 6, neurons).bfloat16(), draw(1, 6, 2).bfloat16())
        assert {found.gram.dtype, found.cross.dtype, found.inputs.dtype, found.targets.dtype} == {dtype}
        for derived in (found.centred(), found.without_bias(torch.ones(2)), found + found):
            assert {derived.gram.dtype, derived.cross.dtype, derived.inputs.dtype, derived.targets.dtype} == {dtype}


@given(seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_centred_statistics_are_those_of_centred_data(seed: int) -> None:
    layer = draw_layer(seed, noise=0.5, mean=2.0)
    x, y = layer.inputs, layer.targets + 3
    assert_same(Statistics.of(x, y).centred(), Statistics.of(x - x.mean(0), y - y.mean(0)))


@given(seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_statistics_without_a_bias_are_those_of_the_output_less_it(seed: int) -> None:
    layer = draw_layer(seed, noise=0.5, mean=2.0)
    bias = draw(seed, 5)
    assert_same(layer.statistics.without_bias(bias), Statistics.of(layer.inputs, layer.targets - bias))


@given(seed=st.integers(0, 99), biased=st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_relative_error_is_that_of_the_output(seed: int, biased: bool) -> None:
    layer = draw_layer(seed, noise=0.5, mean=1.0)
    weight, bias = draw(seed, 5, 12), draw(seed, 5) if biased else None
    off = layer.targets - layer.inputs @ weight.T - (0 if bias is None else bias)
    expected = float(off.square().sum() / layer.targets.square().sum())
    assert relative_error(layer.statistics, weight, bias) == pytest.approx(expected)


def test_the_relative_error_of_a_layer_against_itself_is_zero() -> None:
    layer = draw_layer(1)
    assert relative_error(layer.statistics, layer.weight) == pytest.approx(0, abs=1e-12)
    assert relative_error(layer.statistics, 0 * layer.weight) == pytest.approx(1)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    found: Tensor = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    return found


@given(seed=st.integers(0, 99), sequences=st.integers(1, 4), length=st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_both_readings_of_the_importance(seed: int, sequences: int, length: int) -> None:
    x = draw(seed, sequences, length, 7)
    z = x + draw(seed + 1, sequences, length, 7)
    y = z + draw(seed + 2, sequences, length, 7)
    found = Similarity.of(x, z, y)
    x, z, y = x[:, 1:], z[:, 1:], y[:, 1:]  # the sink is left out
    assert found.tokens == sequences * (length - 1)
    assert found.importance("mean") == pytest.approx(1 - float(cosines(x, y).mean()), abs=1e-6)
    ratio = 1 - abs(float((x * y).sum())) / float(x.norm() * y.norm())
    assert found.importance("ratio") == pytest.approx(ratio, abs=1e-6)
    assert found.growth == pytest.approx(float(y.norm() / x.norm()), rel=1e-5)
    assert found.turn("heads") == pytest.approx(1 - float(cosines(x, z).mean()), abs=1e-6)
    assert found.turn("channels") == pytest.approx(1 - float(cosines(z, y).mean()), abs=1e-6)


def test_similarities_of_texts_add_up() -> None:
    x, z, y = draw(3, 6, 5, 8), draw(4, 6, 5, 8), draw(5, 6, 5, 8)
    whole = Similarity.of(x, z, y)
    parts = Similarity.of(x[:2], z[:2], y[:2]) + Similarity.of(x[2:], z[2:], y[2:])
    for field in dataclasses.fields(Similarity):
        assert getattr(parts, field.name) == pytest.approx(getattr(whole, field.name), rel=1e-5)


def test_a_layer_that_turns_nothing_does_not_matter() -> None:
    x = draw(3, 2, 5, 8)
    same, turned = Similarity.of(x, 2 * x, 3 * x), Similarity.of(x, x, -x)
    for reading in ("mean", "ratio"):
        assert same.importance(reading) == pytest.approx(0, abs=1e-6)
    assert turned.importance("mean") == pytest.approx(2)
    assert turned.importance("ratio") == pytest.approx(0, abs=1e-6)
    assert same.growth == pytest.approx(3)
    assert (same.turn("heads"), same.turn("channels")) == pytest.approx((0, 0), abs=1e-6)
    assert (turned.turn("heads"), turned.turn("channels")) == pytest.approx((0, 2), abs=1e-6)


def test_states_that_are_zero_have_a_similarity() -> None:
    nothing = Similarity.of(*(torch.zeros(1, 3, 4),) * 3)
    assert (nothing.importance("mean"), nothing.importance("ratio"), nothing.growth) == (1, 0, 1)


def test_the_sink_does_not_count() -> None:
    x, z, y = draw(3, 2, 5, 8), draw(4, 2, 5, 8), draw(5, 2, 5, 8)
    loud = x.clone()
    loud[:, 0] *= 1e4
    assert Similarity.of(loud, z, y) == Similarity.of(x, z, y)


def test_similarities_of_coarse_states_are_summed_in_float32() -> None:
    x = draw(5, 4, 64, 16).bfloat16()
    y = (x + 0.1 * draw(6, 4, 64, 16)).bfloat16()
    expected = functional.cosine_similarity(x[:, 1:].double(), y[:, 1:].double(), dim=-1).mean()
    assert Similarity.of(x, x, y).importance("mean") == pytest.approx(1 - float(expected), rel=1e-4)


def test_sums_that_grow_in_place_are_those_of_all_tokens() -> None:
    layer = draw_layer(5, tokens=40, noise=0.5, mean=1.0)
    first = Statistics.of(layer.inputs[:15], layer.targets[:15])
    assert_same(first.extended(layer.inputs[15:], layer.targets[15:]), layer.statistics)


def test_statistics_of_a_layer_do_not_depend_on_the_order_of_tokens() -> None:
    layer = draw_layer(8, noise=0.2)
    turned = Layer(layer.inputs.flip(0), layer.weight, layer.targets.flip(0))
    assert_same(turned.statistics, layer.statistics)
