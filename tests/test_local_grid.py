from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fl_edge.errors import ConfigError
from fl_edge.link import Fault, LocalGrid, random_faults

app = ClientApp()


def within(carrier: Message | Context) -> Any:
    """Return the records of a message or a node's state, untyped: Flower declares a union of three records."""
    return carrier.content if isinstance(carrier, Message) else carrier.state


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move halfway to the node's own target, which is its partition id."""
    target = float(context.node_config["partition-id"])
    weights = within(message)["arrays"]["w"].numpy()
    calls = int(within(context)["calls"]["n"]) if "calls" in context.state else 0
    context.state["calls"] = MetricRecord({"n": calls + 1})
    content: dict[str, Any] = {
        "arrays": ArrayRecord({"w": Array(weights + 0.5 * (target - weights))}),
        "metrics": MetricRecord({"num-examples": 1, "calls": calls + 1}),
    }
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    loss = float(abs(within(message)["arrays"]["w"].numpy() - context.node_config["partition-id"]).sum())
    return Message(RecordDict({"m": MetricRecord({"num-examples": 1, "loss": loss})}), reply_to=message)


@app.query("echo")
def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


@app.query("vandal")
def vandal(message: Message, context: Context) -> Message:
    """Edit everything that was received, and keep hold of what is sent back."""
    assert list(within(message)["config"]["list"]) == [1, 2]
    within(message)["arrays"]["w"].data = b"broken"
    within(message)["arrays"]["extra"] = Array(np.zeros(1))
    within(message)["config"]["list"].append(3)
    within(message)["config"]["x"] = -1
    reply = Message(message.content, reply_to=message)
    context.state["kept"] = within(message)["config"]
    return reply


@app.query("fail")
def fail(message: Message, context: Context) -> Message:
    raise RuntimeError("sensor\nunplugged")


@app.query("nothing")
def nothing(message: Message, context: Context) -> Message:
    return None  # type: ignore[return-value]


@app.query("stray")
def stray(message: Message, context: Context) -> Message:
    return Message(RecordDict(), 1, "query")


@app.query("refuse")
def refuse(message: Message, context: Context) -> Message:
    return Message(Error(7, "no"), reply_to=message)


def records() -> RecordDict:
    arrays = ArrayRecord({"w": Array(np.arange(3.0))})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"x": 1, "list": [1, 2]})})


def ask(action: str, *nodes: int) -> list[Message]:
    """Build one message a node, all of which share one RecordDict, as FedAvg does."""
    shared = records()
    return [Message(shared, node, f"query.{action}") for node in nodes]


def run_fedavg(grid: Grid, rounds: int = 6, timeout: float = 3600) -> tuple[Any, dict[int, MetricRecord]]:
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0)
    result = strategy.start(grid, ArrayRecord({"w": Array(np.zeros(1))}), num_rounds=rounds, timeout=timeout)
    return result.arrays["w"].numpy(), result.train_metrics_clientapp


def test_stock_fedavg_trains_and_contexts_persist() -> None:
    grid = LocalGrid(app, 4)
    weights, metrics = run_fedavg(grid)
    assert weights == pytest.approx(1.5, abs=0.05)  # the mean of the targets 0..3
    assert metrics[6]["calls"] == 6
    assert [within(grid.contexts[node])["calls"]["n"] for node in grid.get_node_ids()] == [6] * 4
    assert np.array_equal(weights, run_fedavg(LocalGrid(app, 4))[0])


def test_a_server_app_runs_on_it() -> None:
    server = ServerApp()
    seen: dict[str, Any] = {}

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seen["weights"] = run_fedavg(grid)[0]

    server(LocalGrid(app, 2), Context(1, 0, {}, RecordDict(), {}))
    assert seen["weights"] == pytest.approx(0.5, abs=0.05)


def test_node_and_run_configuration() -> None:
    default = LocalGrid(app, 2, run_config={"lr": 0.1}, run_id=7)
    assert default.contexts[2].node_config == {"partition-id": 1, "num-partitions": 2}
    assert (default.contexts[1].run_id, default.contexts[1].node_id) == (7, 1)
    default.contexts[1].run_config["lr"] = 1.0
    assert default.contexts[2].run_config == {"lr": 0.1}
    assert (default.run.run_id, dict(default.run.override_config)) == (7, {"lr": 0.1})
    given = LocalGrid(app, 2, node_configs=[{"device-id": "a"}, {"partition-id": 5}])
    assert given.contexts[1].node_config == {"partition-id": 0, "num-partitions": 2, "device-id": "a"}
    assert given.contexts[2].node_config["partition-id"] == 5
    with pytest.raises(ConfigError, match="num_nodes"):
        LocalGrid(app, 0)
    with pytest.raises(ConfigError, match="node_configs"):
        LocalGrid(app, 2, node_configs=[{}])


