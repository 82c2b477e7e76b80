"""The strategy and the client together, on a LocalGrid: learning, faults, refusals, resume."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fl_edge.checkpoints import load_checkpoint
from fl_edge.errors import ConfigError, TrainingError
from fl_edge.fedspine.config import FedSpineConfig
from fl_edge.fedspine.factors import Factors
from fl_edge.fedspine.lora import head_names
from fl_edge.fedspine.report import RoundReport, summarise
from fl_edge.fedspine.reward import loss_drop, pruning_progress, rewards, waiting_time
from fl_edge.link import Fault, LocalGrid
from fl_edge.link.content import PACKED, config_of, make_content, tensors_of
from fl_edge.link.faults import random_faults
from fl_edge.link.packing import pack, unpack
from fl_edge.observers import Recorder
from fl_edge.pruning import sparsity
from fl_edge.runs import RunFolder
from fl_edge.strategies.fedspine import FedSpine
from tests.tiny import same_bits
from tests.tiny_fedspine import BASE, DEVICES, make_app, make_dataset, make_strategy, tampered, train, workload
from tests.tiny_transformers import make_config


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Flower's logger hands nothing on."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, "flwr"):
        yield caplog
    logger.removeHandler(caplog.handler)


def participation(strategy: FedSpine) -> list[int]:
    return [strategy.state.devices[f"device-{n}"].participation for n in range(DEVICES)]


def bits(strategy: FedSpine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, record = strategy.snapshot()
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(record))


def same_state(one: FedSpine, other: FedSpine) -> bool:
    return same_bits(bits(one)[0], bits(other)[0]) and bits(one)[1] == bits(other)[1]


def test_the_loss_falls_and_everyone_ends_at_the_target() -> None:
    strategy, reports = train(10, tau=6)
    first, last = ([row.loss_before for row in reports[0].devices], [row.loss_after for row in reports[-1].devices])
    assert np.mean(last) < 0.7 * np.mean(first)
    smallest = min(min(pair) for pair in strategy.sizes) / sum(
        a * strategy.plan.heads[0] + b * strategy.plan.channels[0] for a, b in strategy.sizes
    )
    for device in strategy.state.devices.values():
        assert 0.5 - smallest < sparsity(device.plan, strategy.sizes) <= 0.5 + smallest
        assert device.participation == 10
    by_round = [[row.sparsity for row in report.devices] for report in reports]
    assert all(np.all(np.diff(line) >= 0) for line in np.transpose(by_round))
    assert [row.device for row in reports[0].devices] == ["device-0", "device-1", "device-2"]
    assert {row.rank for report in reports for row in report.devices} <= {2, 4, 8}
    assert all(row.why for report in reports for row in report.devices)
    assert all(0 <= row.reward <= 1 for report in reports for row in report.devices)
    for report in reports:
        assert RoundReport.from_record(json.loads(json.dumps(report.to_record()))) == report
        assert "\n" not in report.line(10, 0.0)
    assert summarise(reports)["sparsity_min"] > 0.5 - smallest


def kept_replies(app: Any, found: list[tuple[dict[str, Any], dict[str, Tensor]]]) -> Any:
    for node in range(DEVICES):
        app = tampered(app, lambda config, tensors: found.append((dict(config), dict(tensors))), node)
    return app


@pytest.mark.parametrize("weighting", ["samples", "sparsity"])
def test_without_pruning_at_one_rank_it_is_fedavg_of_the_factors(weighting: str) -> None:
    replies: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    strategy, _ = train(
        1, app=kept_replies(make_app(), replies), target=0.0, choice="fixed", fixed_rank=8, aggregation="masked_mean",
        weighting=weighting,
    )  # fmt: skip
    assert [config["samples"] for config, _ in replies] == [20, 24, 28]
    weights = torch.tensor([20, 24, 28], dtype=torch.float64) / 72
    mine = unpack(strategy.arrays()[PACKED])
    assert len(mine) == 2 * len(strategy.members) + len(head_names(BASE))
    for name, tensor in mine.items():
        mean = sum(w * tensors[name].double() for w, (_, tensors) in zip(weights, replies, strict=True))
        assert torch.allclose(tensor.double(), torch.as_tensor(mean), atol=1e-7), name


SPREAD: dict[str, Any] = {
    "warmup_rounds": 0,
    "largest": 0.5,
    "deadline": 1.0,
}  # in the first of two rounds every ratio is allowed


def nobody_after_round_one(message: Message, received: int) -> Fault | None:
    return Fault(drop=True) if message.metadata.group_id != "1" else None


def test_heads_are_averaged_by_samples_and_factors_by_what_is_left_of_the_model() -> None:
    replies: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    strategy, reports = train(
        2, app=kept_replies(make_app(), replies), faults=nobody_after_round_one, aggregation="masked_mean", **SPREAD
    )
    samples = torch.tensor([20, 24, 28], dtype=torch.float64)
    for name in head_names(BASE):
        mean = torch.stack([tensors[f"head.{name}"].double() for _, tensors in replies])
        assert torch.allclose(strategy.state.head[name].double(), torch.tensordot(samples / 72, mean, 1), atol=1e-7)
    left = torch.tensor([1 - row.sparsity for row in reports[0].devices], dtype=torch.float64)
    assert len(set(left.tolist())) > 1
    weights = samples * left
    path = strategy.members[0].path  # rows of A are whole in a map cut by rows: only ranks differ
    total, weight = torch.zeros(8, 32, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64)
    for w, (config, tensors) in zip(weights, replies, strict=True):
        assert tensors[f"{path}.lora_A.weight"].shape == (config["rank"], 32)
        total[: config["rank"]] += w * tensors[f"{path}.lora_A.weight"].double()
        weight[: config["rank"]] += w
    held = weight[:, 0] > 0
    found = strategy.state.adapter[path].a.double()
    assert torch.allclose(found[held], (total / weight)[held], atol=1e-6)


def test_the_order_of_replies_and_of_nodes_changes_nothing() -> None:
    class Shuffled(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            return list(super().send_and_receive(messages, timeout=timeout))[::-1]

    plain, _ = train(4)
    swapped, _ = train(4, grid=Shuffled(make_app(), DEVICES))
    assert same_state(plain, swapped)
    places = [{"partition-id": place} for place in (2, 0, 1)]
    moved, reports = train(4, grid=LocalGrid(make_app(), DEVICES, node_configs=places))
    assert [row.device for row in reports[0].devices] == ["device-0", "device-1", "device-2"]
    assert same_bits(bits(plain)[0], bits(moved)[0])
    assert bits(plain)[1]["devices"] == bits(moved)[1]["devices"]


@pytest.mark.parametrize(
    "settings", [{}, {"aggregation": "stacking", "importance": "own", "play": None}, {"choice": "fixed"}]
)
def test_resume_ends_with_the_bits_of_an_uninterrupted_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The second grid is new: nothing is left of what the devices kept in their contexts."""
    settings = {name: value for name, value in settings.items() if value is not None}
    whole, told = train(4, **settings)

    folder = RunFolder.create(tmp_path / "run", "seed: 3\n")
    first = make_strategy(4, **settings)
    first.observers.append(Recorder(folder, first.snapshot))
    first.observers.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.start(LocalGrid(make_app(), DEVICES), num_rounds=4)

    kept = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert kept is not None
    assert kept.server_round == 2
    second = make_strategy(4, **settings)
    second.restore(kept.weights, kept.record)
    reports: list[RoundReport] = []
    second.observers.append(reports.append)
    second.start(LocalGrid(make_app(), DEVICES, run_id=77), num_rounds=4)
    assert same_state(whole, second)
    assert [report.server_round for report in reports] == [3, 4]
    assert [report.devices for report in reports] == [report.devices for report in told[2:]]


