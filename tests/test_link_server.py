"""LinkServer and LinkClient over real sockets: messages, ends, and devices that send what cannot be."""

from __future__ import annotations

import random
import struct
import threading
import weakref
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import grpc
import pytest

from fl_edge.link.resident.config import TLS, LinkConfig
from fl_edge.link.resident.frames import Kind, Position, make_frame, make_welcome, read_farewell, read_frame
from tests.link_site import (
    ACKNOWLEDGEMENT,
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
    why,
)

pytestmark = pytest.mark.usefixtures("in_time", "impatient", "no_thread_is_left")

# --- messages ---


def test_messages_of_every_size_go_to_and_fro(security: TLS | None) -> None:
    frame = LinkConfig().frame_bytes
    source = random.Random(1)
    sizes = [1, 7, 1000, frame - 1, frame, frame + 1, 3 * frame, 10 * MIB, 10 * MIB + 5]
    messages = [source.randbytes(size) for size in sizes]
    with Site(tls=security) as site, ExitStack() as stack:
        for node in (1, 2):
            stack.enter_context(echo(site.client(node)))
        for message in messages:
            third = len(message) // 3
            site.server.send(1, [message[:third], b"", memoryview(message)[third:]])
            site.server.send(2, [message])
        for node in (1, 2):
            eventually(has(site.messages[node], len(messages)))
            assert site.messages[node] == messages
        assert [site.server.state(node) for node in (1, 2, 3)] == ["connected", "connected", "absent"]
        assert site.ended == []


def test_states_of_a_session() -> None:
    with Site() as site, Proxy(site.server.port) as proxy:
        assert site.server.state(1) == "absent"
        token = site.server.admit(1)
        assert site.server.state(1) == "invited"
        site.server.send(1, [b"queued before it came"])
        client = site.client(1, token, address=proxy.address)
        assert [bytes(chunk) for chunk in next(client.messages())] == [b"queued before it came"]
        assert site.server.state(1) == "connected"
        proxy.refuse = True
        proxy.cut()
        eventually(lambda: site.server.state(1) == "cut")
        proxy.refuse = False
        eventually(lambda: site.server.state(1) == "connected")
        site.server.release(1, "thank you")
        assert site.server.state(1) == "absent"
        assert why(client) == "thank you"
        with pytest.raises(KeyError):
            site.server.send(1, [b"too late"])
        assert site.ended == []


def test_release_sends_what_was_queued_first() -> None:
    with Site() as site:
        client = site.connected(1)
        for number in range(10):
            site.server.send(1, [bytes([number]) * MIB])
        site.server.release(1, "all said")
        assert [bytes(chunks[0][:1]) for chunks in client.messages()] == [bytes([number]) for number in range(10)]
        assert client.reason == "all said"
        assert list(client.messages()) == []  # it has ended, and stays so


def test_a_client_that_leaves_is_an_end_of_its_session_after_all_it_has_sent() -> None:
    with Site() as site:
        client = site.connected(1)
        for number in range(5):
            client.send([bytes([number]) * 2 * MIB])
        client.close("battery\nlow")
        assert client.reason == "battery\nlow"
        eventually(lambda: site.ended)
        assert site.ended == [(1, "the node left: battery low")]
        assert [message[:1] for message in site.messages[1]] == [bytes([number]) for number in range(5)]
        assert site.server.state(1) == "absent"


def test_close_tells_every_client_why() -> None:
    with Site() as site:
        clients = [site.connected(node) for node in (1, 2, 3)]
        site.server.close("the run has ended")
        assert [why(client) for client in clients] == ["the run has ended"] * 3
        assert site.ended == []
        site.server.close("again")  # is nothing


def test_expel_ends_a_session_once_and_the_client_hears_why() -> None:
    with Site() as site:
        client = site.connected(1)
        site.server.expel(1, "it was late")
        site.server.expel(1, "again")
        assert why(client) == "it was late"
        assert site.ended == [(1, "it was late")]


def test_a_message_that_is_too_long_is_refused_here_and_the_session_lives() -> None:
    config = LinkConfig(max_message_mib=1)
    with Site(config) as site, echo(site.client(1)) as _:
        with pytest.raises(ValueError, match="max_message_mib"):
            site.server.send(1, [bytes(MIB + 1)])
        site.server.send(1, [bytes(MIB)])
        eventually(lambda: site.messages[1] == [bytes(MIB)])