def test_metadata_is_as_in_flower() -> None:
    grid = LocalGrid(app, 3, run_id=9)
    messages = [Message(records(), node, "query.echo", group_id="4") for node in (3, 1)]
    ids = grid.push_messages(messages)
    replies = grid.pull_messages(ids)
    assert [message.metadata.message_id for message in messages] == ids
    assert len(set(ids)) == 2
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    assert [(reply.metadata.src_node_id, reply.metadata.dst_node_id) for reply in replies] == [(3, 0), (1, 0)]
    assert {(r.metadata.run_id, r.metadata.group_id, r.metadata.message_type) for r in replies} == {
        (9, "4", "query.echo")
    }
    assert all(reply.metadata.message_id not in ("", *ids) for reply in replies)
    assert [node.node_id for node in grid.get_nodes()] == [1, 2, 3]


def test_receivers_own_their_records_but_array_bytes_are_shared() -> None:
    grid = LocalGrid(app, 3)
    messages = ask("vandal", 1, 2, 3)
    content = within(messages[0])
    replies = grid.send_and_receive(messages)
    assert all(reply.has_content() for reply in replies)  # each node found the list as it was sent
    assert list(content["arrays"]) == ["w"]
    assert content["config"] == ConfigRecord({"x": 1, "list": [1, 2]})
    assert np.array_equal(content["arrays"]["w"].numpy(), np.arange(3.0))
    within(replies[0])["config"]["list"].append(9)
    assert within(grid.contexts[1])["kept"]["list"] == [1, 2, 3]
    sent = ask("echo", 1)
    (echoed,) = grid.send_and_receive(sent)
    assert within(echoed)["arrays"]["w"] is not within(sent[0])["arrays"]["w"]
    assert within(echoed)["arrays"]["w"].data is within(sent[0])["arrays"]["w"].data


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("fail", "RuntimeError: sensor"),
        ("nothing", "TypeError: the handler returned NoneType, not a Message"),
        ("stray", "ValueError: the handler's message is no reply: build it with Message(content, reply_to=message)"),
        ("absent", "ValueError: No query function registered with name 'absent'"),
    ],
)
def test_a_failing_handler_answers_with_an_error_and_the_grid_lives_on(action: str, reason: str) -> None:
    grid = LocalGrid(app, 2)
    (reply,) = grid.send_and_receive(ask(action, 2))
    assert (reply.error.code, reply.error.reason) == (2, reason)
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (2, 0)
    (reply,) = grid.send_and_receive(ask("echo", 2))
    assert reply.has_content()


def test_a_client_may_answer_with_an_error_of_its_own() -> None:
    (reply,) = LocalGrid(app, 1).send_and_receive(ask("refuse", 1))
    assert reply.error == Error(7, "no")


def test_an_unknown_node_is_an_error_reply_like_a_lost_one() -> None:
    grid = LocalGrid(app, 2)
    replies = grid.send_and_receive(ask("echo", 1, 99))
    assert replies[0].has_content()
    assert (replies[1].error.code, replies[1].error.reason) == (5, "node 99 does not exist: the nodes are 1 to 2")


def test_messages_may_come_from_a_generator() -> None:
    def messages() -> Iterator[Message]:
        shared = records()
        for node in (1, 2):
            shared.config_records["config"]["x"] = node  # the next message is built from the same, edited record
            yield Message(shared, node, "query.echo")

    replies = LocalGrid(app, 2).send_and_receive(messages())
    assert [within(reply)["config"]["x"] for reply in replies] == [1, 2]


def test_what_flower_would_not_send_is_refused() -> None:
    grid = LocalGrid(app, 1)
    (message,) = ask("echo", 1)
    (reply,) = grid.send_and_receive([message])
    with pytest.raises(ValueError, match="Invalid message"):
        grid.push_messages([reply])
    expired = Message(records(), 1, "query.echo", ttl=-1.0)
    with pytest.raises(ValueError, match="Invalid message"):
        grid.push_messages([expired])


def test_replies_are_pulled_once() -> None:
    grid = LocalGrid(app, 1)
    ids = grid.push_messages(ask("echo", 1))
    assert [reply.has_content() for reply in grid.pull_messages(ids)] == [True]
    (gone,) = grid.pull_messages(ids)
    assert (gone.error.code, gone.metadata.reply_to_message_id) == (3, ids[0])


def slow(message: Message, count: int) -> Fault:
    return Fault(delay_s=float(message.metadata.dst_node_id))


