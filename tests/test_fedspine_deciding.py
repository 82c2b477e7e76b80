"""What devices are told to do: within the schedule, for a reason that is said, and along one order."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.fedspine.bandit import Agent
from fl_edge.fedspine.deciding import Decision, class_plan, decide, removal_scores
from fl_edge.fedspine.schedule import ratio_bounds
from fl_edge.fedspine.selection import select
from fl_edge.fedspine.state import DeviceState
from fl_edge.pruning import PruningPlan, sparsity
from fl_edge.pruning.plan import UNITS
from tests.tiny_fedspine import draw_scores, make_fedspine, make_plan

SIZES, TOTAL, UNIT = [(60, 20)] * 2, 2560, 20 / 2560  # two layers of 8 heads and 40 channels
FULL = make_plan((8, 8), (40, 40))
SEEDS = st.integers(0, 2**32 - 1)


def device_of(config: Any, samples: int = 10, plan: PruningPlan = FULL) -> DeviceState:
    return DeviceState(samples, plan, Agent(config.bandit, config.space))


def observed(rng: np.random.Generator, plan: PruningPlan) -> Any:
    """Scores as a device with this plan would send them."""
    return [
        {unit: torch.tensor(rng.random(len(plan.kept(layer, unit))), dtype=torch.float32) for unit in UNITS}
        for layer in range(len(plan.layers))
    ]


def step(config: Any, devices: dict[str, DeviceState], name: str, server_round: int, rounds: int = 20) -> Decision:
    rng = np.random.default_rng([server_round, int(name)])
    return decide(config, devices[name], removal_scores(config, devices, name), SIZES, server_round, rounds, rng)


def adopt(config: Any, device: DeviceState, decision: Decision, rng: np.random.Generator) -> None:
    """What the server does with a reply."""
    device.plan = decision.plan
    device.observe(observed(rng, decision.plan), 3, config.smoothing)
    if config.choice == "bandit":
        device.agent.learn(decision.arm, float(rng.random()))


@given(
    seed=SEEDS, target=st.floats(0.1, 0.6), warmup=st.integers(0, 3), choice=st.sampled_from(["bandit", "fixed"]),
    reading=st.sampled_from(["increment", "fraction"]), importance=st.sampled_from(["own", "consensus"]),
    scope=st.sampled_from(["layer", "global"]), loss=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_decision_of_a_whole_run(
    seed: int, target: float, warmup: int, choice: str, reading: str, importance: str, scope: str, loss: float
) -> None:
    """Devices that miss rounds included: the masks stay one inside the other, and everybody arrives."""
    config = make_fedspine(
        target=target, warmup_rounds=warmup, choice=choice, reading=reading, importance=importance, scope=scope
    )
    rng = np.random.default_rng(seed)
    devices = {str(n): device_of(config, int(rng.integers(1, 100))) for n in range(4)}
    for server_round in range(1, 25):
        decisions = {name: step(config, devices, name, server_round, rounds=20) for name in devices}
        for name, decision in decisions.items():
            before = sparsity(devices[name].plan, SIZES)
            least, largest = ratio_bounds(config.schedule, before, server_round, 20)
            assert decision.before == before
            assert decision.after == sparsity(decision.plan, SIZES) <= target + 0.5 / TOTAL
            assert devices[name].plan.covers(decision.plan)
            assert decision.arm.rank in ((config.fixed_rank,) if choice == "fixed" else config.rank_set)
            assert decision.why
            assert "\n" not in decision.why
            if before > target - UNIT + 1e-12 or server_round <= warmup:
                assert (decision.arm.ratio, decision.could_prune) == (0, False)
                assert decision.plan == devices[name].plan
                assert decision.why.startswith("target reached" if before > target - UNIT else "warm-up")
            elif before < target - UNIT - 1e-12:
                assert decision.could_prune
                assert least <= decision.arm.ratio <= largest
            if server_round > 20 or rng.random() >= loss:
                adopt(config, devices[name], decision, rng)
        if importance == "consensus":
            assert_nested([device.plan for device in devices.values()])
    for device in devices.values():
        assert target - UNIT < sparsity(device.plan, SIZES) <= target + 0.5 / TOTAL


def assert_nested(plans: list[PruningPlan]) -> None:
    for one, other in combinations(plans, 2):
        for layer in range(len(one.layers)):
            for unit in UNITS:
                a, b = set(one.kept(layer, unit)), set(other.kept(layer, unit))
                assert a <= b or a >= b, (layer, unit)


def test_own_importance_leaves_each_device_its_own_order() -> None:
    config = make_fedspine(importance="own", warmup_rounds=0)
    rng = np.random.default_rng(0)
    devices = {str(n): device_of(config) for n in range(3)}
    for server_round in range(1, 8):
        for name, device in devices.items():
            adopt(config, device, step(config, devices, name, server_round), rng)
    with pytest.raises(AssertionError):
        assert_nested([device.plan for device in devices.values()])
    for name, device in devices.items():
        found = removal_scores(config, devices, name)
        for layer, scores in enumerate(device.importance):
            assert all(np.array_equal(found[layer][unit], scores[unit].double().numpy()) for unit in UNITS)


def plan_without(heads: set[int], channels: set[int]) -> PruningPlan:
    record = FULL.to_record()
    for unit, gone in (("heads", heads), ("channels", channels)):
        mask = int(record[f"kept_{unit}"][0], 16) & ~sum(1 << each for each in gone)
        record[f"kept_{unit}"] = [f"{mask:0{len(record[f'kept_{unit}'][0])}x}", record[f"kept_{unit}"][1]]
    return PruningPlan.from_record(record)


def test_the_consensus_is_the_holders_mean_by_samples_below_what_others_have_removed() -> None:
    config = make_fedspine()
    rng = np.random.default_rng(0)
    devices = {
        "a": device_of(config, 10),
        "b": device_of(config, 30, plan_without({2}, {5, 6})),
        "c": device_of(config, 60, plan_without({2, 3}, {6})),
        "new": device_of(config, 1000),  # has not answered yet: it has a mask and no opinion
    }
    for name in "abc":
        devices[name].observe(observed(rng, devices[name].plan), 3, 0.9)
    found = removal_scores(config, devices, "a")
    assert found[0]["heads"][[2, 3]].tolist() == [-2, -1]
    assert found[0]["channels"][[5, 6]].tolist() == [-1, -2]
    scores = {name: devices[name].importance[0]["heads"].double().numpy() for name in "abc"}
    mean = 0.1 * scores["a"] + 0.3 * scores["b"] + 0.6 * scores["c"]
    others = [0, 1, 4, 5, 6, 7]
    assert np.allclose(found[0]["heads"][others], mean[others])
    again = removal_scores(config, dict(reversed(devices.items())), "new")
    for layer in range(2):
        assert all(np.array_equal(found[layer][unit], again[layer][unit]) for unit in UNITS)


def test_the_consensus_does_not_depend_on_who_came_first() -> None:
    """To the bit; with few samples the sums are exact anyway."""
    config, rng = make_fedspine(), np.random.default_rng(0)
    devices = {str(n): device_of(config, int(rng.integers(1, 10**14))) for n in range(30)}
    for device in devices.values():
        device.observe(observed(rng, FULL), 3, 0.9)
    one, other = (removal_scores(config, each, "0") for each in (devices, dict(reversed(devices.items()))))
    assert all(np.array_equal(one[layer][unit], other[layer][unit]) for layer in range(2) for unit in UNITS)


def test_a_cut_whose_scores_were_lost_still_counts_for_the_order() -> None:
    """A round of which no iteration gave finite scores changes the plan and tells nothing about importance."""
    config = make_fedspine()
    devices = {"a": device_of(config), "b": device_of(config, 10, plan_without({7}, set()))}
    devices["a"].observe(observed(np.random.default_rng(0), FULL), 3, 0.9)
    assert removal_scores(config, devices, "a")[0]["heads"].argmin() == 7


def test_without_any_importance_all_units_are_equal() -> None:
    for importance in ("own", "consensus"):
        config = make_fedspine(importance=importance)
        found = removal_scores(config, {"a": device_of(config)}, "a")
        assert not any(scores[unit].any() for scores in found for unit in UNITS)
        assert [len(found[0][unit]) for unit in UNITS] == [8, 40]


@pytest.mark.parametrize("reading", ["increment", "fraction"])
def test_fixed_choice_takes_even_steps_to_the_deadline(reading: str) -> None:
    config = make_fedspine(choice="fixed", reading=reading, target=0.5, warmup_rounds=2, deadline=0.6)
    devices = {"0": device_of(config)}
    reached = []
    for server_round in range(1, 15):
        decision = step(config, devices, "0", server_round, rounds=20)
        assert decision.arm.rank == config.fixed_rank == 4
        assert "even steps, one rank" in decision.why
        devices["0"].plan = decision.plan
        reached.append(decision.after)
    expected = [0, 0, *(0.05 * n for n in range(1, 11)), 0.5, 0.5]
    assert reached == pytest.approx(expected, abs=3 * UNIT)  # what a cut leaves is spread over the later ones
    assert 0.5 - UNIT < reached[11] <= 0.5


def test_reasons() -> None:
    config = make_fedspine(warmup_rounds=1, target=0.5, ranks="2 4 8")
    rng = np.random.default_rng(0)
    devices = {"0": device_of(config)}
    said = []
    for server_round in range(1, 15):
        decision = step(config, devices, "0", server_round)
        said.append(decision.why)
        adopt(config, devices["0"], decision, rng)
    assert said[0] == "warm-up, rank only; first pull of its quadrant"
    assert said[1] == "first pull of its quadrant"
    assert any(why.startswith("highest of ") for why in said)
    assert said[-1].startswith("target reached, rank only; highest of ")
    fast = make_fedspine(warmup_rounds=0, target=0.5, largest=0.25)
    late = {"0": device_of(fast)}
    late["0"].agent.cold.clear()
    assert step(fast, late, "0", 12).why == "nothing known yet"
    late["0"].agent.learn(step(fast, late, "0", 1).arm, 0.5)
    assert step(fast, late, "0", 12).why.endswith(", at least 0.250 to be in time")


def test_one_plan_stands_for_its_class() -> None:
    config = make_fedspine()
    rng = np.random.default_rng(1)
    plans: list[PruningPlan] = []
    for share in (0.2, 0.4, 0.5):
        plans.append(select(plans[-1] if plans else FULL, draw_scores(FULL, rng), SIZES, share))
    assert class_plan(config, [plans[1]] * 3, SIZES, 0.9) == plans[1]  # equal plans stand as they are
    assert class_plan(config, plans, SIZES, sparsity(plans[1], SIZES)) == plans[1]  # what two of three have removed
    assert class_plan(config, plans, SIZES, sparsity(plans[2], SIZES)) == plans[2]
    others = [select(FULL, draw_scores(FULL, rng), SIZES, 0.4) for _ in range(5)]
    for target in (0.3, 0.4, 0.5):
        found = class_plan(config, others, SIZES, target)
        assert target - UNIT < sparsity(found, SIZES) <= target + 0.5 / TOTAL
        assert found == class_plan(config, others[::-1], SIZES, target)
