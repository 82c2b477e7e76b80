"""ResidentGrid as a Flower grid, with clients in threads of this process."""

from __future__ import annotations

import logging
import random
import secrets
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp as StockClientApp
from flwr.serverapp import Grid
from flwr.serverapp import ServerApp as StockServerApp
from flwr.serverapp.strategy import FedAvg

from fl_edge.errors import ConfigError
from fl_edge.link import LocalGrid
from fl_edge.link.certificates import make_certificates
from fl_edge.link.flower import identify_process
from fl_edge.link.resident import ClientApp, LinkConfig, ResidentGrid, ServerApp
from fl_edge.link.resident.config import TLS
from fl_edge.link.resident.serverapp import resident_where_possible
from fl_edge.link.resident.staying import stays
from tests.flower_stub import FlowerStub, ThreadFlower

identify_process(1)
BARRIER_S = 20


def double(message: Message, context: Context) -> Message:
    """Return twice the arrays, and count calls in the context."""
    calls = context.state.config_records.setdefault("calls", ConfigRecord({"count": 0}))
    count = calls["count"] = int(calls["count"]) + 1  # type: ignore[arg-type]
    content = RecordDict({"metrics": MetricRecord({"num-examples": context.node_id, "count": count})})
    for name, record in message.content.array_records.items():
        content[name] = ArrayRecord({key: Array(2 * array.numpy()) for key, array in record.items()})
    return Message(content, reply_to=message)


def make_app(kind: type[StockClientApp] = ClientApp, **settings: Any) -> StockClientApp:
    app = kind(**settings)
    app.train()(double)
    app.evaluate()(double)
    return app


def ask(node: int, value: float = 1.0, message_type: str = "train", **settings: Any) -> Message:
    content = RecordDict({"arrays": ArrayRecord({"x": Array(np.full(4, value, np.float32))})})
    return Message(content, node, message_type, **settings)


def reason(reply: Message) -> str:
    return reply.error.reason or ""


def value_of(reply: Message) -> float:
    return float(reply.content.array_records["arrays"]["x"].numpy()[0])


@pytest.fixture
def flower() -> Iterator[ThreadFlower]:
    made = ThreadFlower(make_app(), 3)
    yield made
    made.join()


def test_first_message_invites_and_later_ones_do_not(flower: ThreadFlower) -> None:
    with ResidentGrid(flower) as grid:
        assert list(grid.get_node_ids()) == [1, 2, 3]
        for value in (1.0, 2.0, 3.0):
            replies = grid.send_and_receive([ask(node, value * node) for node in (3, 1, 2)], timeout=BARRIER_S)
            assert [reply.metadata.src_node_id for reply in replies] == [3, 1, 2]  # the order of the messages
            assert [value_of(reply) for reply in replies] == [2 * value * node for node in (3, 1, 2)]
    assert [message.metadata.message_type for message in flower.delivered] == ["query.fl_edge_stay"] * 3
    flower.join()
    # the context that Flower gets back is the one that the handlers changed
    assert [context.state.config_records["calls"]["count"] for context in flower.contexts.values()] == [3, 3, 3]


def test_replies_carry_what_flower_puts_in(flower: ThreadFlower) -> None:
    with ResidentGrid(flower) as grid:
        message = ask(2, message_type="evaluate", group_id="7", ttl=100.0)
        (reply,) = grid.send_and_receive([message], timeout=BARRIER_S)
        asked, meta = message.metadata, reply.metadata
        assert meta.reply_to_message_id == asked.message_id != ""
        assert (meta.src_node_id, meta.dst_node_id, meta.run_id) == (2, asked.src_node_id, asked.run_id)
        assert (meta.group_id, meta.message_type) == ("7", "evaluate")
        assert meta.message_id not in ("", asked.message_id)
        assert 0 < meta.ttl <= 100
        assert 0 < grid.turnaround_s(reply) < BARRIER_S


def test_push_and_pull(flower: ThreadFlower) -> None:
    with ResidentGrid(flower) as grid:
        ids = grid.push_messages(ask(node) for node in (1, 2))  # a generator, which Flower's own grid would lose
        assert len(set(ids)) == 2
        arrived: list[Message] = []
        waited = threading.Event()
        while len(arrived) < 2:
            arrived += grid.pull_messages(ids[len(arrived) :] if len(arrived) == 0 else open_ids(ids, arrived))
            waited.wait(0.01)
        assert {reply.metadata.reply_to_message_id for reply in arrived} == set(ids)
        (again,) = grid.pull_messages(ids[:1])
        assert again.error.code == 3
        assert "pulled" in reason(again)


def open_ids(ids: list[str], arrived: list[Message]) -> list[str]:
    return [each for each in ids if each not in {reply.metadata.reply_to_message_id for reply in arrived}]


