"""The strategy and the client together, on a LocalGrid: faults, resume, refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_edge.checkpoints import load_checkpoint
from fl_edge.clients.cache import WeightCache
from fl_edge.clients.mergesfl import MergeSFLClient, Workload
from fl_edge.edge.config import EdgeConfig
from fl_edge.errors import ConfigError, TrainingError
from fl_edge.link import Fault, LocalGrid
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.mergesfl.report import RoundReport
from fl_edge.observers import Recorder
from fl_edge.runs import RunFolder
from fl_edge.strategies.mergesfl import MergeSFL
from tests.tiny import FEATURES, make_app, make_model, make_strategy, same_bits, train, workload

Handler = Callable[[Message, Context], Message]


def tampered(
    app: Handler, action: str, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], node: int = 0
) -> Handler:
    """A ClientApp of which one node changes what it answers to one kind of message."""

    def call(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type != action or int(context.node_config["partition-id"]) != node:
            return reply
        config, tensors = config_of(reply), tensors_of(reply)
        change(config, tensors)
        return Message(make_content(config, tensors), reply_to=message)

    return call


def run(app: Any, rounds: int = 2, **settings: Any) -> tuple[MergeSFL, list[RoundReport]]:
    strategy = make_strategy(selection="all", **settings)
    reports: list[RoundReport] = []
    strategy.observers.append(reports.append)
    strategy.start(LocalGrid(app, 4), num_rounds=rounds)
    return strategy, reports


def poison(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["features"][0, 0] = float("nan")


def reshape(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["features"] = tensors["features"][:, :2].contiguous()


def misorder(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["tag"] = "1/7/device-0"


def silence(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors["features"]


@pytest.mark.parametrize(
    ("change", "why"),
    [(poison, "not all finite"), (reshape, "shape"), (misorder, "batch 1/7/device-0"), (silence, "no tensor features")],
)
def test_a_bad_reply_costs_its_device_the_round_and_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, why: str
) -> None:
    with caplog.at_level(logging.WARNING, "flwr"):
        logging.getLogger("flwr").addHandler(caplog.handler)
        strategy, reports = run(tampered(make_app(tmp_path), "train.mergesfl_step", change))
        logging.getLogger("flwr").removeHandler(caplog.handler)
    for report in reports:
        (lost,) = report.lost
        assert (lost.device, lost.step) == ("device-0", 1)
        assert why in lost.why
        assert report.aborted == 0
    lines = [record.getMessage() for record in caplog.records if "left at iteration" in record.getMessage()]
    assert len(lines) >= 2
    assert all("\n" not in line for line in lines)
    assert strategy.state.devices["device-0"].participation == 0
    assert strategy.state.devices["device-1"].participation == 2
    assert all(weight.isfinite().all() for weight in strategy.model.state_dict().values())


def test_abort_makes_no_top_update_in_the_iteration_that_lost_a_worker(tmp_path: Path) -> None:
    _, dropped = run(tampered(make_app(tmp_path / "a"), "train.mergesfl_step", poison), lost="drop", rounds=1)
    _, aborted = run(tampered(make_app(tmp_path / "b"), "train.mergesfl_step", poison), lost="abort", rounds=1)
    assert (dropped[0].aborted, aborted[0].aborted) == (0, 1)
    assert dropped[0].train_loss != aborted[0].train_loss


@pytest.mark.parametrize(("lost", "aborted"), [("drop", 0), ("abort", 1)])
def test_a_device_that_falls_silent_counts_as_lost_in_that_iteration(tmp_path: Path, lost: str, aborted: int) -> None:
    def faults(message: Message, received: int) -> Fault | None:  # the first step, which the third node does not answer
        return Fault(drop=True) if message.metadata.dst_node_id == 3 and received == 2 else None

    strategy = make_strategy(selection="all", lost=lost)
    reports: list[RoundReport] = []
    strategy.observers.append(reports.append)
    strategy.start(LocalGrid(make_app(tmp_path), 4, faults=faults), num_rounds=1)
    assert [(each.device, each.step) for each in reports[0].lost] == [("device-2", 1)]
    assert reports[0].aborted == aborted


def test_a_poisoned_bottom_is_not_averaged(tmp_path: Path) -> None:
    def ruin(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for weight in tensors.values():
            weight.fill_(float("inf"))

    strategy, _ = run(tampered(make_app(tmp_path), "train.mergesfl_end", ruin))
    assert all(weight.isfinite().all() for weight in strategy.model.state_dict().values())
    assert strategy.state.devices["device-0"].participation == 0


def test_a_late_gradient_is_refused_by_the_device(tmp_path: Path) -> None:
    """The server's answers are swapped: the device that gets another batch's gradient does not apply it."""
    app = make_app(tmp_path)

    def swapping(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.mergesfl_step":
            config = {**config_of(message), "tag": "1/0/device-9"}
            message = _with_content(message, make_content(config, tensors_of(message)))
        return app(message, context)

    with pytest.raises(TrainingError, match="got the gradient of batch 1/0/device-9"):
        run(swapping, rounds=5)


def _with_content(message: Message, content: RecordDict) -> Message:
    message.content = content
    return message


def test_lost_devices_come_back_and_lose_nothing(tmp_path: Path) -> None:
    def faults(message: Message, received: int) -> Fault | None:
        dropped = message.metadata.dst_node_id == 2 and message.metadata.group_id == "2"
        return Fault(drop=True) if dropped else None

    strategy = train(tmp_path, rounds=3, faults=faults, selection="all")
    assert [strategy.state.devices[f"device-{i}"].participation for i in range(4)] == [3, 2, 3, 3]


def test_three_rounds_without_a_single_bottom_end_the_run_in_one_line(tmp_path: Path) -> None:
    def faults(message: Message, received: int) -> Fault | None:
        return Fault(error="out of memory") if message.metadata.message_type.startswith("train") else None

    with pytest.raises(TrainingError, match=r"rounds 1 to 3.*out of memory"):
        train(tmp_path, rounds=9, faults=faults)


def test_too_few_devices_is_one_line(tmp_path: Path) -> None:
    strategy = make_strategy(devices=9)
    strategy.patience_s = 0.1
    with pytest.raises(TrainingError, match="9 devices are asked for and 4 connected"):
        strategy.start(LocalGrid(make_app(tmp_path), 4), num_rounds=1)


def test_more_workers_than_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"min_workers=6.*at most 4"):
        train(tmp_path, min_workers=6)


def test_two_nodes_of_one_name_do_not_both_train(tmp_path: Path) -> None:
    app = ClientApp()
    model = make_model()

    def load(context: Context) -> Workload:
        return workload(int(context.node_config["partition-id"]) % 3, model)

    MergeSFLClient(load, cache=WeightCache(tmp_path)).register(app)
    _, reports = run(app, rounds=1)
    assert reports[0].devices == ["device-0", "device-1", "device-2"]


def test_diverging_training_ends_in_one_line(tmp_path: Path) -> None:
    def explode(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["features"].fill_(3e38)  # finite, but no sum of two of them is

    with pytest.raises(TrainingError, match=r"round 1, iteration 1: the loss is (nan|inf).*smaller learning_rate"):
        run(tampered(make_app(tmp_path), "train.mergesfl_step", explode))


def test_settings_out_of_range_are_refused_by_the_strategy_itself() -> None:
    with pytest.raises(ConfigError, match="tau=0 is not allowed"):
        make_strategy(tau=0)


def test_weights_that_left_the_cache_cost_one_round(tmp_path: Path) -> None:
    inner = make_app(tmp_path, keep_live=0)

    def forgetful(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.mergesfl_end" and context.node_id == 1:
            for file in tmp_path.rglob("1.safetensors"):
                file.write_bytes(b"other weights")
        return inner(message, context)

    strategy, reports = run(forgetful, rounds=1)
    assert "not those it kept" in reports[0].lost[0].why
    assert strategy.state.devices["device-1"].participation == 1


@pytest.mark.parametrize("settings", [{}, {"unselected": "probe"}, {"aggregation": "uniform", "scale": "none"}])
def test_resume_ends_with_the_bits_of_an_uninterrupted_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = train(tmp_path / "cache", rounds=5, **settings)

    folder = RunFolder.create(tmp_path / "run", "seed: 3\n")
    first = make_strategy(**settings)
    first.observers.append(Recorder(folder, first.snapshot))
    first.start(LocalGrid(make_app(tmp_path / "cache"), 4), num_rounds=2)

    kept = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert kept is not None
    second = make_strategy(**settings)
    second.restore(kept.weights, kept.record)
    reopened = RunFolder.reopen(tmp_path / "run", kept.server_round, "seed: 3\n")
    second.observers.append(Recorder(reopened, second.snapshot))
    second.start(LocalGrid(make_app(tmp_path / "cache"), 4, run_id=77), num_rounds=5)

    assert same_bits(whole.model.state_dict(), second.model.state_dict())
    assert whole.snapshot()[1] == second.snapshot()[1]
    assert [record["server_round"] for record in reopened.rounds] == [1, 2, 3, 4, 5]


def test_impossible_costs_at_the_end_of_a_round_leave_a_bottom_out_of_the_mean(tmp_path: Path) -> None:
    def lie(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["compute_s"] = float("nan")

    strategy, reports = run(tampered(make_app(tmp_path), "train.mergesfl_end", lie))
    assert len(reports) == 2
    assert strategy.state.devices["device-0"].participation == 0
    assert strategy.state.devices["device-1"].participation == 2


@pytest.mark.parametrize("cost", [float("nan"), -1.0, float("inf")])
def test_impossible_costs_keep_a_device_out(tmp_path: Path, cost: float) -> None:
    def lie(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["compute_s"] = cost

    _, reports = run(tampered(make_app(tmp_path), "query.mergesfl_describe", lie), rounds=1)
    assert reports[0].devices == ["device-1", "device-2", "device-3"]


def test_clock_waiting_and_estimates_follow_the_formulas(tmp_path: Path) -> None:
    """Costs are workload()'s: mu_i = i + 1 ms, beta_i = 2 ms, and 0.1 ms more of each a round."""
    strategy, reports = run(make_app(tmp_path), rounds=2)
    now_s, feature_bytes = 0.0, 4 * FEATURES
    bottom_bytes = 4 * sum(weight.numel() for weight in strategy.model.bottom.state_dict().values())
    for server_round, report in enumerate(reports, 1):
        beta = 0.002 + 0.0001 * server_round
        cost = [0.001 * (int(name[-1]) + 1 + 0.1 * server_round) + beta for name in report.devices]
        own = [size * seconds for size, seconds in zip(report.batch_sizes, cost, strict=True)]
        iteration = max(own) + strategy.edge.top_s_per_sample * sum(report.batch_sizes)
        assert report.iteration_s == pytest.approx(own)
        assert report.waiting_s == pytest.approx(3 * sum(max(own) - each for each in own) / 4)  # eq. 8
        now_s += 3 * iteration + bottom_bytes * beta / feature_bytes  # down and up at 2 c / beta bytes a second
        assert report.virtual_s == pytest.approx(now_s)
    # described and measured in round 1, measured in round 2
    assert strategy.state.devices["device-2"].transfer_s == pytest.approx(0.8 * 0.0021 + 0.2 * 0.0022)
    assert strategy.state.devices["device-2"].compute_s == pytest.approx(0.8 * 0.0031 + 0.2 * 0.0032)