def interrupt(report: RoundReport) -> None:
    if report.server_round == 2:
        raise KeyboardInterrupt


def missing_between(first: int, last: int, node: int = 2) -> Any:
    def faults(message: Message, received: int) -> Fault | None:
        gone = message.metadata.dst_node_id == node and first <= int(message.metadata.group_id) <= last
        return Fault(drop=True) if gone else None

    return faults


def test_a_device_that_misses_rounds_loses_nothing_and_catches_up() -> None:
    strategy, reports = train(10, faults=missing_between(2, 4))
    assert participation(strategy) == [10, 7, 10]
    for report in reports[1:4]:
        assert [row.device for row in report.devices] == ["device-0", "device-2"]
        (absent,) = report.absent
        assert absent.device == "device-1"
        assert absent.why == "no answer within 3600 s"
    assert not any(report.absent for report in [reports[0], *reports[4:]])
    known = strategy.state.devices["device-1"]
    assert known.steps == 7 * 2
    assert sparsity(known.plan, strategy.sizes) == pytest.approx(0.5, abs=0.02)
    # in the round after, its plan is cut from where it stood, and its loss counts from there
    assert reports[4].devices[1].sparsity > reports[0].devices[1].sparsity == 0
    assert reports[3].devices[0].sparsity > 0.2