def test_a_handler_that_raises_answers_with_flowers_error_and_stays() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if value_of(message) < 0:
            raise ValueError("below zero")
        return double(message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return "not a message"  # type: ignore[return-value]

    flower = ThreadFlower(app, 1)
    with ResidentGrid(flower) as grid:
        (bad,) = grid.send_and_receive([ask(1, -1.0)], timeout=BARRIER_S)
        assert (bad.error.code, bad.metadata.src_node_id) == (2, 1)
        assert "below zero" in reason(bad)
        (odd,) = grid.send_and_receive([ask(1, message_type="query")], timeout=BARRIER_S)
        assert "returned str, not a Message" in reason(odd)
        (unknown,) = grid.send_and_receive([ask(1, message_type="query.nothing")], timeout=BARRIER_S)
        assert "No query function registered" in reason(unknown)
        (good,) = grid.send_and_receive([ask(1)], timeout=BARRIER_S)
        assert value_of(good) == 2.0
    assert len(flower.delivered) == 1
    flower.join()


def test_mods_lifespan_and_stays_are_as_for_any_message() -> None:
    seen: list[str] = []

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        seen.append("mod")
        return call_next(message, context)  # type: ignore[no-any-return]

    app = make_app(mods=[mod])

    @app.query()
    def query(message: Message, context: Context) -> Message:
        seen.append(f"stays {stays()}")
        return Message(RecordDict(), reply_to=message)

    @app.lifespan()
    def lifespan(context: Context) -> Iterator[None]:
        seen.append("begin")
        yield
        seen.append("end")

    flower = ThreadFlower(app, 1)
    with ResidentGrid(flower) as grid:
        grid.send_and_receive([ask(1)], timeout=BARRIER_S)
        grid.send_and_receive([ask(1, message_type="query")], timeout=BARRIER_S)
    flower.join()
    assert seen == ["begin", "mod", "end", "begin", "mod", "stays True", "end"]
    assert not stays()


def test_fedavg_has_the_bits_of_a_local_grid() -> None:
    start = ArrayRecord({"x": Array(np.linspace(0.1, 1, 50, dtype=np.float32))})
    random.seed(0)  # FedAvg draws the order of nodes
    local = FedAvg().start(LocalGrid(make_app(StockClientApp), 5), start, num_rounds=3)
    flower = ThreadFlower(make_app(), 5)
    with ResidentGrid(flower) as grid:
        random.seed(0)
        resident = FedAvg().start(grid, start, num_rounds=3)
    flower.join()
    assert resident.arrays["x"].data == local.arrays["x"].data
    assert resident.train_metrics_clientapp == local.train_metrics_clientapp


def test_a_client_app_that_does_not_stay_is_named(caplog: pytest.LogCaptureFixture) -> None:
    flower = ThreadFlower(make_app(StockClientApp), 1)
    with ResidentGrid(flower) as grid:
        (reply,) = grid.send_and_receive([ask(1)], timeout=BARRIER_S)
    assert reply.error.code == 5
    assert "build it with ClientApp of fl_edge.link.resident" in reason(reply)
    flower.join()


def test_what_flower_says_of_a_node_becomes_its_error_reply(flower: ThreadFlower) -> None:
    with ResidentGrid(flower) as grid:
        good, bad = grid.send_and_receive([ask(1), ask(99)], timeout=BARRIER_S)
        assert value_of(good) == 2.0
        assert bad.error.code == 5
        assert "no such node" in reason(bad)


def test_invalid_messages_are_refused_before_anything_is_sent(flower: ThreadFlower) -> None:
    with ResidentGrid(flower, config=LinkConfig(max_message_mib=1)) as grid:
        error = Message(Error(0, "x"), reply_to=ask(1))
        big = Message(RecordDict({"arrays": ArrayRecord({"x": Array(np.zeros(300_000, np.float32))})}), 1, "train")
        for wrong, words in ((error, "Invalid message"), (big, "max_message_mib")):
            with pytest.raises(ValueError, match=words):
                grid.send_and_receive([ask(1), wrong], timeout=BARRIER_S)
        assert not flower.delivered
        (reply,) = grid.send_and_receive([ask(1)], timeout=BARRIER_S)
        assert reply.content.metric_records["metrics"]["count"] == 1
    with pytest.raises(ValueError, match="closed"):
        grid.push_messages([ask(1)])


def test_a_reply_that_is_too_long_is_an_error_reply() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = RecordDict({"arrays": ArrayRecord({"x": Array(np.zeros(300_000, np.float32))})})
        return Message(content, reply_to=message)

    flower = ThreadFlower(app, 1)
    with ResidentGrid(flower, config=LinkConfig(max_message_mib=1)) as grid:
        (reply,) = grid.send_and_receive([ask(1)], timeout=BARRIER_S)
        assert "max_message_mib" in reason(reply)
    flower.join()


def test_more_nodes_than_allowed(flower: ThreadFlower) -> None:
    with ResidentGrid(flower, config=LinkConfig(max_nodes=2)) as grid:
        with pytest.raises(ConfigError, match="max_nodes"):
            grid.push_messages([ask(1), ask(2), ask(3)])
        assert len(grid.send_and_receive([ask(1), ask(2)], timeout=BARRIER_S)) == 2


@pytest.mark.parametrize("scheme", ["bf16", "int8"])
def test_compression_is_agreed_on_by_the_invitation(flower: ThreadFlower, scheme: str) -> None:
    with ResidentGrid(flower, config=LinkConfig(compression=scheme)) as grid:
        values = np.linspace(-1, 1, 4096, dtype=np.float32)
        content = RecordDict({"arrays": ArrayRecord({"x": Array(values)})})
        (reply,) = grid.send_and_receive([Message(content, 1, "train")], timeout=BARRIER_S)
        received = reply.content.array_records["arrays"]["x"].numpy()
        assert received.dtype == np.float32
        error = np.abs(received - 2 * values).max()
        assert 0 < error < 0.03


def test_tls_works_and_is_asked_for(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flower = ThreadFlower(make_app(), 1)
    monkeypatch.setattr(flower, "_insecure", False)
    with pytest.raises(ConfigError, match="FL_EDGE_LINK_CERTIFICATE"):
        ResidentGrid(flower)
    files = [tmp_path / name for name in ("ca.pem", "server.pem", "server.key")]
    make_certificates(*files)
    authority, certificate, key = files
    with ResidentGrid(flower, tls=TLS.from_files(certificate, key, authority)) as grid:
        (reply,) = grid.send_and_receive([ask(1)], timeout=BARRIER_S)
        assert value_of(reply) == 2.0
    flower.join()
    for name, file in (("CERTIFICATE", certificate), ("KEY", key), ("CA", authority)):
        monkeypatch.setenv(f"FL_EDGE_LINK_{name}", str(file))
    with ResidentGrid(flower) as grid:
        assert value_of(grid.send_and_receive([ask(1)], timeout=BARRIER_S)[0]) == 2.0
    flower.join()


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(**settings: Any) -> str:
        with ResidentGrid(FlowerStub(1), **settings) as grid:
            return grid.address

    assert address().startswith("127.0.0.1:")
    assert address(advertise="jetson-server:9443") == "jetson-server:9443"
    assert address(listen="0.0.0.0:0", advertise="server").startswith("server:")
    assert address(listen="[::1]:0").startswith("[::1]:")
    assert address(advertise="[2001:db8::1]:9443") == "[2001:db8::1]:9443"
    with pytest.raises(ConfigError, match="advertise"):
        address(listen="0.0.0.0:0")
    monkeypatch.setenv("FL_EDGE_LINK_LISTEN", "0.0.0.0:0")
    monkeypatch.setenv("FL_EDGE_LINK_ADVERTISE", "from-environment:1")
    assert address() == "from-environment:1"
    with pytest.raises(ConfigError, match="cannot listen"):
        address(listen="nonsense")


def test_no_token_is_logged(
    flower: ThreadFlower, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    issued: list[bytes] = []
    make = secrets.token_bytes

    def issue(size: int) -> bytes:
        issued.append(make(size))
        return issued[-1]

    monkeypatch.setattr(secrets, "token_bytes", issue)
    with caplog.at_level(logging.DEBUG), ResidentGrid(flower) as grid:
        grid.send_and_receive([ask(1), ask(2)], timeout=BARRIER_S)
    assert len(issued) >= 4  # for each node the first, and the one for its next connection
    for token in issued:
        assert repr(token)[2:-1] not in caplog.text
        assert token.hex() not in caplog.text


def test_server_app_opens_and_closes_with_its_lifespan(flower: ThreadFlower) -> None:
    app = ServerApp(config=LinkConfig(grace_s=1.0))
    grids: list[Grid] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        grids.append(grid)
        (reply,) = grid.send_and_receive([ask(1)], timeout=BARRIER_S)
        assert value_of(reply) == 2.0
        if context.run_config.get("fail"):
            raise RuntimeError("on request")

    app(flower, Context(1, 0, {}, RecordDict(), {}))
    flower.join()  # the client was let go
    with pytest.raises(RuntimeError, match="on request"):
        app(flower, Context(1, 0, {}, RecordDict(), {"fail": True}))
    flower.join()
    for grid in grids:
        assert isinstance(grid, ResidentGrid)
        with pytest.raises(ValueError, match="closed"):
            grid.push_messages([ask(1)])


def test_a_grid_without_superlink_is_left_as_it_is() -> None:
    local = LocalGrid(make_app(), 1)
    with resident_where_possible(local) as grid:
        assert grid is local
    assert issubclass(ServerApp, StockServerApp)
    assert issubclass(ClientApp, StockClientApp)
