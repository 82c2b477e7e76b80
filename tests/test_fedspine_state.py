"""What the server remembers: through a checkpoint and back to the bit, and what a device's scores add up to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_edge.checkpoints import load_checkpoint, save_checkpoint
from fl_edge.errors import ReplyError
from fl_edge.fedspine.bandit import Agent, Arm
from fl_edge.fedspine.importance import UnitScores
from fl_edge.fedspine.lora import head_of
from fl_edge.fedspine.state import DeviceState, FedSpineState
from fl_edge.pruning import full_plan, members
from fl_edge.pruning.plan import UNITS
from tests.tiny import same_bits
from tests.tiny_fedspine import BASE, draw_factors, make_fedspine, make_plan
from tests.tiny_transformers import draw_plan

CONFIG = make_fedspine()


def draw_importance(plan, rng: np.random.Generator) -> UnitScores:  # type: ignore[no-untyped-def]
    return [
        {unit: torch.from_numpy(rng.random(plan.total(layer, unit), np.float32)) for unit in UNITS}
        for layer in range(len(plan.layers))
    ]


def full_state() -> FedSpineState:
    """Devices with and without a past, names with everything in them, numbers that text would round."""
    rng, plan = np.random.default_rng(0), full_plan(BASE)
    state = FedSpineState(draw_factors(members(BASE), BASE, 8), head_of(BASE), server_round=7)
    state.clock.advance(0.1 + 0.2)
    state.traffic.add(12345678901, 3)
    for name in ("device-0", "köln/7.heads", "silent"):
        state.meet(name, 5, plan, CONFIG)
    for name in ("device-0", "köln/7.heads"):
        device = state.devices[name]
        device.plan = draw_plan(BASE, rng, 0.4)
        device.importance, device.steps = draw_importance(plan, rng), 12
        device.loss, device.participation = 1 / 3, 4
        for _ in range(9):
            device.agent.learn(Arm(float(rng.uniform(0, 0.25)), int(rng.choice([2, 4, 8]))), float(rng.random()))
    return state


def test_a_checkpoint_brings_everything_back_to_the_bit(tmp_path: Path) -> None:
    state = full_state()
    save_checkpoint(tmp_path, 7, state.tensors(), state.to_record())
    kept = load_checkpoint(tmp_path)
    assert kept is not None
    back = FedSpineState.from_record(kept.weights, kept.record, CONFIG)
    assert same_bits(back.tensors(), state.tensors())
    assert back.to_record() == state.to_record() == json.loads(json.dumps(state.to_record()))
    assert list(back.devices) == list(state.devices)
    assert (back.server_round, back.clock, back.traffic) == (7, state.clock, state.traffic)
    for name, device in back.devices.items():
        known = state.devices[name]
        assert device.agent == known.agent
        assert (device.samples, device.plan, device.steps) == (known.samples, known.plan, known.steps)
        assert (device.loss, device.participation) == (known.loss, known.participation)
        assert len(device.importance) == len(known.importance)
        for mine, theirs in zip(device.importance, known.importance, strict=True):
            assert all(torch.equal(mine[unit], theirs[unit]) for unit in UNITS)
    assert back.adapter.keys() == state.adapter.keys()
    for path, factors in back.adapter.items():
        assert torch.equal(factors.a, state.adapter[path].a)
        assert torch.equal(factors.b, state.adapter[path].b)
    assert back.head.keys() == state.head.keys()


def test_meeting_a_device_again_keeps_what_is_known_of_it() -> None:
    state, plan = full_state(), full_plan(BASE)
    before = state.devices["device-0"]
    state.meet("device-0", 50, plan, CONFIG)
    assert state.devices["device-0"] is before
    assert (before.samples, before.participation) == (50, 4)
    assert before.plan != plan
    with pytest.raises(ReplyError, match=r"^0 samples; at least 1 is due$"):
        state.meet("empty", 0, plan, CONFIG)
    assert "empty" not in state.devices
    with pytest.raises(ReplyError, match="0 samples"):
        state.meet("device-0", 0, plan, CONFIG)
    assert before.samples == 50


def test_scores_of_units_that_are_gone_stay_where_they_were() -> None:
    plan = make_plan((3,), (5,))
    device = DeviceState(4, plan, Agent(CONFIG.bandit, CONFIG.space))
    first: UnitScores = [{"heads": torch.tensor([1.0, 2, 3]), "channels": torch.arange(5.0)}]
    device.observe(first, 2, 0.5)
    assert torch.equal(device.importance[0]["heads"], first[0]["heads"])
    assert device.importance[0]["heads"] is not first[0]["heads"]
    record = plan.to_record() | {"kept_heads": ["5"], "kept_channels": ["18"]}  # heads 0 and 2, channels 3 and 4
    device.plan = type(plan).from_record(record)
    device.observe([{"heads": torch.tensor([9.0, 0.0]), "channels": torch.tensor([1.0, 7.0])}], 1, 0.5)
    # weights of the past's two iterations and of the newest one: 0.125 + 0.25 and 0.5 of 0.875
    past, new = 3 / 7, 4 / 7
    assert device.importance[0]["heads"].tolist() == pytest.approx([past * 1 + new * 9, 2, past * 3 + new * 0])
    assert device.importance[0]["channels"].tolist() == pytest.approx([0, 1, 2, past * 3 + new, past * 4 + new * 7])
    assert (device.steps, device.importance[0]["heads"].dtype) == (3, torch.float32)
    device.observe([], 0, 0.5)
    assert device.steps == 3
