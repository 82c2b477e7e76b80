"""Which layers go and what the others have to lose: measured on streamed models against whole ones, and shared out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from fl_edge.comp import survey
from fl_edge.comp.allocation import Key, choose_layers, layer_ratios, layers_to_remove, spread
from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.curves import curve_until, loss_curve
from fl_edge.comp.local import TextSource
from fl_edge.comp.outline import Outline, Sizes, draw_outline
from fl_edge.comp.similarity import Similarity
from fl_edge.comp.statistics import Statistics
from fl_edge.comp.survey import NONE, Loss, chunks, similarities, skipped_losses
from fl_edge.comp.workbench import Workbench
from fl_edge.errors import ConfigError
from fl_edge.pruning.plan import UNITS
from tests.tiny_comp_core import (
    CPU,
    Layer,
    bench_units,
    blocks_of,
    configured,
    consumer,
    draw_layer,
    draw_tokens,
    load,
    logits_of,
    open_bench,
    pass_through,
    save,
    skip_block,
)
from tests.tiny_transformers import DECODERS

LAYERS = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save(tmp_path_factory.mktemp(family), family, LAYERS) for family in DECODERS}


@pytest.fixture
def llama(folders: dict[str, Path]) -> Workbench:
    return open_bench(folders["llama"])


def importance_of(entering: Tensor, leaving: Tensor) -> float:
    return 1 - float(cosine_similarity(entering[:, 1:], leaving[:, 1:], dim=-1).double().mean())


# survey


@pytest.mark.parametrize("chunk", [16, 2048])
@pytest.mark.parametrize("family", DECODERS)
def test_streamed_importances_are_those_of_the_whole_model(
    family: str, chunk: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "_CHUNK_TOKENS", chunk)
    tokens = draw_tokens()
    found = similarities(Checkpoint(folders[family], CPU), tokens, ())
    model = load(folders[family])
    passed = pass_through(model, tokens)
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    assert list(found) == list(range(LAYERS))
    for layer in range(LAYERS):
        leaving = passed[layer].after  # transformers' own list has the last one after the final norm
        assert layer == LAYERS - 1 or torch.equal(leaving, states[layer + 1])
        assert found[layer].importance("mean") == pytest.approx(importance_of(states[layer], leaving), abs=1e-6)
        middle = states[layer] + passed[layer, "heads"].after
        assert found[layer].turn("heads") == pytest.approx(importance_of(states[layer], middle), abs=1e-6)
        assert found[layer].turn("channels") == pytest.approx(importance_of(middle, leaving), abs=1e-6)
        growth = float(leaving[:, 1:].norm() / states[layer][:, 1:].norm())
        assert found[layer].growth == pytest.approx(growth, rel=1e-5)
        assert found[layer].tokens == tokens.shape[0] * (tokens.shape[1] - 1)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_importances_in_a_model_without_some_layers(family: str, folders: dict[str, Path]) -> None:
    tokens, removed = draw_tokens(), (3, 1)
    found = similarities(Checkpoint(folders[family], CPU), tokens, removed)
    model = load(folders[family])
    for layer in removed:
        skip_block(blocks_of(model)[layer])
    passed = pass_through(model, tokens)
    assert sorted(found) == [0, 2, 4]
    for layer, each in found.items():
        assert each.importance("mean") == pytest.approx(
            importance_of(passed[layer].before, passed[layer].after), abs=1e-6
        )


def loss_without(folder: Path, tokens: Tensor, skipped: set[int]) -> float:
    model = load(folder)
    for layer in skipped:
        skip_block(blocks_of(model)[layer])
    logits = logits_of(model, tokens)
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))


@pytest.mark.parametrize("chunk", [16, 2048])
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_losses_are_those_of_models_whose_layers_are_skipped_by_hand(
    family: str, chunk: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "_CHUNK_TOKENS", chunk)
    tokens = draw_tokens(4, 12)
    found = skipped_losses(Checkpoint(folders[family], CPU), tokens, (2,), (0, 2, 3, 4))
    assert sorted(found) == [NONE, 0, 3, 4]
    for layer, each in found.items():
        assert each.tokens == 4 * 11
        expected = loss_without(folders[family], tokens, {2, layer} - {NONE})
        assert each.total == pytest.approx(expected, rel=1e-5)
        assert each.mean == pytest.approx(expected / 44, rel=1e-5)


def test_losses_of_texts_add_up(folders: dict[str, Path]) -> None:
    checkpoint, tokens = Checkpoint(folders["llama"], CPU), draw_tokens(4, 12)
    whole = skipped_losses(checkpoint, tokens, (), (1, 2))
    one, two = (skipped_losses(checkpoint, part, (), (1, 2)) for part in (tokens[:1], tokens[1:]))
    for layer, each in whole.items():
        pooled = one[layer] + two[layer]
        assert pooled.tokens == each.tokens
        assert pooled.total == pytest.approx(each.total, rel=1e-6)
    assert Loss(0, 0.0).mean == 0


@given(sequences=st.integers(1, 9), length=st.integers(1, 5000))
@settings(max_examples=30, deadline=None)
def test_chunks_are_all_rows_once_and_small(sequences: int, length: int) -> None:
    tokens = torch.empty(sequences, length, device="meta")
    found = chunks(tokens)
    rows = [row for part in found for row in range(sequences)[part]]
    assert rows == list(range(sequences))
    assert all(len(range(sequences)[part]) * length <= max(2048, length) for part in found)


def test_a_survey_leaves_no_layer_in_memory_and_reads_each_once(folders: dict[str, Path]) -> None:
    checkpoint = Checkpoint(folders["llama"], CPU)
    counted: list[int] = []
    for measure in (lambda: similarities(checkpoint, draw_tokens(), ()), lambda: checkpoint_losses(checkpoint)):
        before = checkpoint.bytes_read
        measure()
        counted.append(checkpoint.bytes_read - before)
        assert all(parameter.is_meta for parameter in checkpoint.skeleton.parameters())
    assert counted[1] < 1.5 * counted[0]


def checkpoint_losses(checkpoint: Checkpoint) -> Mapping[int, Any]:
    return skipped_losses(checkpoint, draw_tokens(), (), range(LAYERS))


# allocation


@pytest.mark.parametrize(
    ("ratio", "share", "layers", "count"),
    [(0.2, 0.5, 32, 3), (0.2, 0.0, 32, 0), (0.5, 1.0, 32, 16), (0.3, 0.5, 20, 3), (0.1, 1.0, 10, 1), (0.7, 1.0, 10, 7)],
)
def test_layers_take_their_share_rounded_down(ratio: float, share: float, layers: int, count: int) -> None:
    assert layers_to_remove(ratio, share, layers) == count


def shifting(removed: tuple[int, ...]) -> dict[int, float]:
    """Importances that move: when 3 is gone, its neighbours matter."""
    before = {0: 0.0, 1: 0.5, 2: 0.3, 3: 0.1, 4: 0.2, 5: 0.4}
    after = before | {2: 0.9, 4: 0.8}
    return {layer: value for layer, value in (after if 3 in removed else before).items() if layer not in removed}


def test_layers_of_one_measurement_and_of_one_a_removal() -> None:
    asked: list[tuple[int, ...]] = []

    def measure(removed: tuple[int, ...]) -> Mapping[int, float]:
        asked.append(removed)
        return shifting(removed)

    assert choose_layers(3, range(1, 6), measure, iterative=False) == (3, 4, 2)
    assert asked == [()]
    asked.clear()
    assert choose_layers(3, range(1, 6), measure, iterative=True) == (3, 5, 1)
    assert asked == [(), (3,), (3, 5)]
    asked.clear()
    assert choose_layers(0, range(1, 6), measure, iterative=True) == ()
    assert asked == []


@given(values=st.lists(st.floats(0, 1), min_size=3, max_size=9, unique=True), data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_least_important_candidates_go(values: list[float], data: st.DataObject) -> None:
    candidates = sorted(data.draw(st.sets(st.integers(0, len(values) - 1), min_size=1)))
    count = data.draw(st.integers(0, len(candidates)))
    for iterative in (False, True):
        found = choose_layers(count, candidates, lambda _removed: dict(enumerate(values)), iterative)
        assert list(found) == sorted(candidates, key=lambda layer: values[layer])[:count]


def test_more_layers_than_may_go_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 whole layers and 2 may go; lower ratio, layer_share") as raised:
        choose_layers(3, (1, 2), shifting, iterative=False)
    assert "\n" not in str(raised.value)


LEVELS = st.lists(st.floats(1e-3, 2), min_size=1, max_size=8)


@given(levels=LEVELS, part=st.floats(0, 1), alpha=st.sampled_from([0.0, 0.5, 1.0, 3.0]), data=st.data())
@settings(max_examples=80, deadline=None)
def test_ratios_meet_the_budget_within_their_bounds(
    levels: list[float], part: float, alpha: float, data: st.DataObject
) -> None:
    count = len(levels)
    sizes = data.draw(st.lists(st.floats(10, 1000), min_size=count, max_size=count))
    floors = data.draw(st.none() | st.lists(st.floats(0, 0.3), min_size=count, max_size=count))
    largest = 0.8
    budget = part * largest * sum(sizes)
    found = layer_ratios(levels, sizes, budget, alpha, largest, floors)
    least = floors or [0.0] * count
    spent = sum(ratio * size for ratio, size in zip(found, sizes, strict=True))
    forced = sum(floor * size for floor, size in zip(least, sizes, strict=True))
    assert spent == pytest.approx(max(budget, forced), rel=1e-6, abs=1e-6)
    assert all(floor - 1e-12 <= ratio <= largest + 1e-12 for ratio, floor in zip(found, least, strict=True))
    for (i, one), (j, two) in itertools.permutations(enumerate(found), 2):
        if levels[i] <= levels[j] and least[i] >= least[j]:  # what matters less loses as much or more
            assert one >= two - 1e-9


@given(levels=LEVELS, alpha=st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=30, deadline=None)
def test_free_ratios_follow_a_power_of_the_importance(levels: list[float], alpha: float) -> None:
    found = layer_ratios(levels, [7.0] * len(levels), 1e-4, alpha, 0.8)
    assume(max(found) < 0.8)
    products = [ratio * level**alpha for ratio, level in zip(found, levels, strict=True)]
    assert products == pytest.approx([products[0]] * len(products), rel=1e-6)


def test_ratios_by_hand() -> None:
    assert layer_ratios([0.1, 0.2, 0.4], [10, 10, 10], 7.0, 1.0, 0.8) == pytest.approx([0.4, 0.2, 0.1])
    assert layer_ratios([0.1, 0.2, 0.4], [10, 10, 10], 14.0, 1.0, 0.8) == pytest.approx([0.8, 0.4, 0.2])
    assert layer_ratios([0.1, 0.2, 0.4], [10, 10, 10], 17.0, 1.0, 0.8) == pytest.approx([0.8, 0.6, 0.3])
    assert layer_ratios([0.1, 0.2, 0.4], [10, 10, 10], 6.0, 0.0, 0.8) == pytest.approx([0.2, 0.2, 0.2])
    assert layer_ratios([0.1, 0.2, 0.4], [30, 10, 10], 15.0, 1.0, 0.8) == pytest.approx([0.4, 0.2, 0.1])
    assert layer_ratios([0.1, 0.2, 0.4], [10, 10, 10], 7.5, 1.0, 0.8, [0, 0, 0.15]) == pytest.approx([0.4, 0.2, 0.15])
    assert layer_ratios([0.3, 0.3], [10, 10], 0.0, 1.0, 0.8) == pytest.approx([0, 0])


@pytest.mark.parametrize("level", [0.0, -0.3, 1e-9])
def test_layers_that_do_not_matter_or_harm_have_a_ratio(level: float) -> None:
    found = layer_ratios([level, 0.5], [10, 10], 6.0, 1.0, 0.8)
    assert found == pytest.approx([0.6, 0.0], abs=1e-4)


def test_a_budget_out_of_reach_is_refused() -> None:
    assert layer_ratios([0.1, 0.2], [10, 10], 16.0, 1.0, 0.8) == pytest.approx([0.8, 0.8])
    with pytest.raises(ConfigError, match="would have to lose 17 parameters, and may lose 16; lower ratio") as raised:
        layer_ratios([0.1, 0.2], [10, 10], 17.0, 1.0, 0.8)
    assert "\n" not in str(raised.value)


# curves

KEYS: list[Key] = [(0, "heads"), (0, "channels"), (1, "channels")]


def lost(curves: Mapping[Key, list[tuple[int, float]]], taken: Mapping[Key, int]) -> float:
    return sum(dict(curve)[taken[key]] for key, curve in curves.items())


@given(data=st.data(), budget=st.integers(0, 15))
@settings(max_examples=60, deadline=None)
def test_on_convex_curves_no_other_spread_loses_less(data: st.DataObject, budget: int) -> None:
    steps = st.lists(st.floats(0.01, 1), min_size=5, max_size=5).map(sorted)
    curves = {key: list(enumerate([0.0, *itertools.accumulate(data.draw(steps))])) for key in KEYS}
    found = spread(curves, dict.fromkeys(KEYS, 7), 7 * budget + 3 if budget < 15 else 105, dict.fromkeys(KEYS, 0))
    assert sum(found.values()) == budget
    others = (dict(zip(KEYS, counts, strict=True)) for counts in itertools.product(range(6), repeat=3))
    best = min(lost(curves, other) for other in others if sum(other.values()) == budget)
    assert lost(curves, found) == pytest.approx(best)


def test_a_unit_counts_by_its_parameters() -> None:
    """The second kind loses more a unit, and less a parameter."""
    curves: dict[Key, list[tuple[int, float]]] = {KEYS[0]: [(0, 0.0), (4, 4.0)], KEYS[1]: [(0, 0.0), (4, 8.0)]}
    sizes = {KEYS[0]: 1, KEYS[1]: 10}
    assert spread(curves, sizes, 40, dict.fromkeys(sizes, 0)) == {KEYS[0]: 0, KEYS[1]: 4}
    assert spread(curves, sizes, 35, dict.fromkeys(sizes, 0)) == {KEYS[0]: 4, KEYS[1]: 3}
    assert spread(curves, sizes, 35, {KEYS[0]: 0, KEYS[1]: 1}) == {KEYS[0]: 4, KEYS[1]: 3}
    assert spread(curves, sizes, 12, {KEYS[0]: 3, KEYS[1]: 0}) == {KEYS[0]: 4, KEYS[1]: 0}


def test_a_bump_in_a_curve_is_bridged() -> None:
    curves: dict[Key, list[tuple[int, float]]] = {
        KEYS[0]: [(0, 0.0), (1, 5.0), (2, 5.5), (3, 6.0)],
        KEYS[1]: [(0, 0.0), (1, 2.5), (2, 5.0), (3, 7.5)],
    }
    sizes, none = dict.fromkeys(curves, 1), dict.fromkeys(curves, 0)
    assert spread(curves, sizes, 3, none) == {KEYS[0]: 3, KEYS[1]: 0}
    assert spread(curves, sizes, 4, none) == {KEYS[0]: 3, KEYS[1]: 1}


def test_what_goes_in_any_case_goes() -> None:
    curves: dict[Key, list[tuple[int, float]]] = {key: [(0, 0.0), (1, 1.0), (2, 3.0)] for key in KEYS}
    found = spread(curves, dict.fromkeys(KEYS, 1), 3, {KEYS[0]: 2, KEYS[1]: 0, KEYS[2]: 0})
    assert found[KEYS[0]] == 2
    assert sum(found.values()) == 3
    with pytest.raises(ConfigError, match="would have to lose 7 parameters, and may lose 6"):
        spread(curves, dict.fromkeys(KEYS, 1), 7, dict.fromkeys(KEYS, 0))


def test_a_curve_ends_at_the_most_units_that_may_go() -> None:
    curve = [(0, 0.0), (3, 1.0), (6, 4.0)]
    assert curve_until(curve, 6) == curve
    assert curve_until(curve, 5) == [(0, 0.0), (3, 1.0), (5, 3.0)]
    assert curve_until(curve, 2) == [(0, 0.0), (2, pytest.approx(2 / 3))]
    assert curve_until(curve, 7) == [*curve, (7, 5.0)]
    assert curve_until(curve, 0) == curve_until([(0, 0.0)], 0) == [(0, 0.0)]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_a_curve_is_what_the_output_loses(width: int, biased: bool) -> None:
    """By the greedy order, each time all weights of what stays by least squares on the data."""
    drawn = draw_layer(3, neurons=12)
    bias = torch.arange(5, dtype=torch.float64) if biased else None
    shifted = Layer(drawn.inputs, drawn.weight, drawn.output + (0 if bias is None else bias))
    found = loss_curve(shifted.statistics, drawn.weight, bias, width, configured(damping=1e-10))
    energy, kept = float(drawn.output.square().sum()), list(range(12))

    def error(left: list[int]) -> float:
        fitted = drawn.inputs[:, left] @ torch.linalg.lstsq(drawn.inputs[:, left], drawn.output).solution
        return float((drawn.output - fitted).square().sum())

    assert found[0] == (0, 0.0)
    for place, (gone, part) in enumerate(found[1:], 1):
        groups = [kept[start : start + width] for start in range(0, len(kept), width)]
        kept = min(([each for each in kept if each not in group] for group in groups), key=error)
        assert gone == place
        assert part == pytest.approx(error(kept) / energy, rel=1e-5, abs=1e-9)
    assert len(kept) == width


@pytest.mark.parametrize(("neurons", "block"), [(48, 16), (100, 2048), (70, 32)])
def test_curves_rise_and_leave_a_unit(neurons: int, block: int) -> None:
    layer = draw_layer(2, tokens=300, neurons=neurons)
    found = loss_curve(layer.statistics, layer.weight, None, 1, configured(block=block))
    for (gone, part), (more, larger) in itertools.pairwise(found):
        assert gone < more
        assert part <= larger + 1e-9
    assert found[-1][0] <= neurons - 1
    assert found[-1][0] >= 0.8 * neurons


def test_an_outline_on_curves_spares_what_turns_much(folders: dict[str, Path]) -> None:
    bench, tokens = open_bench(folders["qwen3"]), draw_tokens()
    sizes, config = Sizes(bench), configured(allocation="curves", layer_share=0.0, max_layer_ratio=0.9)
    found = draw_outline(config, sizes, bench, TextSource(bench, tokens, "dense"))
    model, curves = load(folders["qwen3"]), {}
    passed = pass_through(model, tokens)
    for layer in range(LAYERS):
        middle = passed[layer].before + passed[layer, "heads"].after
        turns = {"heads": (passed[layer].before, middle), "channels": (middle, passed[layer].after)}
        for unit in UNITS:
            seen, linear = passed[layer, unit], consumer(model, layer, unit)
            statistics = Statistics.of(seen.before.flatten(0, 1), seen.after.flatten(0, 1))
            curve = loss_curve(statistics, linear.weight, linear.bias, bench.member(layer, unit).width, config)
            turn = importance_of(*turns[unit])
            total = bench_units(model, unit)
            curves[layer, unit] = [(gone, part * turn) for gone, part in curve if gone <= int(0.9 * total)]
    each = {key: sizes.units[key[0]][key[1]] for key in curves}
    expected = spread(curves, each, 0.4 * sizes.total, dict.fromkeys(curves, 0))
    assert found.heads == {layer: expected[layer, "heads"] for layer in range(LAYERS)}
    for layer, ratio in found.ratios.items():
        spent = sum(expected[layer, unit] * each[layer, unit] for unit in UNITS)
        assert ratio == pytest.approx(spent / sizes.layer(layer), abs=2 * each[layer, "channels"] / sizes.layer(layer))
    assert len(set(found.ratios.values())) > 1


# the outline


class Stub(TextSource):
    """Answers from a table; remembers what was asked."""

    def __init__(self, bench: Workbench) -> None:
        super().__init__(bench, draw_tokens(1, 4), "dense")
        self.asked: list[tuple[Any, ...]] = []

    def similarities(self, removed: tuple[int, ...]) -> Mapping[int, Similarity]:
        """Cosines as in ``shifting``, the other reading reversed; layer l grows by l + 1, by 10 more without 3."""
        self.asked.append(("similarities", removed))
        more = 10 if 3 in removed else 0
        return {
            layer: Similarity(
                10, 10 * (1 - value), value * (layer + 1 + more), 1.0, (layer + 1.0 + more) ** 2, 9.0 - value, 8.0
            )
            for layer, value in shifting(removed).items()
            if layer < LAYERS
        }

    def losses(self, removed: tuple[int, ...], candidates: tuple[int, ...]) -> Mapping[int, Loss]:
        self.asked.append(("losses", removed, candidates))
        table = shifting(removed)
        return {NONE: Loss(4, 8.0), **{layer: Loss(4, 8.0 + 4 * table[layer]) for layer in candidates}}


def outlined(bench: Workbench, **changes: Any) -> tuple[Outline, Stub]:
    source = Stub(bench)
    return draw_outline(configured(**{"ratio": 0.5, **changes}), Sizes(bench), bench, source), source


def test_an_outline_of_one_measurement(llama: Workbench) -> None:
    found, source = outlined(llama, layer_share=0.8, repair=True)
    assert found.removed == (3, 2)
    assert source.asked == [("similarities", ()), ("similarities", (3, 2))]
    assert found.growth == pytest.approx({3: 4, 2: 3})
    assert found.importance == pytest.approx({0: 0.0, 1: 0.5, 4: 0.8})  # of the model without the removed ones


def test_an_outline_that_measures_again(llama: Workbench) -> None:
    found, source = outlined(llama, layer_share=0.8, iterative_layers=True, repair=True)
    assert found.removed == (3, 1)
    assert source.asked == [("similarities", ()), ("similarities", (3,)), ("similarities", (3, 1))]
    assert found.growth == pytest.approx({3: 4, 1: 12})  # the second when the first was gone


def test_an_outline_by_losses(llama: Workbench) -> None:
    found, source = outlined(llama, layer_share=0.8, layer_rule="loss", repair=True)
    assert found.removed == (3, 2)
    assert source.asked == [
        ("losses", (), (0, 1, 2, 3, 4)),
        ("losses", (3, 2), (0, 1, 4)),
        ("similarities", ()),
    ]
    assert found.importance == pytest.approx({0: 0.0, 1: 0.5, 4: 0.8})
    assert found.growth == pytest.approx({3: 4, 2: 3})
    assert ("similarities", ()) not in outlined(llama, layer_share=0.8, layer_rule="loss")[1].asked


def test_the_other_reading_of_the_similarity(llama: Workbench) -> None:
    assert outlined(llama, layer_share=0.8, similarity="ratio")[0].removed == (1, 2)


def test_without_repair_nothing_is_scaled(llama: Workbench) -> None:
    assert outlined(llama, layer_share=0.8)[0].growth == {3: 1.0, 2: 1.0}


@pytest.mark.parametrize(("first", "last", "gone"), [(0, 0, (0, 3)), (4, 0, (4,)), (2, 2, (2,)), (0, 2, (0, 2))])
def test_protected_layers_stay(first: int, last: int, gone: tuple[int, ...], llama: Workbench) -> None:
    share = 0.4 * len(gone)
    found, _ = outlined(llama, layer_share=share, protect_first=first, protect_last=last)
    assert found.removed == gone


@pytest.mark.parametrize("protect", [(3, 1), (5, 0), (0, 5), (9, 9)])
def test_too_many_protected_layers_are_refused(protect: tuple[int, int], llama: Workbench) -> None:
    with pytest.raises(ConfigError, match="2 whole layers and"):
        outlined(llama, layer_share=0.8, protect_first=protect[0], protect_last=protect[1])
    assert outlined(llama, layer_share=0.0, protect_first=protect[0], protect_last=protect[1])[0].removed == ()


@given(
    ratio=st.floats(0, 0.8),
    share=st.floats(0, 1),
    alpha=st.sampled_from([0.0, 1.0, 2.0]),
    attention=st.booleans(),
    largest=st.sampled_from([0.5, 0.8, 0.99]),
)
@settings(max_examples=40, deadline=None)
def test_an_outline_adds_up(
    ratio: float, share: float, alpha: float, attention: bool, largest: float, folders: dict[str, Path]
) -> None:
    bench = open_bench_once(folders["llama"])
    sizes = Sizes(bench)
    every = sizes.layer(0)
    removed = math.floor(ratio * share * LAYERS + 1e-9)
    kinds = UNITS if attention else ("channels",)
    most = sum(int(largest * sizes.full.total(0, unit)) * sizes.units[0][unit] for unit in kinds) * (LAYERS - removed)
    budget = ratio * every * LAYERS - removed * every
    changes: dict[str, Any] = {
        "ratio": ratio,
        "layer_share": share,
        "alpha": alpha,
        "prune_attention": attention,
        "max_layer_ratio": largest,
        "protect_first": 0,
        "protect_last": 0,
    }
    if budget > most * (1 + 1e-9):
        with pytest.raises(ConfigError, match="would have to lose"):
            outlined(bench, **changes)
        return
    found, _ = outlined(bench, **changes)
    assert len(found.removed) == removed
    assert sorted((*found.removed, *found.ratios)) == list(range(LAYERS))
    assert found.budget == pytest.approx(budget)
    spent = sum(found.ratios.values()) * every
    assert spent == pytest.approx(budget, rel=1e-6, abs=1e-3)
    ceiling = largest * sizes.layer(0, kinds) / every
    assert all(0 <= each <= ceiling + 1e-12 for each in found.ratios.values())
    heads = bench.full.heads[0] if attention else 0
    assert found.heads == {
        layer: min(round(each * heads), heads - 1) if attention else 0 for layer, each in found.ratios.items()
    }


_OPEN: dict[Path, Workbench] = {}


def open_bench_once(folder: Path) -> Workbench:
    return _OPEN.setdefault(folder, open_bench(folder))


@pytest.mark.parametrize("family", DECODERS)
def test_sizes_are_those_of_the_tensors(family: str, folders: dict[str, Path]) -> None:
    sizes = Sizes(open_bench(folders[family]))
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
    outputs = ("o_proj", "out_proj", "down_proj", "fc2")  # their biases belong to no unit
    total = sum(
        parameter.numel()
        for name, parameter in load(folders[family]).named_parameters()
        if ".layers." in name
        and name.split(".")[-2] in names
        and not (name.endswith("bias") and name.split(".")[-2] in outputs)
    )
    assert sizes.total == total
    assert sum(sizes.layer(layer) for layer in range(LAYERS)) == total
    assert sizes.layer(0, ("heads",)) + sizes.layer(0, ("channels",)) == sizes.layer(0)


def test_an_outline_of_a_real_text_is_that_of_its_importances(folders: dict[str, Path]) -> None:
    bench, tokens = open_bench(folders["qwen3"]), draw_tokens()
    found = draw_outline(configured(), Sizes(bench), bench, TextSource(bench, tokens, "dense"))
    passed = pass_through(load(folders["qwen3"]), tokens)
    importance = {layer: importance_of(passed[layer].before, passed[layer].after) for layer in (1, 2, 3)}
    assert found.removed == (min(importance, key=lambda layer: importance[layer]),)
    model = load(folders["qwen3"])
    skip_block(blocks_of(model)[found.removed[0]])
    left = pass_through(model, tokens)
    expected = {layer: importance_of(left[layer].before, left[layer].after) for layer in found.ratios}
    assert found.importance == pytest.approx(expected, abs=1e-6)


def test_an_outline_goes_into_a_file_and_back(llama: Workbench) -> None:
    found, _ = outlined(llama, layer_share=0.8, repair=True)
    assert Outline.from_record(json.loads(json.dumps(found.to_record()))) == found
    assert dataclasses.asdict(found)["removed"] == (3, 2)
