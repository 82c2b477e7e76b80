"""COMP on a fleet: together they come to what one machine would with all texts, whatever befalls some of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file
from torch import Tensor

from fl_edge.comp.history import History
from fl_edge.comp.local import TextSource
from fl_edge.comp.run import prune_checkpoint
from fl_edge.errors import ConfigError, FlEdgeError, TrainingError
from fl_edge.link import LocalGrid
from fl_edge.link.content import tensors_of
from fl_edge.link.faults import Fault
from fl_edge.pruning import load_pruned, read_plan
from tests.tiny import same_bits
from tests.tiny_comp_core import CPU, draw_tokens
from tests.tiny_fleet import LENGTH, SEQUENCES, Fleet, settings, tampered, union


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What a run together gives that nothing befalls."""
    fleet = Fleet(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fl_edge.comp.measures._SECONDS", 0.0)
        fleet.run(mode="federated")
    return weights(fleet.folder / "out" / "model")


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def central(fleet: Fleet, **changes: Any) -> Path:
    """All texts on one machine."""
    config = settings(**changes).method(settings(**changes).ratio)
    out = fleet.folder / "central"
    prune_checkpoint(
        fleet.base, out, config, lambda bench: TextSource(bench, union(), config.target), key="central", device=CPU
    )
    return out


def assert_near(one: Path, two: Path, relative: float) -> None:
    assert read_plan(one) == read_plan(two)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for name in a:
        largest = float(a[name].norm()) if name.endswith("weight") else 1.0
        assert float((a[name] - b[name]).norm()) <= relative * largest, name


class Fresh:
    """Every message meets a new process."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.kinds, self.lose = fleet, list[str](), -1

    def __call__(self, message: Message, context: Context) -> Message:
        self.kinds.append(message.metadata.message_type)
        if len(self.kinds) == self.lose:
            for file in (self.fleet.folder / "cache").rglob("*.safetensors"):
                file.unlink()
            context.state.clear()
        return self.fleet.app()(message, context)


@pytest.mark.parametrize(
    ("wire", "changes"),
    [
        ("float64", {}),
        ("float32", {"layer_rule": "loss"}),
        ("float32", {"restore": "weights", "target": "stream", "repair": True, "ratio": 0.5}),
        ("float64", {"target": "own", "bias": True, "allocation": "curves"}),
    ],
)
def test_together_is_as_all_texts_on_one_machine(fleet: Fleet, wire: str, changes: dict[str, Any]) -> None:
    report = fleet.run(mode="federated", wire=wire, **changes)
    assert_near(fleet.folder / "out" / "model", central(fleet, **changes), 1e-4)
    mine = weights(fleet.folder / "out" / "model")
    assert [row.device for row in report.devices] == ["device-0", "device-1", "device-2"]
    for row in report.devices:
        assert same_bits(weights(Path(row.outcome.folder)), mine)
        assert row.outcome.plan == read_plan(fleet.folder / "out" / "model")
        assert row.outcome.bytes_read > 0
        load_pruned(Path(row.outcome.folder))
    assert [row.report.layer for row in report.layers] == [0, 1, 2, 3]
    assert sum(row.up_bytes for row in report.layers) <= report.up_bytes > 0


def test_processes_that_forget_end_with_the_same_bits(fleet: Fleet, whole: dict[str, Tensor]) -> None:
    for lose in (-1, 9, 11, 16):
        app = Fresh(fleet)
        app.lose = lose
        report = fleet.run(mode="federated", name=f"fresh{lose}", app=app)
        assert not report.lost
        assert same_bits(weights(fleet.folder / f"fresh{lose}" / "model"), whole)
        for row in report.devices:
            assert same_bits(weights(Path(row.outcome.folder)), whole)


def test_decisions_in_pieces_give_the_same_bits(
    fleet: Fleet, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_edge.strategies.crowd._MIB", 1)  # a layer a message
    app = Fresh(fleet)
    app.lose = 20
    report = fleet.run(mode="federated", name="pieces", app=app)
    assert not report.lost
    assert same_bits(weights(fleet.folder / "pieces" / "model"), whole)


def test_only_sums_leave_a_device(fleet: Fleet) -> None:
    sent: list[tuple[str, Tensor]] = []
    app = fleet.app()

    def listening(message: Message, context: Context) -> Message:
        reply: Message = app(message, context)
        sent.extend(tensors_of(reply).items())
        return reply

    for mode in ("federated", "nested"):
        fleet.run(mode=mode, app=listening, name=mode)
    assert {name.rpartition(".")[2] for name, _ in sent} == {"gram", "inputs", "targets", "energy", "matched"}
    sequences = {count * LENGTH for count in SEQUENCES} | set(SEQUENCES) | {LENGTH}
    for name, tensor in sent:
        assert tensor.ndim == 1, name
        assert tensor.is_floating_point()
        assert tensor.numel() not in sequences, name


def test_the_order_of_arrival_changes_nothing(fleet: Fleet, whole: dict[str, Tensor]) -> None:
    class Shuffled(LocalGrid):
        def pull_messages(self, message_ids: Any) -> list[Message]:
            return super().pull_messages(message_ids)[::-1]

    fleet.run(mode="federated", grid=Shuffled(fleet.app(), 3))
    assert same_bits(weights(fleet.folder / "out" / "model"), whole)


def test_a_device_that_is_lost_is_missing_from_then_on(fleet: Fleet) -> None:
    def faults(message: Message, received: int) -> Fault | None:
        gone = message.metadata.dst_node_id == 2 and received >= 4
        return Fault(error="out of power") if gone else None

    report = fleet.run(mode="federated", faults=faults)
    assert list(report.lost) == ["device-1"]
    assert "out of power" in report.lost["device-1"]
    assert [row.device for row in report.devices] == ["device-0", "device-2"]
    assert {row.devices for row in report.layers} == {3, 2} or {row.devices for row in report.layers} == {2}
    load_pruned(fleet.folder / "out" / "model")


def test_too_few_devices_end_the_run_in_one_line(fleet: Fleet) -> None:
    def faults(message: Message, received: int) -> Fault | None:
        return Fault(error="gone") if received >= 3 and message.metadata.dst_node_id < 3 else None

    with pytest.raises(TrainingError, match=r"^1 devices answered and fewest=2 must; the last .* is device-1: .*gone$"):
        fleet.run(mode="federated", faults=faults, fewest=2)


@pytest.mark.parametrize("mode", ["federated", "nested"])
def test_a_forged_reply_leaves_its_device_out(fleet: Fleet, mode: str) -> None:
    def forge(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor[0] = torch.nan

    report = fleet.run(mode=mode, app=tampered(fleet.app(), forge, node=1, after=1))
    assert list(report.lost) == ["device-1"]
    assert "numbers that are not all finite" in report.lost["device-1"]
    assert len(report.devices) == 2


def test_a_device_with_another_base_or_without_text_is_left_out(fleet: Fleet) -> None:
    fleet.replaced(0, base_digest="other")
    fleet.replaced(2, calibration=draw_tokens(1, LENGTH)[:0])
    report = fleet.run(mode="federated")
    assert [row.device for row in report.devices] == ["device-1"]


def test_a_killed_server_goes_on_at_the_layer_it_was_at(fleet: Fleet, whole: dict[str, Tensor]) -> None:
    strategy = fleet.strategy(mode="federated")

    def kill(row: Any) -> None:
        if row.report.layer == 1:
            raise KeyboardInterrupt

    strategy.observers.append(kill)
    with pytest.raises(KeyboardInterrupt):
        strategy.start(LocalGrid(fleet.app(), 3), fleet.folder / "killed")
    assert len(History(fleet.folder / "killed" / "checkpoints")) >= 3
    report = fleet.strategy(mode="federated").start(LocalGrid(fleet.app(), 3, run_id=2), fleet.folder / "killed")
    assert [row.report.layer for row in report.layers] == [2, 3]
    assert same_bits(weights(fleet.folder / "killed" / "model"), whole)
    for row in report.devices:
        assert same_bits(weights(Path(row.outcome.folder)), whole)


def test_a_client_that_outlives_a_run_begins_the_next_one_anew(fleet: Fleet, whole: dict[str, Tensor]) -> None:
    """Though both have the same number, as runs on a LocalGrid have."""
    app, strategy = fleet.app(), fleet.strategy(mode="federated")

    def kill(row: Any) -> None:
        raise KeyboardInterrupt

    strategy.observers.append(kill)
    with pytest.raises(KeyboardInterrupt):
        strategy.start(LocalGrid(app, 3), fleet.folder / "killed")
    report = fleet.strategy(mode="federated").start(LocalGrid(app, 3), fleet.folder / "again")
    assert report.lost == {}
    assert same_bits(weights(fleet.folder / "again" / "model"), whole)


def test_each_for_itself_has_its_own_ratio_and_text(fleet: Fleet) -> None:
    fleet.replaced(1, calibration=torch.empty(0, LENGTH, dtype=torch.int64))
    report = fleet.run(mode="local", ratios="0.2 0.3 0.4")
    assert list(report.lost) == []  # it never took part: a line says why
    assert [(row.device, row.ratio) for row in report.devices] == [("device-0", 0.2), ("device-2", 0.3)]
    for row in report.devices:
        before, after = row.outcome.figures.parameters
        assert after < before
        load_pruned(Path(row.outcome.folder))
    assert not (fleet.folder / "out").exists()


def test_a_device_whose_guard_trips_is_one_line_and_the_others_go_on(fleet: Fleet) -> None:
    fleet.replaced(0, calibration=draw_tokens(1, 6))
    report = fleet.run(mode="local", max_variance=1e-4, ratios="0.4 0.0 0.0")
    assert list(report.lost) == ["device-0"]
    assert "guard" in report.lost["device-0"]
    assert "\n" not in report.lost["device-0"]


def test_nested_sizes_are_subsets_and_each_device_has_its_own(fleet: Fleet) -> None:
    app = Fresh(fleet)
    report = fleet.run(mode="nested", ratios="0.4 0.2", app=app)
    assert [(row.device, row.ratio) for row in report.devices] == [
        ("device-0", 0.4), ("device-1", 0.2), ("device-2", 0.4),
    ]  # fmt: skip
    small, large, same = (row.outcome.plan for row in report.devices)
    assert small == same
    assert large.covers(small)
    assert not small.covers(large)
    assert app.kinds.count("train.comp_answer") == 2 * 3  # importances, and all layers at once
    one, two = (weights(Path(report.devices[place].outcome.folder)) for place in (0, 2))
    assert same_bits(one, two)


def test_nested_sums_in_several_exchanges_give_the_same(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fleet.run(mode="nested", name="whole").devices
    first = [weights(Path(row.outcome.folder)) for row in whole]
    monkeypatch.setattr("fl_edge.strategies.comp._MIB", 1)
    app = Fresh(fleet)
    pieces = fleet.run(mode="nested", name="pieces", app=app).devices
    assert app.kinds.count("train.comp_answer") == 5 * 3
    for one, row in zip(first, pieces, strict=True):
        assert same_bits(one, weights(Path(row.outcome.folder)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "federated", "ratio": 0.9, "layer_share": 1.0}, "the ratio asks for 3 whole layers and 2 may go"),
        ({"ratios": "0.2 0.9", "layer_share": 0.0}, "would have to lose"),
        ({"ratios": "0.2 much"}, "ratios=0.2 much must be numbers from 0 to 0.95"),
        ({"ratios": ""}, "ratios= must be numbers"),
        ({"wire": "float16"}, "wire=float16 is not allowed"),
    ],
)
def test_what_no_plan_can_meet_is_one_line_before_a_device_is_asked(
    fleet: Fleet, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        fleet.strategy(**changes)
    assert "\n" not in str(refused.value)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_error_of_a_server_is_one_of_ours(fleet: Fleet) -> None:
    (fleet.base / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(FlEdgeError):
        fleet.strategy()