def test_messages_are_not_kept_by_threads_that_wait() -> None:
    """The last message of every node would be a model's weights each."""
    kept: list[weakref.ref[Any]] = []
    with Site(LinkConfig(frame_kib=64)) as site:
        site.server._on_message = lambda node, chunks: kept.append(weakref.ref(chunks[0]))
        client = site.connected(1)
        memory = bytearray(3 * MIB)
        site.server.send(1, [memoryview(memory)])
        messages = client.messages()
        chunks = next(messages)
        kept.append(weakref.ref(chunks[0]))
        client.send([bytes(2 * MIB)])
        del chunks
        waiting = threading.Thread(target=lambda: next(messages, None))
        waiting.start()
        eventually(lambda: len(kept) == 2)
        eventually(lambda: all(gone() is None for gone in kept))
        eventually(partial(resizable, memory))
        client.close("done")
        waiting.join(PATIENCE_S)


def resizable(memory: bytearray) -> bool:
    """Return whether nobody refers to the bytes."""
    with suppress(BufferError):
        memory.append(0)
        return True
    return False


# --- devices that send what cannot be ---

BAD = {
    "no frame": b"hello",
    "empty": b"",
    "other version": b"FE\x02" + ACKNOWLEDGEMENT[3:],
    "welcome": make_welcome(bytes(32), Position()),
    "gap": data_frame(3),
    "later part": data_frame(1, part=1, total=2),
    "too long": data_frame(1, bytes(1024), total=2**40),
    "short part": data_frame(1, bytes(1000), total=1025),
    "acknowledges what was not sent": make_frame(Kind.ACKNOWLEDGEMENT, 7),
}


@pytest.mark.parametrize("name", BAD)
def test_a_frame_that_cannot_be_ends_that_session_alone(name: str) -> None:
    with Site(LinkConfig(frame_kib=1)) as site, echo(site.connected(2)), admitted(site, 1) as raw:
        raw.send(data_frame(1, b"good"))
        eventually(lambda: site.messages[1] == [b"good"])
        bad = (
            BAD[name]
            if b"FE\x01\x02" not in BAD[name]
            else BAD[name].replace(struct.pack("<Q", 1), struct.pack("<Q", 2), 1)
        )
        raw.send(bad, data_frame(2, b"after it"))
        assert raw.outcome()[1] in (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK)  # OK if the farewell was faster
        eventually(lambda: site.ended)
        ((node, reason),) = site.ended
        assert node == 1
        assert reason.startswith("the node sent what cannot be: ")
        assert "\n" not in reason
        assert site.messages[1] == [b"good"]
        site.server.send(2, [b"unharmed"])
        eventually(lambda: site.messages[2] == [b"unharmed"])
        assert len(site.ended) == 1


def test_a_frame_larger_than_allowed_breaks_the_connection_alone() -> None:
    config = LinkConfig(frame_kib=1, grace_s=0.5)
    with Site(config) as site, echo(site.connected(2)), admitted(site, 1) as raw:
        raw.send(data_frame(1, bytes(config.frame_bytes + 1)))
        assert raw.outcome()[1] == grpc.StatusCode.RESOURCE_EXHAUSTED
        eventually(lambda: site.ended)
        assert site.ended == [(1, "no connection for 0.5 s")]
        assert site.messages[1] == []
        site.server.send(2, [b"unharmed"])
        eventually(lambda: site.messages[2] == [b"unharmed"])


def test_a_node_that_hangs_up_without_a_farewell_may_come_back() -> None:
    with Site() as site:
        with Raw(site.server.port, credentials(1, site.server.admit(1))) as raw:
            token = raw.welcome()
            raw.hang_up()
            raw.outcome()
        eventually(lambda: site.server.state(1) == "cut")
        with Raw(site.server.port, credentials(1, token)) as raw:
            raw.welcome()
        assert site.ended == []


def test_a_farewell_is_answered() -> None:
    with Site() as site, admitted(site, 1) as raw:
        raw.send(make_frame(Kind.FAREWELL, 0, [b"so\nlong"]))
        frames, code, *_ = raw.outcome()
        assert (code, [read_farewell(read_frame(frame)) for frame in frames]) == (
            grpc.StatusCode.OK,
            ["the node left: so long"],
        )
        assert site.ended == [(1, "the node left: so long")]


def test_what_fails_to_take_in_a_message_ends_the_session(caplog: pytest.LogCaptureFixture) -> None:
    """The message is acknowledged: it would be missing without a word."""

    def fail(node: int, content: bytes) -> None:
        if content == b"poison":
            raise MemoryError

    with Site(on_message=fail) as site:
        client, other = site.connected(1), site.connected(2)
        client.send([b"poison"])
        other.send([b"food"])
        eventually(lambda: site.ended and site.messages[2])
        assert site.ended == [(1, "its message could not be taken in: MemoryError")]
        why(client)
    assert "a message from node 1 could not be taken in" in caplog.text