def fail(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    raise RuntimeError("out of memory")


def refuse(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["refused"] = "the battery is low"


def poison(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)][0, 0] = float("nan")


def forget(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del config["loss_after"]


def repeat(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["round"] -= 1


def nobody(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["samples"] = 0


def hide(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors.clear()


BAD = [
    (fail, "out of memory"),
    (refuse, "the battery is low"),
    (poison, "numbers that are not all finite"),
    (forget, "loss_after is None; a number of at least 0 and below 1e+12 is due"),
    (repeat, "it answers round"),
    (nobody, "0 samples; at least 1 is due"),
    (hide, "is nothing; floating numbers"),
]


@pytest.mark.parametrize(("change", "why"), BAD)
def test_a_bad_reply_costs_its_device_the_round_and_nobody_else(
    change: Any, why: str, warned: pytest.LogCaptureFixture
) -> None:
    strategy, reports = train(2, app=tampered(make_app(), change, node=1))
    for report in reports:
        (absent,) = report.absent
        assert absent.device == "device-1"
        assert why in absent.why
        assert "\n" not in absent.why
        assert [row.device for row in report.devices] == ["device-0", "device-2"]
    lines = {text for record in warned.records if "does not count" in (text := record.getMessage())}
    assert sorted(line.split(":")[0] for line in lines) == ["round 1", "round 2"]
    assert participation(strategy) == [2, 0, 2]
    lost = strategy.state.devices["device-1"]
    assert (lost.plan, lost.steps, lost.loss, lost.agent.history) == (strategy.plan, 0, None, [])
    assert all(tensor.isfinite().all() for tensor in strategy.snapshot()[0].values())
    assert reports[0].up_bytes < reports[0].down_bytes  # only replies that count


def test_a_bad_reply_is_as_if_the_device_had_been_silent() -> None:
    bad, _ = train(3, app=tampered(make_app(), poison, node=1))
    silent, _ = train(3, faults=lambda m, _: Fault(drop=True) if is_training(m, 2) else None)
    assert same_state(bad, silent)


def is_training(message: Message, node: int) -> bool:
    return message.metadata.message_type == "train.fedspine" and message.metadata.dst_node_id == node


def test_a_run_among_random_faults_ends_whole() -> None:
    strategy, reports = train(6, faults=random_faults(4, drop=0.2, error=0.2))
    assert sum(len(report.absent) for report in reports) > 3
    assert strategy.state.server_round == 6
    assert all(tensor.isfinite().all() for tensor in strategy.snapshot()[0].values())
    for report in reports:
        together = [row.device for row in report.devices] + [absent.device for absent in report.absent]
        assert len(set(together)) == len(together)


def test_three_rounds_without_a_reply_are_one_line() -> None:
    def from_round_two(message: Message, received: int) -> Fault | None:
        return Fault(error="asleep") if int(message.metadata.group_id) >= 2 else None

    with pytest.raises(TrainingError) as caught:
        train(9, faults=from_round_two)
    words = "no device finished any of rounds 2 to 4; the last was device-2: Flower's error"
    assert str(caught.value).startswith(words)
    assert "asleep" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_rounds_without_a_reply_are_none() -> None:
    def two_at_a_time(message: Message, received: int) -> Fault | None:
        return Fault(drop=True) if message.metadata.group_id in ("2", "3", "5", "6") else None

    strategy, reports = train(7, faults=two_at_a_time, tau=1)
    assert [len(report.devices) for report in reports] == [3, 0, 0, 3, 0, 0, 3]
    assert [len(report.absent) for report in reports] == [0, 3, 3, 0, 3, 3, 0]
    assert reports[1].waiting_s == 0
    assert reports[1].up_bytes == 0
    assert strategy.state.server_round == 7


def test_settings_that_no_model_can_have_are_one_line() -> None:
    config = make_config("bert")
    with pytest.raises(ConfigError, match=r"^ranks=4 40 are not allowed; the narrowest layer has a width of 32$"):
        make_strategy(ranks="4 40")
    assert make_strategy(ranks="4 32").config.max_rank == 32
    for ranks in ("0", "0 4", "8 4", "", "4 x", "-1 2"):
        with pytest.raises(ConfigError, match=r"ranks=") as caught:
            make_strategy(ranks=ranks)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"fixed_rank=9 is above the largest of ranks=2 4 8$"):
        make_strategy(choice="fixed", fixed_rank=9)
    with pytest.raises(ConfigError, match="tau=0 is not allowed"):
        make_strategy(tau=0)
    with pytest.raises(ConfigError, match=r"cannot prune the architecture 'gpt2'; known are bert, distilbert, llama"):
        FedSpine(transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))
    config.num_hidden_layers = 0
    with pytest.raises(ConfigError, match="has no prunable unit"):
        FedSpine(transformers.BertForSequenceClassification(config))


def test_the_base_may_be_on_the_meta_device() -> None:
    with torch.device("meta"):
        empty = transformers.BertForSequenceClassification(BASE.config)
    for name in head_names(BASE):
        owner, _, own = name.rpartition(".")
        setattr(empty.get_submodule(owner), own, torch.nn.Parameter(BASE.get_parameter(name).detach().clone()))
    whole, _ = train(2)
    strategy = FedSpine(empty, whole.config, rounds=2, seed=3, virtual=True, observers=[lambda report: None])
    strategy.start(LocalGrid(make_app(), DEVICES), num_rounds=2)
    assert same_state(whole, strategy)


def test_a_device_with_another_base_takes_no_part(warned: pytest.LogCaptureFixture) -> None:
    work = [workload(0), workload(1, base_digest="other"), workload(2)]
    strategy, reports = train(2, app=make_app(work), base_digest="tiny")
    assert list(strategy.state.devices) == ["device-0", "device-2"]
    assert all([row.device for row in report.devices] == ["device-0", "device-2"] for report in reports)
    (line,) = {text for record in warned.records if "take no part" in (text := record.getMessage())}
    assert line == "1 of 3 devices take no part: its base model has other weights than the server's"
    with pytest.raises(TrainingError, match="no device can take part: its base model has other weights"):
        train(1, app=make_app(work), base_digest="a third")


def test_a_device_without_samples_takes_no_part(warned: pytest.LogCaptureFixture) -> None:
    _, reports = train(1, app=make_app([workload(0), workload(1, samples=0), workload(2)]))
    assert [row.device for row in reports[0].devices] == ["device-0", "device-2"]
    assert "1 of 3 devices take no part: 0 samples; at least 1 is due" in warned.text


def test_a_description_without_samples_is_one_line(warned: pytest.LogCaptureFixture) -> None:
    app = tampered(make_app(), lambda config, _: config.pop("samples"), node=1, action="query.fedspine_describe")
    _, reports = train(1, app=app)
    assert len(reports[0].devices) == 2
    assert "take no part: samples is None; a number of at least 0" in warned.text


@pytest.mark.parametrize("aggregation", ["masked_mean", "flexlora", "rank_partitioned", "stacking"])
def test_every_rule_trains_at_every_sparsity(aggregation: str) -> None:
    strategy, reports = train(4, aggregation=aggregation, warmup_rounds=0)
    assert not any(report.absent for report in reports)
    assert all(factors.a.isfinite().all() for factors in strategy.state.adapter.values())
    moved = [factors.b.abs().sum() > 0 for factors in strategy.state.adapter.values()]
    assert all(moved)
    ranks = {factors.rank for factors in strategy.state.adapter.values()}
    assert ranks == {8} or (aggregation == "stacking" and min(ranks) > 8)
    assert {factors.rank for factors in strategy.factors_to_send().values()} == {8}


def test_a_stack_does_not_grow_from_round_to_round() -> None:
    """Rows that all devices have cut keep what the devices started from, not the stack of all rounds before."""
    strategy, reports = train(6, aggregation="stacking", warmup_rounds=0, target=0.4)
    ranks = sum(device.rank for device in reports[-1].devices)
    assert all(factors.rank <= ranks + strategy.config.max_rank for factors in strategy.state.adapter.values())


def test_weightings_differ() -> None:
    def weighted(weighting: str) -> Factors:
        strategy, _ = train(
            2, weighting=weighting, aggregation="masked_mean", faults=nobody_after_round_one, tau=1, **SPREAD
        )
        return strategy.state.adapter[strategy.members[0].path]

    found = [weighted(rule).b for rule in ("samples", "sparsity", "rank", "norm")]
    assert all(not torch.equal(one, other) for n, one in enumerate(found) for other in found[:n])


def test_nobody_chooses_with_a_fixed_choice() -> None:
    strategy, reports = train(6, choice="fixed", fixed_rank=4)
    assert {row.rank for report in reports for row in report.devices} == {4}
    assert {row.sparsity for row in reports[-1].devices} == {reports[-1].devices[0].sparsity}
    assert all(not device.agent.history for device in strategy.state.devices.values())
    assert all(
        "even steps, one rank" in row.why and row.cells == 4 for report in reports for row in report.devices
    )  # the bandits learn nothing


def test_bandits_learn_what_was_played() -> None:
    strategy, reports = train(4)
    for device in strategy.state.devices.values():
        assert len(device.agent.history) == 4
    for n, name in enumerate(strategy.state.devices):
        played = [(report.devices[n].ratio, report.devices[n].rank, report.devices[n].reward) for report in reports]
        history = strategy.state.devices[name].agent.history
        assert [(pull.arm.ratio, pull.arm.rank, pull.reward) for pull in history] == played


def test_a_reward_counts_from_the_loss_after_the_round_before() -> None:
    replies: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    strategy, reports = train(2, app=kept_replies(make_app(), replies), **SPREAD)
    for number, report in enumerate(reports):
        told = [config for config, _ in replies[DEVICES * number : DEVICES * (number + 1)]]
        start = [row.loss_after for row in reports[0].devices] if number else [each["loss_before"] for each in told]
        before = [row.sparsity for row in reports[0].devices] if number else [0.0] * DEVICES
        drop = loss_drop(start, [each["loss_after"] for each in told])
        progress = pruning_progress(before, [row.sparsity for row in report.devices], 0.5)
        could = ["rank only" not in row.why for row in report.devices]
        expected = rewards(
            strategy.config.reward, drop, progress, [each["update_importance"] for each in told],
            [row.busy_s for row in report.devices], could,
        )  # fmt: skip
        assert [row.reward for row in report.devices] == pytest.approx(expected.tolist())


def test_what_is_sent_does_not_depend_on_the_order_of_the_maps() -> None:
    """Fresh directions are drawn, and a checkpoint sorts the maps by name."""
    found = []
    for turned in (False, True):
        strategy = make_strategy()
        wide = {
            path: Factors(torch.ones(12, f.a.shape[1]), torch.zeros(len(f.b), 12))
            for path, f in strategy.state.adapter.items()
        }
        strategy.state.adapter = dict(reversed(wide.items())) if turned else wide
        found.append(strategy.factors_to_send())
    assert found[0].keys() == found[1].keys()
    for path, factors in found[0].items():
        assert factors.rank == 8
        assert torch.equal(factors.a, found[1][path].a)


def test_flowers_own_loop_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps are inside configure and aggregate, so Flower's start does what ours does."""
    ours, _ = train(2)
    strategy = make_strategy(2)
    result = Strategy.start(strategy, LocalGrid(make_app(), DEVICES), strategy.arrays(), num_rounds=2)
    assert same_state(ours, strategy)
    assert same_bits(unpack(result.arrays[PACKED]), unpack(ours.arrays()[PACKED]))
    assert float(str(result.train_metrics_clientapp[2]["loss"])) > 0
    again = make_strategy(3)
    Strategy.start(again, LocalGrid(tampered(make_app(), fail, node=1), DEVICES), again.arrays(), num_rounds=3)
    assert participation(again) == [3, 0, 3]
    assert [absent.device for absent in again._absent] == ["device-1"]


def test_training_starts_from_what_it_is_given() -> None:
    first, _ = train(1)
    given = first.arrays()
    second = make_strategy(1)
    seen: list[dict[str, Tensor]] = []
    app = make_app()

    def spy(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.fedspine":
            seen.append(tensors_of(message))
        return app(message, context)

    second.start(LocalGrid(spy, DEVICES), given, num_rounds=1)  # type: ignore[arg-type]
    tensors = unpack(given[PACKED])
    name = "head.classifier.weight"
    assert torch.equal(seen[0][name], tensors[name])
    with pytest.raises(ConfigError, match=r"^initial_arrays do not fit: \S+ must be of shape \(8, 32\)$"):
        make_strategy(1).start(LocalGrid(app, DEVICES), ArrayRecord({PACKED: pack({})}), num_rounds=1)


def test_bytes_are_those_of_the_tensors_on_their_way() -> None:
    """Against the tensors themselves, and against the spec's formula."""
    seen: list[tuple[int, int, int]] = []
    app = make_app()

    def weigh(tensors: dict[str, Tensor]) -> int:
        return sum(len(tensor.numpy().tobytes()) for tensor in tensors.values())

    def scale(message: Message, context: Context) -> Message:
        down = weigh(tensors_of(message))
        reply: Message = app(message, context)
        if message.metadata.message_type == "train.fedspine":
            seen.append((down, weigh(tensors_of(reply)), int(message.metadata.group_id)))
        return reply

    strategy, reports = train(4, app=scale, target=0.4)
    for report in reports:
        assert report.down_bytes == sum(down for down, _, at in seen if at == report.server_round)
        assert report.up_bytes == sum(up for _, up, at in seen if at == report.server_round)
    assert strategy.state.traffic.down_bytes == sum(down for down, _, _ in seen)
    assert strategy.state.traffic.up_bytes == sum(up for _, up, _ in seen)
    head = sum(parameter.numel() for parameter in strategy.state.head.values())
    last = 0
    for row in reports[-1].devices:
        plan = strategy.state.devices[row.device].plan
        widths = 0
        for layer in plan.layers:
            rows, channels = 8 * len(layer.heads), len(layer.channels)
            widths += 4 * (rows + 32) + 2 * (channels + 32)
        last += 4 * (row.rank * widths + head)
    assert reports[-1].down_bytes == last


def test_the_virtual_clock_adds_up_the_slowest_of_each_round() -> None:
    strategy, reports = train(3)
    now_s = 0.0
    for report in reports:
        busy = [row.compute_s + row.transfer_s for row in report.devices]
        now_s += max(busy)
        assert report.virtual_s == pytest.approx(now_s)
        assert report.waiting_s == pytest.approx(float(waiting_time(busy)))
    assert strategy.state.clock.now_s == pytest.approx(now_s)
    total = sum(row.transfer_s for row in reports[0].devices)
    assert total == pytest.approx(8 * (reports[0].up_bytes + reports[0].down_bytes) / 1e7)


class SlowLinks(LocalGrid):
    """A grid that sees when replies arrive, as ResidentGrid does; each node's way takes so many seconds more."""

    way_s = 0.25

    def turnaround_s(self, reply: Message) -> float:
        return float(config_of(reply)["handled_s"]) + self.way_s * reply.metadata.src_node_id


@pytest.mark.parametrize("virtual", [False, True])
def test_transfer_is_measured_where_the_grid_sees_arrivals(virtual: bool) -> None:
    work = [workload(n) if virtual else workload(n, costs=None) for n in range(DEVICES)]
    _, reports = train(1, grid=SlowLinks(make_app(work), DEVICES), virtual=virtual)
    for n, row in enumerate(reports[0].devices, 1):
        assert row.compute_s > 0
        assert (row.transfer_s == pytest.approx(0.25 * n)) is not virtual
    assert (reports[0].virtual_s is None) is not virtual


def test_without_profiles_transfer_counts_as_free() -> None:
    work = [workload(n, costs=None) for n in range(DEVICES)]
    _, reports = train(1, app=make_app(work), virtual=False)
    assert all(row.transfer_s == 0 and row.compute_s > 0 for row in reports[0].devices)


def test_what_is_tested_enters_the_report() -> None:
    strategy = make_strategy(2)
    reports: list[RoundReport] = []
    strategy.observers.append(reports.append)
    shapes: list[int] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> Any:
        shapes.append(len(unpack(arrays[PACKED])))
        return MetricRecord({"accuracy": 0.5 + server_round / 10, "loss": 1.0, "sparsity": 0.2})

    result = strategy.start(LocalGrid(make_app(), DEVICES), num_rounds=2, evaluate_fn=evaluate)
    assert [(r.test_accuracy, r.test_loss, r.test_sparsity) for r in reports] == [(0.6, 1.0, 0.2), (0.7, 1.0, 0.2)]
    assert shapes == [len(strategy.members) * 2 + len(head_names(BASE))] * 2
    assert sorted(result.train_metrics_clientapp) == sorted(result.evaluate_metrics_serverapp) == [1, 2]


def test_a_language_model_trains_without_a_head() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        base = transformers.AutoModelForCausalLM.from_config(make_config("qwen2"))  # type: ignore[no-untyped-call]

    def rows(device: int) -> Any:
        data = make_dataset(device)
        return data.remove_columns("labels").add_column("labels", data["input_ids"])

    work = [workload(n, base=lambda: copy.deepcopy(base), dataset=rows(n)) for n in range(DEVICES)]
    config = FedSpineConfig(ranks="2 4", tau=3, batch_size=8, learning_rate=1e-2)
    config.schedule.largest = 0.3
    reports: list[RoundReport] = []
    strategy = FedSpine(base, config, seed=3, virtual=True, observers=[reports.append])
    strategy.start(LocalGrid(make_app(work), DEVICES), num_rounds=5)
    assert strategy.state.head == {}
    assert not any(report.absent for report in reports)
    assert reports[-1].devices[0].loss_after < reports[0].devices[0].loss_before
    assert reports[-1].devices[0].sparsity > 0.3


def test_the_client_stands_beside_other_handlers() -> None:
    app = make_app()

    @app.train()
    def own(message: Message, context: Context) -> Message:
        return Message(make_content({"mine": True}), reply_to=message)

    grid = LocalGrid(app, 1)
    (reply,) = grid.send_and_receive([Message(make_content({}), 1, "train")])
    assert config_of(reply) == {"mine": True}
    strategy = make_strategy(1)
    assert strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), grid) == []
    strategy.aggregate_evaluate(1, [])
