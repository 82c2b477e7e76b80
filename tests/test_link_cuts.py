"""Sessions over a network that breaks, and between devices and servers that are slow."""

from __future__ import annotations

import gc
import random
import threading

import grpc
import psutil
import pytest

from fl_edge.link.resident.client import LinkClient
from fl_edge.link.resident.config import TLS, LinkConfig
from fl_edge.link.resident.frames import read_frame
from tests.link_site import (
    A_MOMENT_S,
    MIB,
    PATIENCE_S,
    Proxy,
    Raw,
    Site,
    admitted,
    credentials,
    data_frame,
    echo,
    eventually,
    has,
    has_another,
    why,
)

pytestmark = pytest.mark.usefixtures("in_time", "impatient", "no_thread_is_left")

# --- a network that breaks ---


def numbered(prefix: bytes, count: int) -> list[bytes]:
    source = random.Random(count)
    return [b"%s %d " % (prefix, number) + source.randbytes(source.choice([1, 50, 5_000])) for number in range(count)]


def test_nothing_is_lost_and_nothing_comes_twice_over_many_cuts(security: TLS | None) -> None:
    source = random.Random(7)
    down, up = numbered(b"down", 200), numbered(b"up", 200)
    config = LinkConfig(frame_kib=1, grace_s=60.0)
    with Site(config, security) as site, Proxy(site.server.port) as proxy:
        client = site.client(1, address=proxy.address)
        received: list[bytes] = []
        taker = threading.Thread(target=lambda: received.extend(b"".join(chunks) for chunks in client.messages()))
        taker.start()
        cuts = sorted(source.sample(range(200), 10))
        for number in range(200):
            site.server.send(1, [down[number]])
            client.send([up[number]])
            if number in cuts:
                another = has_another(proxy)
                if source.random() < 0.5:  # in the middle of things; else when all has arrived
                    eventually(lambda: site.server.state(1) == "connected")
                else:
                    eventually(has(site.messages[1], number + 1))
                proxy.cut()
                eventually(another)
        eventually(lambda: len(received) >= 200 and len(site.messages[1]) >= 200)
        site.server.release(1, "done")
        taker.join(PATIENCE_S)
        assert received == down
        assert site.messages[1] == up
        assert proxy.connections >= 10
        assert site.ended == []


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_long_message_goes_on_where_it_was_cut(direction: str) -> None:
    content = random.Random(3).randbytes(20 * MIB)
    index = int(direction == "down")
    with Site() as site, Proxy(site.server.port) as proxy:
        client = site.connected(1, address=proxy.address)
        if direction == "down":
            site.server.send(1, [content])
        else:
            client.send([content])
        eventually(lambda: proxy.passed[index] > 12 * MIB)
        proxy.cut()
        if direction == "down":
            assert b"".join(next(client.messages())) == content
        else:
            eventually(lambda: site.messages[1])
            assert site.messages[1] == [content]
        assert proxy.connections > 1
        assert len(content) <= sum(proxy.passed) < 1.5 * len(content)


def test_a_silent_network_is_noticed_and_the_session_goes_on() -> None:
    config = LinkConfig(heartbeat_s=0.3, grace_s=60.0)
    with Site(config) as site, Proxy(site.server.port) as proxy, echo(site.connected(1, address=proxy.address)):
        site.server.send(1, [b"before"])
        eventually(lambda: site.messages[1] == [b"before"])
        proxy.swallow = True
        site.server.send(1, [b"during"])
        eventually(lambda: site.server.state(1) == "cut")  # without a word from the network
        proxy.swallow = False
        proxy.cut()
        site.server.send(1, [b"after"])
        eventually(lambda: site.messages[1] == [b"before", b"during", b"after"])
        assert site.ended == []


def test_heartbeats_keep_an_idle_connection() -> None:
    """Pings that come too often make gRPC hang up; and a peer that does not say a word is not dead."""
    config = LinkConfig(heartbeat_s=0.1, grace_s=60.0)
    with Site(config) as site, Proxy(site.server.port) as proxy, echo(site.connected(1, address=proxy.address)):
        threading.Event().wait(3.0)
        site.server.send(1, [b"hello"])
        eventually(lambda: site.messages[1])
        assert proxy.connections == 1


@pytest.mark.parametrize("how", ["closed", "silent"])
def test_a_cut_longer_than_the_grace_ends_the_session_at_both_ends(how: str) -> None:
    config = LinkConfig(heartbeat_s=0.3, grace_s=0.5)
    with Site(config) as site, Proxy(site.server.port) as proxy:
        client = site.connected(1, address=proxy.address)
        site.server.send(1, [b"never read"])
        eventually(lambda: client._arrived)
        proxy.refuse, proxy.swallow = how == "closed", how == "silent"
        if how == "closed":
            proxy.cut()
        eventually(lambda: site.ended)
        assert [b"".join(chunks) for chunks in client.messages()] == [b"never read"]
        assert client.reason.startswith(f"no connection to {proxy.address} for 0.5 s")
        assert site.server.state(1) == "absent"
        assert site.ended == [(1, "no connection for 0.5 s")]


