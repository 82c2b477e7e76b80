"""Which units go: against a greedy choice written out unit by unit, and what must hold of any choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.errors import ConfigError
from fl_edge.fedspine.config import FedSpineConfig
from fl_edge.fedspine.schedule import ScheduleConfig, next_sparsity, ratio_bounds
from fl_edge.fedspine.selection import Guards, select
from fl_edge.pruning import LayerPlan, PruningPlan, sparsity
from fl_edge.pruning.plan import UNITS
from tests.tiny_fedspine import draw_scores, make_plan


@dataclass(frozen=True)
class Case:
    plan: PruningPlan
    scores: Any
    sizes: list[tuple[int, int]]

    @property
    def total(self) -> int:
        plan = self.plan
        return sum(h * a + c * b for h, c, (a, b) in zip(plan.heads, plan.channels, self.sizes, strict=True))

    def removed(self, plan: PruningPlan) -> int:
        kept = zip(plan.layers, self.sizes, strict=True)
        return self.total - sum(len(layer.heads) * a + len(layer.channels) * b for layer, (a, b) in kept)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Layers of different sizes, some units gone already, scores with ties."""
    layers = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    plan = make_plan(tuple(rng.integers(1, 6, layers).tolist()), tuple(rng.integers(1, 30, layers).tolist()))
    sizes = [(int(rng.integers(1, 60)), int(rng.integers(1, 8))) for _ in range(layers)]
    scores = draw_scores(plan, rng, ties=draw(st.booleans()))
    if draw(st.booleans()):
        plan = select(plan, draw_scores(plan, rng), sizes, float(rng.uniform(0, 0.5)))
    return Case(plan, scores, sizes)


@st.composite
def guard_sets(draw: st.DrawFn) -> Guards:
    frozen = draw(st.frozensets(st.integers(0, 3), max_size=2))
    return Guards(draw(st.integers(1, 3)), draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), frozen)


def least_of(plan: PruningPlan, guards: Guards, layer: int, unit: Any) -> int:
    if layer in guards.frozen_layers:
        return len(plan.kept(layer, unit))
    before = plan.total(layer, unit)
    return guards.min_heads if unit == "heads" else max(1, math.ceil(guards.min_channels * before))


def greedy(case: Case, share: float, scope: str, guards: Guards) -> PruningPlan:
    """Unit by unit, the slow way."""
    plan, offers = case.plan, []
    for layer in range(len(plan.layers)):
        for place, unit in enumerate(UNITS):
            kept, before = plan.kept(layer, unit), plan.total(layer, unit)
            by_score = sorted(kept, key=lambda i, s=case.scores[layer][unit]: (s[i], i))  # type: ignore[misc]
            params = case.sizes[layer][place]
            for nth, index in enumerate(by_score, 1):
                score = case.scores[layer][unit][index] / params
                key = score if scope == "global" else (before - len(kept) + nth) / before
                if len(kept) - nth >= least_of(plan, guards, layer, unit):
                    offers.append((key, layer, place, nth, index, params))
    left = round(share * case.total) - case.removed(plan)
    gone = set()
    for _, layer, place, _, index, params in sorted(offers):
        if params <= left:
            left -= params
            gone.add((layer, place, index))
    layers = tuple(
        LayerPlan(*(tuple(i for i in plan.kept(n, unit) if (n, p, i) not in gone) for p, unit in enumerate(UNITS)))
        for n in range(len(plan.layers))
    )
    return PruningPlan(plan.model_type, plan.heads, plan.channels, layers)


@given(case=cases(), share=st.floats(0, 0.99), guards=guard_sets())
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_selection_is_the_greedy_choice(scope: str, case: Case, share: float, guards: Guards) -> None:
    found = select(case.plan, case.scores, case.sizes, share, scope=scope, guards=guards)
    assert found == greedy(case, share, scope, guards)
    assert found == select(case.plan, case.scores, case.sizes, share, scope=scope, guards=guards)


@given(case=cases(), share=st.floats(0, 0.99), guards=guard_sets(), scope=st.sampled_from(["layer", "global"]))
@settings(max_examples=150, deadline=None)
def test_what_holds_of_every_cut(scope: str, case: Case, share: float, guards: Guards) -> None:
    found = select(case.plan, case.scores, case.sizes, share, scope=scope, guards=guards)
    assert case.plan.covers(found)
    budget = round(share * case.total)
    assert case.removed(found) <= max(budget, case.removed(case.plan))
    left = budget - case.removed(found)
    for layer in range(len(found.layers)):
        for place, unit in enumerate(UNITS):
            kept, before = found.kept(layer, unit), case.plan.kept(layer, unit)
            least = least_of(case.plan, guards, layer, unit)
            assert len(kept) >= min(len(before), least)
            scores = case.scores[layer][unit]
            gone = set(before) - set(kept)
            assert all((scores[low], low) < (scores[high], high) for low in gone for high in kept)
            if len(kept) > least:  # another unit could have gone, had it fitted
                assert case.sizes[layer][place] > left