def nodes_of(replies: list[Message]) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def test_delays_are_virtual_and_late_replies_can_be_pulled_later() -> None:
    grid = LocalGrid(app, 4, faults=slow)
    messages = ask("echo", 4, 3, 2, 1)
    assert nodes_of(grid.send_and_receive(messages, timeout=3)) == [1, 2]  # 3 s is too late for a time-out of 3 s
    assert grid.now_s == 3
    ids = [message.metadata.message_id for message in messages[:2]]
    assert nodes_of(grid.pull_messages(ids)) == [3]
    assert nodes_of(grid.pull_messages(ids[:1])) == []
    for _ in range(10):  # polling moves the clock, so that a strategy's own loop ends
        late = grid.pull_messages(ids[:1])
        if late:
            break
    assert nodes_of(late) == [4]
    assert nodes_of(grid.send_and_receive(ask("echo", 4, 1))) == [1, 4]
    assert grid.now_s == pytest.approx(8.1, abs=0.11)


def test_a_time_out_of_zero_collects_nothing() -> None:
    grid = LocalGrid(app, 1)
    messages = ask("echo", 1)
    assert grid.send_and_receive(messages, timeout=0) == []
    assert len(grid.pull_messages([messages[0].metadata.message_id])) == 1


def test_a_lost_node_is_missing_before_the_heartbeat_lapses_and_an_error_after() -> None:
    calls: list[int] = []

    def lost(message: Message, count: int) -> Fault | None:
        calls.append(count)
        return Fault(drop=True) if message.metadata.dst_node_id == 2 else None

    grid = LocalGrid(app, 2, faults=lost)
    assert nodes_of(grid.send_and_receive(ask("echo", 1, 2), timeout=10)) == [1]
    replies = grid.send_and_receive(ask("echo", 1, 2))
    assert [reply.has_error() for reply in replies] == [False, True]
    assert (replies[1].error.code, replies[1].metadata.src_node_id) == (5, 0)  # Flower names no node here
    assert grid.now_s == 70
    assert calls == [0, 0, 1, 1]


def test_fedavg_goes_on_through_faults() -> None:
    def faults(message: Message, count: int) -> Fault | None:
        return {2: Fault(error="on request"), 3: Fault(drop=True), 4: Fault(delay_s=99)}.get(
            message.metadata.dst_node_id
        )

    grid = LocalGrid(app, 5, faults=faults)
    weights, metrics = run_fedavg(grid, timeout=30)
    assert weights == pytest.approx(2.0, abs=0.1)  # nodes 1 and 5, targets 0 and 4
    assert "calls" not in grid.contexts[2].state
    assert "calls" in grid.contexts[4].state
    assert len(metrics) == 6


def test_random_faults_depend_on_seed_node_and_count_alone() -> None:
    (message, other) = ask("echo", 1, 2)
    strike = random_faults(3, drop=0.3, error=0.3, max_delay_s=5.0)
    forward = [strike(message, count) for count in range(200)]
    again = [random_faults(3, drop=0.3, error=0.3, max_delay_s=5.0)(message, count) for count in reversed(range(200))]
    assert forward == again[::-1]
    assert forward != [strike(other, count) for count in range(200)]
    struck = [fault for fault in forward if fault]
    assert sum(fault.drop for fault in struck) / 200 == pytest.approx(0.3, abs=0.1)
    assert sum(fault.error is not None for fault in struck) / 200 == pytest.approx(0.3, abs=0.1)
    assert all(0 <= fault.delay_s < 5 for fault in struck)


def test_faults_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="delay_s"):
        Fault(delay_s=float("inf"))
    with pytest.raises(ConfigError, match="drop, error"):
        random_faults(0, drop=0.7, error=0.7)
    with pytest.raises(ConfigError, match="delay_s"):
        random_faults(0, max_delay_s=-1)
    with pytest.raises(ValueError, match="go back"):
        LocalGrid(app, 1).advance(-1)


@pytest.mark.parametrize(
    "values",
    [np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.array(3), np.zeros(0)],
)
def test_delivered_arrays_behave_like_flowers(values: Any) -> None:
    sent = Message(RecordDict({"arrays": ArrayRecord({"w": Array(values)})}), 1, "query.echo")
    (reply,) = LocalGrid(app, 1).send_and_receive([sent])
    original, array = within(sent)["arrays"]["w"], within(reply)["arrays"]["w"]
    assert array == original
    assert original == array
    assert array.object_id == original.object_id
    decoded = array.numpy()
    assert (decoded.dtype, decoded.shape) == (values.dtype, values.shape)
    assert np.array_equal(decoded, values)
    for clone in (copy.deepcopy(array), pickle.loads(pickle.dumps(array))):
        assert type(clone) is Array
        assert clone == original
    decoded[...] = 7  # writable, and a copy
    assert np.array_equal(array.numpy(), values)
    array.data = Array(np.ones(2)).data[:-1]
    assert array != original
    with pytest.raises(ValueError, match=r"reshape|EOF"):
        array.numpy()
    array.stype = "safetensors"
    with pytest.raises(TypeError, match="safetensors"):
        array.numpy()