def test_a_client_that_comes_back_after_the_grace_is_refused() -> None:
    config = LinkConfig(grace_s=0.3)
    with Site(config) as site, Proxy(site.server.port) as proxy:
        client = site.connected(1, address=proxy.address, grace_s=60.0)
        proxy.refuse = True
        proxy.cut()
        eventually(lambda: site.ended)
        proxy.refuse = False
        assert why(client) == f"the server at {proxy.address} refused this client"
        assert len(site.ended) == 1


def test_a_server_that_is_gone_is_named() -> None:
    with Site(LinkConfig(grace_s=0.5)) as site:
        invitation = site.invitation(1)
    client = LinkClient(invitation)
    assert why(client).startswith(f"no connection to {invitation.address} for 0.5 s: ")
    assert "onnect" in client.reason.partition(" s: ")[2]


def test_many_reconnections_leave_no_thread_and_little_memory() -> None:
    config = LinkConfig(grace_s=3600.0)
    process = psutil.Process()
    with Site(config) as site, Proxy(site.server.port) as proxy, echo(site.connected(1, address=proxy.address)):
        for number in range(60):
            if number == 20:
                eventually(lambda: site.server.state(1) == "connected")
                threads, memory = threading.active_count(), process.memory_info().rss
            another = has_another(proxy)
            proxy.cut()
            eventually(another)
            site.server.send(1, [b"%d" % number])
            eventually(has(site.messages[1], number + 1))
            proxy._threads = [thread for thread in proxy._threads if thread.is_alive()]
        eventually(lambda: threading.active_count() <= threads + 2)
        assert process.memory_info().rss < memory + 30 * MIB


# --- devices and servers that are slow ---


