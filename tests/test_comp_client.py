"""A device that takes part in a pruning: what it says, what it refuses, and what it forgets and makes again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.device import Device
from fl_edge.comp.history import History
from fl_edge.comp.messages import Order, config_text, plan_text
from fl_edge.comp.onlooker import Onlooker
from fl_edge.comp.outcome import Outcome, base_digest
from fl_edge.comp.participant import Participant
from fl_edge.comp.pooled import Dense, Measure, Similar
from fl_edge.errors import ReplyError
from fl_edge.link import LocalGrid
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.pruning import full_plan
from tests.tiny import same_bits
from tests.tiny_comp_core import CPU, draw_tokens, load, open_bench
from tests.tiny_fleet import LENGTH, SEQUENCES, Fleet, settings

TEXT = draw_tokens(4, LENGTH, 7)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def ask(grid: LocalGrid, kind: str, config: dict[str, Any], tensors: Any = None, node: int = 1) -> Any:
    (reply,) = grid.send_and_receive([Message(make_content(config, tensors), node, kind)])
    assert not reply.has_error(), reply.error
    return reply


def order(fleet: Fleet, question: Any, first: int = 0, end: int = 0, **changes: Any) -> Order:
    steps = list(History(fleet.folder / "out" / "checkpoints").since(first, end, 10**9))
    return Order("federated-7", True, settings().method(0.3), question, first, steps, "mask", "float64", **changes)


def test_a_device_says_who_it_is(fleet: Fleet) -> None:
    said = config_of(ask(LocalGrid(fleet.app(), 3), "query.comp_describe", {}, node=2))
    assert (said["device"], said["tokens"]) == ("device-1", SEQUENCES[1] * LENGTH)
    assert said["base"] == base_digest(fleet.base)


def test_a_device_prunes_its_own_copy_once(fleet: Fleet) -> None:
    grid, config = LocalGrid(fleet.app(), 3), {"config": config_text(settings().method(0.3))}
    first, again = (config_of(ask(grid, "train.comp_prune", config, node=3)) for _ in range(2))
    outcome = Outcome.checked(first, full_plan(load(fleet.base)))
    assert Path(outcome.folder).is_relative_to(fleet.folder / "devices" / "device-2")
    assert outcome.bytes_read > 0
    assert outcome.figures.peak_bytes > 0
    assert outcome.figures.memory_bytes[1] < outcome.figures.memory_bytes[0]
    assert (again["folder"], again["seconds"]) == (first["folder"], first["seconds"])  # done, and not done again


def test_a_device_behind_says_so_and_follows(fleet: Fleet) -> None:
    fleet.run(mode="federated")
    grid = LocalGrid(fleet.app(), 3, run_id=5)
    question = Measure(2, "heads", 4)
    behind = order(fleet, question, 4, 4)
    said = ask(grid, "train.comp_answer", behind.to_config(), behind.to_tensors())
    assert config_of(said)["steps"] == 0
    assert "sums" not in config_of(said)
    assert not tensors_of(said)
    whole = order(fleet, question, 0, 4)
    reply = ask(grid, "train.comp_answer", whole.to_config(), whole.to_tensors())
    assert config_of(reply)["steps"] == 4
    assert config_of(reply)["bytes_read"] > 0
    repeated = ask(grid, "train.comp_answer", whole.to_config(), whole.to_tensors())  # its answer got lost
    assert same_bits(tensors_of(reply), tensors_of(repeated))


def test_a_question_about_what_is_passed_is_refused_in_one_line(fleet: Fleet) -> None:
    fleet.run(mode="federated")
    grid = LocalGrid(fleet.app(), 3, run_id=6)
    for question in (Measure(0, "heads", 4), Measure(2, "channels", 4), Measure(3, "heads", 4)):
        asked = order(fleet, question, 0, 4)
        reply = ask(grid, "train.comp_answer", asked.to_config(), asked.to_tensors())
        assert "which are not what is next" in config_of(reply)["refused"]
    early = {**order(fleet, None, 0, 4).to_config(), "plan": plan_text(full_plan(load(fleet.base))), "end": 4}
    reply = ask(grid, "train.comp_finish", early, order(fleet, None, 0, 4).to_tensors())
    assert "has not followed every step" in config_of(reply)["refused"]


def test_steps_out_of_order_are_refused(fleet: Fleet) -> None:
    fleet.run(mode="federated")
    history = History(fleet.folder / "out" / "checkpoints")
    participant = Participant(open_bench(fleet.base), None, "dense", lambda place, tensors: None)
    participant.begin()
    with pytest.raises(ReplyError, match="channels of layer 0, which is not the next step"):
        participant.follow(history.read(1))
    participant.follow(history.read(0))
    assert not participant.between
    with pytest.raises(ReplyError, match="heads of layer 0, which is not the next step"):
        participant.follow(history.read(0))
    participant.follow(history.read(1))
    assert (participant.steps, participant.layer, participant.place, participant.between) == (2, 1, 1, True)


def test_one_layer_is_in_memory_and_no_graph_is_built(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.run(mode="federated")
    held = set[int]()
    most = 0
    load_, release = Checkpoint.load, Checkpoint.release

    def loading(self: Checkpoint, layer: int) -> Any:
        nonlocal most
        held.add(layer)
        most = max(most, len(held))
        return load_(self, layer)

    def releasing(self: Checkpoint, layer: int) -> None:
        held.discard(layer)
        release(self, layer)

    monkeypatch.setattr(Checkpoint, "load", loading)
    monkeypatch.setattr(Checkpoint, "release", releasing)
    device = Device(fleet.base, fleet.folder / "own", TEXT, settings().method(0.3), CPU)
    for question in (Similar(()), Dense((0, 1))):
        device.answer(question, "own")
    history = History(fleet.folder / "out" / "checkpoints")
    device.follow(0, list(history.since(0, len(history), 10**9)), measures=True)
    assert (most, held) == (1, set())
    snapshot = device.snapshot()
    assert snapshot is not None
    assert not any(tensor.requires_grad for tensor in snapshot[0].values())


def test_an_onlooker_goes_back_where_it_has_to(fleet: Fleet) -> None:
    def sums(onlooker: Onlooker, *layers: int) -> dict[str, torch.Tensor]:
        found = onlooker.sums(layers)
        return {f"{key}.{name}": each for key, value in found.items() for name, each in value.tensors.items()}

    one, other = Onlooker(open_bench(fleet.base), TEXT), Onlooker(open_bench(fleet.base), TEXT)
    at_once = sums(one, 1, 3)
    assert one.layer == 4
    assert same_bits(sums(one, 1), {name: each for name, each in at_once.items() if name.startswith("(1,")})
    kept, layer = {name: tensor.clone() for name, tensor in one.snapshot().items()}, one.layer
    other.restore(kept, layer)
    assert same_bits(sums(other, 3), {name: each for name, each in at_once.items() if name.startswith("(3,")})