@pytest.mark.parametrize("aggregation", ["batch", "uniform"])
def test_bottoms_are_weighted_as_the_setting_says(tmp_path: Path, aggregation: str) -> None:
    bottoms: list[dict[str, torch.Tensor]] = []

    def keep(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        bottoms.append(dict(tensors))

    app: Handler = make_app(tmp_path)
    for node in range(4):
        app = tampered(app, "train.mergesfl_end", keep, node)
    strategy, reports = run(app, rounds=1, aggregation=aggregation)
    sizes = reports[0].batch_sizes
    assert len(set(sizes)) > 1
    weights = torch.tensor(sizes if aggregation == "batch" else [1] * 4, dtype=torch.float64)
    for name, weight in strategy.model.bottom.state_dict().items():
        stacked = torch.stack([bottom[name].double() for bottom in bottoms])
        mean = torch.tensordot(weights / weights.sum(), stacked, dims=1)
        assert torch.allclose(weight.double(), mean, atol=1e-7), name


def test_two_processes_that_take_turns_train_to_the_same_bits(tmp_path: Path) -> None:
    """As Ray's actors do: each holds a graph that is one message old when it is asked again."""
    apps = [make_app(tmp_path / "shared", rich=True) for _ in range(2)]
    served = {"messages": 0}

    def either(message: Message, context: Context) -> Message:
        served["messages"] += 1
        return apps[served["messages"] * 7 // 3 % 2](message, context)

    strategy = make_strategy(rich=True)
    strategy.start(LocalGrid(cast("ClientApp", either), 4), num_rounds=3)
    assert same_bits(strategy.model.state_dict(), train(tmp_path / "own", rounds=3, rich=True).model.state_dict())


def test_stock_handlers_live_beside_ours(tmp_path: Path) -> None:
    app = make_app(tmp_path)

    @app.train()
    def own(message: Message, context: Context) -> Message:
        return Message(make_content({"mine": True}), reply_to=message)

    grid = LocalGrid(app, 1)
    (reply,) = grid.send_and_receive([Message(make_content({}), 1, "train")])
    assert config_of(reply) == {"mine": True}


def test_measured_time_replaces_profiles_where_a_workload_has_none(tmp_path: Path) -> None:
    app = ClientApp()
    model = make_model()

    def load(context: Context) -> Workload:
        return Workload(**{**vars(workload(int(context.node_config["partition-id"]), model)), "costs": None})

    MergeSFLClient(load, cache=WeightCache(tmp_path)).register(app)
    strategy, reports = run(app, rounds=2)
    assert all(seconds > 0 for report in reports for seconds in report.iteration_s)
    assert all(device.compute_s > 0 and device.transfer_s == 0 for device in strategy.state.devices.values())


class SlowLinks(LocalGrid):
    """A grid that sees when replies arrive, as ResidentGrid does; each node's way takes so many seconds more."""

    way_s = 0.25

    def turnaround_s(self, reply: Message) -> float:
        return float(config_of(reply)["handled_s"]) + self.way_s * reply.metadata.src_node_id


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_transfer_is_measured_where_the_grid_sees_arrivals(tmp_path: Path, clock: str) -> None:
    model = make_model(seed=99)

    def load(context: Context) -> Workload:
        played = workload(int(context.node_config["partition-id"]), model)
        return replace(played, costs=None) if clock == "real" else played

    app = ClientApp()
    MergeSFLClient(load, cache=WeightCache(tmp_path)).register(app)
    strategy = make_strategy(selection="all", batches="equal")
    strategy.edge = EdgeConfig(clock=clock, count_bottom_transfer=False)
    reports: list[RoundReport] = []
    strategy.observers.append(reports.append)
    strategy.start(SlowLinks(app, 4), num_rounds=1)
    for index, size in enumerate(reports[0].batch_sizes):
        measured = strategy.state.devices[f"device-{index}"].transfer_s
        assert measured == pytest.approx(0.25 * (index + 1) / size if clock == "real" else 0.0021)