class Gate:
    """Holds up what a node sent until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = 0
        self.inside = 0
        self.most = 0

    def __call__(self, node: int, content: bytes) -> None:
        self.entered += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.open.wait(PATIENCE_S)
        self.inside -= 1


def test_messages_of_a_node_are_taken_in_one_at_a_time_and_in_order_over_reconnections() -> None:
    gate = Gate()
    messages = [b"%d" % number for number in range(20)]
    with Site(LinkConfig(grace_s=60.0), on_message=gate) as site, Proxy(site.server.port) as proxy:
        client = site.connected(1, address=proxy.address)
        for message in messages:
            client.send([message])
        eventually(lambda: gate.entered)
        for _ in range(5):
            another = has_another(proxy)
            proxy.cut()
            eventually(another)
            eventually(lambda: site.server.state(1) == "connected")
        readers = [thread for thread in threading.enumerate() if thread.name == "fl_edge-read-1"]
        assert len(readers) <= 7
        eventually(lambda: sum(thread.is_alive() for thread in readers) <= 2)  # the one inside, and the newest
        threading.Event().wait(A_MOMENT_S)
        assert gate.entered == 1
        gate.open.set()
        eventually(lambda: len(site.messages[1]) == 20)
        assert site.messages[1] == messages
        assert gate.most == 1


@pytest.mark.parametrize("how", ["expel", "release", "close", "admit"])
def test_what_was_on_its_way_when_its_session_ended_is_dropped(how: str) -> None:
    with Site() as site, admitted(site, 1):
        session = site.server._sessions[1]
        end = getattr(site.server, how)
        if how == "admit":
            end(1)
        elif how == "close":
            end("enough", 0.0)
        else:
            end(1, "enough")
        site.server._receive(session, 1, read_frame(data_frame(1, b"late")))
        assert site.messages[1] == []


def test_an_end_that_comes_too_late_is_none() -> None:
    """A timer that fired, or a reader that gave up, just when the node came back or another session began."""
    with Site() as site:
        token = site.server.admit(1)
        for _ in range(2):
            with Raw(site.server.port, credentials(1, token)) as raw:
                token = raw.welcome()
                session = site.server._sessions[1]
                site.server._expire(session, session.connections, "it is there")
            eventually(lambda: site.server.state(1) == "cut")
        site.server._expire(session, 1, "it has been back since")
        assert site.server.state(1) == "cut"
        site.server.admit(1)
        site.server._end(session, "that was another one")
        assert site.server.state(1) == "invited"
        assert site.ended == []


@pytest.mark.parametrize("how", ["expel", "release", "close"])
def test_a_session_ends_while_a_message_of_it_is_being_taken_in(how: str) -> None:
    gate = Gate()
    with Site(on_message=gate) as site:
        client = site.connected(1)
        for number in range(3):
            client.send([b"%d" % number])
        eventually(lambda: gate.entered)
        getattr(site.server, how)(*(() if how == "close" else (1,)), "enough")
        assert why(client) == "enough"
        gate.open.set()
        eventually(lambda: not gate.inside)
        threading.Event().wait(A_MOMENT_S)
        assert site.messages[1] == [b"0"]  # the rest came from a node that was no longer there
        assert site.ended == ([(1, "enough")] if how == "expel" else [])


def test_a_client_that_takes_nothing_is_not_sent_everything() -> None:
    content = bytes(MIB)
    with Site() as site, Proxy(site.server.port) as proxy:
        client = site.connected(1, address=proxy.address)
        for _ in range(200):
            site.server.send(1, [content])
        eventually(lambda: len(client._arrived) == 16)
        threading.Event().wait(A_MOMENT_S)
        assert proxy.passed[1] < 100 * MIB  # gRPC and the kernel hold some tens more
        assert len(client._arrived) == 16
        assert sum(1 for _ in zip(range(200), client.messages(), strict=False)) == 200


@pytest.mark.parametrize("how", ["close", "release"])
def test_a_client_whose_consumer_is_gone_can_leave(how: str) -> None:
    """Its queue is full, and the farewell of the server stands behind."""
    with Site() as site:
        client = site.connected(1)
        for _ in range(40):
            site.server.send(1, [b"x"])
        eventually(lambda: len(client._arrived) == 16)
        if how == "release":
            site.server.release(1, "thank you")
        client.send([b"last words"])
        client.close("its handler failed", PATIENCE_S)
        assert client.reason == "its handler failed"
        if how == "close":
            assert site.messages[1] == [b"last words"]
            assert site.ended == [(1, "the node left: its handler failed")]


def test_a_client_that_leaves_while_it_is_cut_comes_back_to_say_so() -> None:
    with Site(LinkConfig(grace_s=60.0)) as site, Proxy(site.server.port) as proxy:
        client = site.connected(1, address=proxy.address)
        proxy.refuse = True
        proxy.cut()
        eventually(lambda: site.server.state(1) == "cut")
        client.send([b"last words"])
        leaving = threading.Thread(target=client.close, args=("battery low", PATIENCE_S))
        leaving.start()
        threading.Event().wait(A_MOMENT_S)
        assert leaving.is_alive()
        proxy.refuse = False
        leaving.join(PATIENCE_S)
        assert not leaving.is_alive()
        assert site.messages[1] == [b"last words"]
        assert site.ended == [(1, "the node left: battery low")]


@pytest.mark.parametrize("how", ["refused", "swallowed", "nobody"])
def test_a_client_can_leave_while_it_tries_to_connect(how: str) -> None:
    with Site(LinkConfig(grace_s=600.0)) as site, Proxy(site.server.port) as proxy:
        proxy.refuse, proxy.swallow = how == "refused", how == "swallowed"
        address = proxy.address if how != "nobody" else "127.0.0.1:1"
        client = site.client(1, address=address)
        if how != "nobody":
            eventually(lambda: proxy.connections)
        client.close("changed its mind", 0.05)
        assert why(client) == "changed its mind"
        assert site.server.state(1) == "invited"


def test_leaving_twice_and_after_the_end_is_nothing() -> None:
    with Site() as site:
        client = site.connected(1)
        site.server.release(1, "thank you")
        assert why(client) == "thank you"
        client.close("late")
        client.close("later")
        assert client.reason == "thank you"
        client.send([b"to nobody"])


# --- what is left behind ---


def test_no_call_is_left_to_the_garbage_collector() -> None:
    """It takes a lock when it goes, and at the end of a process that may be held by a thread that was stopped there."""

    def calls() -> int:
        return sum(issubclass(type(each), grpc.Call) for each in gc.get_objects())  # `isinstance` asks the object

    gc.collect()
    gc.disable()
    try:
        before = calls()
        with Site() as site, Proxy(site.server.port) as proxy:
            clients = [site.connected(node, address=proxy.address) for node in (1, 2)]
            another = has_another(proxy)
            proxy.cut()
            eventually(another)
            eventually(lambda: [session.connections for session in site.server._sessions.values()] == [2, 2])
            site.server.release(1, "thank you")
            assert why(clients[0]) == "thank you"
            clients[1].close("enough")
            assert why(site.client(3, b"wrong")).endswith("refused this client")
        eventually(lambda: calls() == before)
    finally:
        gc.enable()