@given(case=cases(), shares=st.lists(st.floats(0, 0.99), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_lower_sparsity_than_there_is_changes_nothing(case: Case, shares: list[float]) -> None:
    plan = case.plan
    for share in shares:
        after = select(plan, case.scores, case.sizes, share)
        assert plan.covers(after)
        assert sparsity(after, case.sizes) >= sparsity(plan, case.sizes)
        if share < sparsity(plan, case.sizes):
            assert after == plan
        plan = after


@given(
    seed=st.integers(0, 2**32 - 1), target=st.floats(0.1, 0.6), reading=st.sampled_from(["increment", "fraction"]),
    scope=st.sampled_from(["layer", "global"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_schedule_ends_at_its_target_to_within_one_unit(seed: int, target: float, reading: str, scope: str) -> None:
    rng = np.random.default_rng(seed)
    plan, sizes = make_plan((8, 8, 8), (40, 40, 40)), [(60, 20)] * 3
    schedule = ScheduleConfig(target=target, largest=0.2, reading=reading)
    reached = [0.0]
    for server_round in range(1, 21):
        least, largest = ratio_bounds(schedule, reached[-1], server_round, 20)
        wanted = next_sparsity(schedule, reached[-1], float(rng.uniform(least, largest)))
        plan = select(plan, draw_scores(plan, rng), sizes, wanted, scope=scope)
        reached.append(sparsity(plan, sizes))
    assert reached == sorted(reached)
    unit = 20 / 3840
    assert reached[12] > target - 3 * unit  # T_prune, with a floor that counts on cuts without a remainder
    assert target - unit < reached[-1] <= target + 0.5 / 3840


def test_by_layer_every_group_loses_the_same_share_whatever_the_scores() -> None:
    plan, sizes = make_plan((4, 8), (40, 20)), [(30, 4), (20, 6)]
    scores = draw_scores(plan, np.random.default_rng(0))
    scores[0]["heads"] += 100
    half = select(plan, scores, sizes, 0.5)
    assert [(len(layer.heads), len(layer.channels)) for layer in half.layers] == [(2, 20), (4, 10)]
    assert select(half, scores, sizes, 0.75).layers[1].heads == tuple(np.sort(np.argsort(scores[1]["heads"])[-2:]))


def test_globally_the_lowest_score_over_parameters_goes_first() -> None:
    plan, sizes = make_plan((2, 2), (2, 2)), [(10, 5), (10, 5)]
    scores: Any = [
        {"heads": np.array([3.0, 9.0]), "channels": np.array([1.6, 9.0])},  # 0.30 and 0.32 a parameter
        {"heads": np.array([9.0, 3.1]), "channels": np.array([9.0, 1.4])},  # 0.31 and 0.28
    ]
    gone = [select(plan, scores, sizes, share, scope="global").layers for share in (5 / 60, 15 / 60, 25 / 60, 30 / 60)]
    whole = LayerPlan((0, 1), (0, 1))
    assert gone[0] == (whole, LayerPlan((0, 1), (0,)))
    assert gone[1] == (LayerPlan((1,), (0, 1)), LayerPlan((0, 1), (0,)))
    assert gone[2] == (LayerPlan((1,), (0, 1)), LayerPlan((0,), (0,)))
    assert gone[3] == (LayerPlan((1,), (1,)), LayerPlan((0,), (0,)))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_of_equal_scores_the_lowest_index_goes_first(scope: str) -> None:
    plan = make_plan((3,), (6,))
    scores: Any = [{"heads": np.zeros(3), "channels": np.array([0, 1, 0, 0, 1, 0.0])}]
    found = select(plan, scores, [(1000, 1)], 3 / 3006, scope=scope)
    assert found.layers == (LayerPlan((0, 1, 2), (1, 4, 5)),)


def test_settings_become_guards() -> None:
    assert FedSpineConfig().guards(12) == Guards(1, 0.1, frozenset())
    config = FedSpineConfig(freeze_ends=True, min_heads=2, min_channels=0.3)
    assert config.guards(12) == Guards(2, 0.3, frozenset({0, 1, 11}))
    assert config.guards(1).frozen_layers == {0}
    plan, sizes = make_plan((4,) * 12, (10,) * 12), [(10, 4)] * 12
    cut = select(plan, draw_scores(plan, np.random.default_rng(0)), sizes, 0.9, guards=config.guards(12))
    lengths = [(len(layer.heads), len(layer.channels)) for layer in cut.layers]
    assert lengths == [(4, 10)] * 2 + [(2, 3)] * 9 + [(4, 10)]


@pytest.mark.parametrize("share", [-0.01, 1.0, math.nan])
def test_a_share_out_of_range_is_one_line(share: float) -> None:
    plan = make_plan((2,), (4,))
    with pytest.raises(ConfigError, match=rf"^sparsity={share} is not allowed; it must be at least 0 and below 1$"):
        select(plan, draw_scores(plan, np.random.default_rng(0)), [(4, 1)], share)
