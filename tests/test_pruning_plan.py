"""Plans as values: records, digests, nesting, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_edge.errors import ConfigError
from fl_edge.pruning import LayerPlan, PruningPlan

REMOVED = LayerPlan((), ())


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    layers = draw(st.integers(1, 4))
    gone = draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1))
    totals = [(draw(st.integers(1, 9)), draw(st.integers(1, 70))) for _ in range(layers)]

    def some(total: int) -> tuple[int, ...]:
        return tuple(sorted(draw(st.sets(st.integers(0, total - 1), min_size=1))))

    kept = tuple(
        REMOVED if layer in gone else LayerPlan(some(heads), some(channels))
        for layer, (heads, channels) in enumerate(totals)
    )
    return PruningPlan("bert", tuple(h for h, _ in totals), tuple(c for _, c in totals), kept)


@given(plans())
def test_a_record_is_small_json_and_gives_the_plan_back(plan: PruningPlan) -> None:
    text = json.dumps(plan.to_record())
    assert PruningPlan.from_record(json.loads(text)) == plan
    assert len(text) < 120 + sum(total / 4 + 20 for total in (*plan.heads, *plan.channels))


@given(plans(), plans())
def test_digests_are_equal_for_equal_plans_alone(one: PruningPlan, other: PruningPlan) -> None:
    assert (one.digest() == other.digest()) == (one == other)
    assert one.digest() == PruningPlan.from_record(one.to_record()).digest()


def test_the_digest_is_the_same_in_every_version() -> None:
    plan = PruningPlan("llama", (4,), (10,), (LayerPlan((0, 3), (0, 2, 9)),))
    assert plan.to_record()["kept_heads"] == ["9"]
    assert plan.to_record()["kept_channels"] == ["205"]
    assert plan.digest() == "fa8332345c128326207ca6491cedafd8"


@st.composite
def smaller_plans(draw: st.DrawFn, plan: PruningPlan) -> PruningPlan:
    gone = draw(st.sets(st.sampled_from(plan.layers_kept), max_size=len(plan.layers_kept) - 1))

    def some(units: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(draw(st.sets(st.sampled_from(units), min_size=1))))

    layers = tuple(
        REMOVED if layer.removed or index in gone else LayerPlan(some(layer.heads), some(layer.channels))
        for index, layer in enumerate(plan.layers)
    )
    return replace(plan, layers=layers)


@given(plans(), st.data())
def test_a_plan_covers_what_keeps_less(plan: PruningPlan, data: st.DataObject) -> None:
    smaller = data.draw(smaller_plans(plan))
    assert plan.unpruned().covers(plan)
    assert not any(layer.removed for layer in plan.unpruned().layers)
    assert plan.covers(smaller)
    assert smaller.covers(plan) == (smaller == plan)
    assert not plan.covers(replace(smaller, model_type="roberta"))


@given(plans(), st.data())
def test_a_restricted_plan_is_that_of_the_model_with_those_layers(plan: PruningPlan, data: st.DataObject) -> None:
    smaller, there = data.draw(smaller_plans(plan)), plan.layers_kept
    assert [not plan.layers[layer].removed for layer in range(len(plan.layers))] == [
        layer in there for layer in range(len(plan.layers))
    ]
    one, other = plan.restricted(there), smaller.restricted(there)
    assert one.layers_kept == tuple(range(len(there)))
    assert [(one.heads[i], one.channels[i], one.layers[i]) for i in one.layers_kept] == [
        (plan.heads[layer], plan.channels[layer], plan.layers[layer]) for layer in there
    ]
    assert [there[layer] for layer in other.layers_kept] == list(smaller.layers_kept)
    assert one.covers(other)
    assert other.covers(one) == (smaller == plan)
    assert PruningPlan.from_record(other.to_record()) == other
    assert other.restricted(other.layers_kept) == smaller.restricted(smaller.layers_kept)
    assert plan.restricted(range(len(plan.layers))) == plan


@pytest.mark.parametrize("layers", [(1, 0), (0, 0), (0, 3), (-1, 0)])
def test_layers_that_no_plan_has_are_refused(layers: tuple[int, ...]) -> None:
    plan = PruningPlan("bert", (4,) * 3, (6,) * 3, (LayerPlan((0,), (0,)), REMOVED, LayerPlan((1,), (5,))))
    assert plan.layers_kept == (0, 2)
    assert (plan.layers[1].removed, plan.layers[2].removed) == (True, False)
    with pytest.raises(ConfigError, match=r"must be ascending numbers below 3"):
        plan.restricted(layers)
    with pytest.raises(ConfigError, match="removes all 1 layers; at least one must stay"):
        plan.restricted((1,))
    with pytest.raises(ConfigError, match="at least 1"):
        plan.restricted(())


RECORD = PruningPlan("bert", (4, 4), (6, 6), (LayerPlan((0, 1), (0, 5)),) * 2).to_record()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kept_heads": ["3"]}, "kept_heads must be a list of 2 masks"),
        ({"kept_heads": ["3", 3]}, "kept_heads of layer 1 must be 1 hexadecimal"),
        ({"kept_heads": ["3", "-"]}, "kept_heads of layer 1 must be 1 hexadecimal"),
        ({"kept_channels": ["21", "121"]}, "kept_channels of layer 1 must be 2 hexadecimal"),
        ({"kept_channels": ["21", "a1"]}, "channels of layer 1 must be ascending numbers below 6"),
        ({"kept_channels": ["00", "21"]}, "leaves layer 0 no channels; at least one must stay, or neither"),
        ({"kept_heads": ["3", "0"]}, "leaves layer 1 no heads; at least one must stay, or neither"),
        ({"kept_heads": ["0", "0"], "kept_channels": ["00", "00"]}, "removes all 2 layers"),
        ({"heads": [4, 0]}, "heads must be a list of whole numbers"),
        ({"heads": [4, True]}, "heads must be a list of whole numbers"),
        ({"heads": "44"}, "heads must be a list"),
        ({"heads": [4], "kept_heads": ["3"]}, "1 layers' heads, 2 layers' channels"),
        ({key: [] for key in ("heads", "channels", "kept_heads", "kept_channels")}, "at least 1"),
        ({"model_type": 3}, "model_type must be a text"),
        ({"extra": 1}, "exactly the keys"),
    ],
)
def test_a_record_that_is_no_plan_is_refused_in_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        PruningPlan.from_record({**RECORD, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", [None, [], "bert", {key: RECORD[key] for key in ("heads", "channels")}])
def test_a_record_of_another_kind_is_refused(record: Any) -> None:
    with pytest.raises(ConfigError, match="exactly the keys"):
        PruningPlan.from_record(record)


@pytest.mark.parametrize("heads", [(), (1, 0), (0, 0), (0, 4), (-1, 2)])
def test_units_that_no_layer_has_are_refused(heads: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="layer 0"):
        PruningPlan("bert", (4,), (6,), (LayerPlan(heads, (0,)),))
