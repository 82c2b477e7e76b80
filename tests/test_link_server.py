"""LinkServer and LinkClient: real sockets, networks that break, strangers, and devices that send what cannot be."""

from __future__ import annotations

import dataclasses
import gc
import os
import queue
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import psutil
import pytest

from fl_edge.errors import ConfigError
from fl_edge.link.resident import client as client_module
from fl_edge.link.resident import server as server_module
from fl_edge.link.resident.client import Invitation, LinkClient
from fl_edge.link.resident.config import TLS, LinkConfig
from fl_edge.link.resident.frames import (
    METHOD,
    NODE_KEY,
    POSITION_KEY,
    TOKEN_KEY,
    Buffer,
    Kind,
    Position,
    make_frame,
    make_welcome,
    read_farewell,
    read_frame,
    read_welcome,
)
from fl_edge.link.resident.server import LinkServer
from simulations.certificates import make_certificates

PATIENCE_S = 60.0  # a safety net only
A_MOMENT_S = 0.1  # long enough for something to happen that must not
MIB = 1024**2
Metadata = tuple[tuple[str, str | bytes], ...]


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """What blocks for ever fails."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(int(3 * PATIENCE_S))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def eventually(condition: Callable[[], Any]) -> None:
    """Wait until something is so; how long it takes is no part of any test."""
    for _ in range(int(PATIENCE_S / 0.002)):
        if condition():
            return
        threading.Event().wait(0.002)
    raise AssertionError("it never came to be")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients try again at once."""
    monkeypatch.setattr(client_module, "_RETRY_S", 0.01)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    eventually(lambda: not {thread for thread in threading.enumerate() if thread not in before})


class Site:
    """A server, and what it was told."""

    def __init__(
        self,
        config: LinkConfig | None = None,
        tls: TLS | None = None,
        on_message: Callable[[int, bytes], None] | None = None,
    ) -> None:
        self.config, self.tls = config or LinkConfig(grace_s=20.0), tls
        self.messages: dict[int, list[bytes]] = defaultdict(list)
        self.ended: list[tuple[int, str]] = []
        self._also = on_message
        self.server = LinkServer(self.config, "127.0.0.1:0", tls, self._on_message, self._on_end)
        self._clients: list[LinkClient] = []

    def _on_message(self, node: int, chunks: Sequence[Buffer]) -> None:
        content = b"".join(chunks)
        if self._also:
            self._also(node, content)
        self.messages[node].append(content)

    def _on_end(self, node: int, reason: str) -> None:
        self.ended.append((node, reason))

    def invitation(self, node: int, token: bytes | None = None, **changes: Any) -> Invitation:
        made = Invitation(
            address=f"127.0.0.1:{self.server.port}",
            node_id=node,
            authority=self.tls.authority if self.tls else b"",
            token=self.server.admit(node) if token is None else token,
            grace_s=self.config.grace_s,
            heartbeat_s=self.config.heartbeat_s,
            frame_bytes=self.config.frame_bytes,
            max_message_bytes=self.config.max_message_bytes,
        )
        return dataclasses.replace(made, **changes)

    def client(self, node: int, token: bytes | None = None, **changes: Any) -> LinkClient:
        client = LinkClient(self.invitation(node, token, **changes))
        self._clients.append(client)
        return client

    def connected(self, node: int, **changes: Any) -> LinkClient:
        client = self.client(node, **changes)
        eventually(lambda: self.server.state(node) == "connected")
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.server.close("the test is over")
        for client in self._clients:
            client.close("the test is over", patience_s=0.0)


@contextmanager
def echo(client: LinkClient) -> Iterator[threading.Thread]:
    """Send back what comes, until the session ends."""

    def work() -> None:
        for chunks in client.messages():
            client.send(chunks)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield thread
    client.close("the echo ends")
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def why(client: LinkClient) -> str:
    """Wait until a client leaves, and return the reason."""
    assert list(client.messages()) == []
    assert "\n" not in client.reason
    return client.reason


class Raw:
    """A gRPC client that sends whatever a test likes."""

    def __init__(self, target: int | grpc.Channel, metadata: Metadata, method: str = METHOD) -> None:
        self._own = grpc.insecure_channel(f"127.0.0.1:{target}", CHANNEL) if isinstance(target, int) else None
        channel = self._own or target
        assert isinstance(channel, grpc.Channel)
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method)
        self._call = stream(iter(self._outgoing.get, None), metadata=metadata, timeout=PATIENCE_S)

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self._outgoing.put(frame)

    def welcome(self) -> bytes:
        """Return the token of the welcome."""
        return read_welcome(read_frame(next(self._call)))[0]

    def next(self) -> bytes:
        frame: bytes = next(self._call)
        return frame

    def outcome(self) -> tuple[list[bytes], grpc.StatusCode, str, Any, Any]:
        """Wait for the end and return all there is to be seen of it."""
        got: list[bytes] = []
        with suppress(grpc.RpcError):
            got.extend(self._call)
        call = self._call
        return got, call.code(), call.details(), call.initial_metadata(), call.trailing_metadata()

    def hang_up(self) -> None:
        """Send no more."""
        self._outgoing.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.hang_up()
        self._call.cancel()
        if self._own:
            self._own.close()


CHANNEL = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]


def credentials(node: object, token: bytes, position: object = "0.0") -> Metadata:
    return ((NODE_KEY, str(node)), (TOKEN_KEY, token), (POSITION_KEY, str(position)))


def admitted(site: Site, node: int) -> Raw:
    raw = Raw(site.server.port, credentials(node, site.server.admit(node)))
    raw.welcome()
    return raw


def data_frame(number: int, content: bytes = b"x", **fields: int) -> bytes:
    fields = {"total": len(content), "part": 0, "acknowledged": 0, **fields}
    return make_frame(Kind.DATA, fields.pop("acknowledged"), [content], message=number, **fields)


ACKNOWLEDGEMENT = make_frame(Kind.ACKNOWLEDGEMENT, 0)


class Proxy:
    """A TCP proxy: the network that can be cut."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.swallow = False  # take what comes and pass nothing on
        self.refuse = False  # close new connections at once
        self.connections = 0
        self.passed = [0, 0]  # bytes to the server, and from it
        self.seen: list[bytes] = []  # what the server said
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._run(self._accept)

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    if self.refuse:
                        raise ConnectionRefusedError
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                else:
                    with self._lock:
                        self._sockets += [near, far]
                    self._run(self._carry, near, far)
                self.connections += 1  # from here on, `cut` breaks it

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            back = threading.Thread(target=self._pump, args=(far, near, 1), daemon=True)
            back.start()
            self._pump(near, far, 0)
            back.join()
            with self._lock:
                self._sockets = [each for each in self._sockets if each not in (near, far)]

    def _pump(self, source: socket.socket, sink: socket.socket, direction: int) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if self.swallow:
                    continue
                if direction and sum(map(len, self.seen)) < 10_000:
                    self.seen.append(data)
                sink.sendall(data)
                self.passed[direction] += len(data)
        if not self.swallow:
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break every connection."""
        with self._lock:
            for end in self._sockets:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.swallow = False
        self._threads[0].join(PATIENCE_S)
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE_S)


def has(items: Sequence[object], count: int) -> Callable[[], bool]:
    return lambda: len(items) >= count


def has_another(proxy: Proxy) -> Callable[[], bool]:
    """Return what becomes true with the proxy's next connection."""
    made = proxy.connections
    return lambda: proxy.connections > made


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> TLS:
    return make_tls(tmp_path_factory.mktemp("certificates"))


def make_tls(folder: Path) -> TLS:
    authority, certificate, key = (folder / f"{name}.pem" for name in ("ca", "server", "key"))
    make_certificates(authority, certificate, key)
    return TLS.from_files(certificate, key, authority)


@pytest.fixture(params=["clear", "tls"])
def security(request: pytest.FixtureRequest, certificates: TLS) -> TLS | None:
    return certificates if request.param == "tls" else None


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


# --- who may come ---


def test_all_who_are_refused_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with Site() as site:
        tokens = {node: site.server.admit(node) for node in (1, 2, 4, 5, 6)}
        site.server.release(4, "released")
        site.server.expel(5, "expelled")
        with Raw(site.server.port, credentials(6, tokens[6])) as raw:
            successor = raw.welcome()
            raw.send(ACKNOWLEDGEMENT, data_frame(1))
            eventually(lambda: site.messages[6])
        void = site.server.admit(2)  # begins another session
        assert void != tokens[2]
        strangers: dict[str, Metadata] = {
            "nothing at all": (),
            "no token": ((NODE_KEY, "1"), (POSITION_KEY, "0.0")),
            "empty token": credentials(1, b""),
            "wrong token": credentials(1, bytes(32)),
            "half a token": credentials(1, tokens[1][:16]),
            "too long a token": credentials(1, tokens[1] + b"x"),
            "token as text": ((NODE_KEY, "1"), ("fl-edge-token", tokens[1].hex()), (POSITION_KEY, "0.0")),
            "unknown node": credentials(99, bytes(32)),
            "unknown node, a good token": credentials(99, tokens[1]),
            "token of another node": credentials(1, successor),
            "used token": credentials(6, tokens[6]),
            "token of an older session": credentials(2, tokens[2]),
            "released": credentials(4, tokens[4]),
            "expelled": credentials(5, tokens[5]),
            "no node": ((TOKEN_KEY, tokens[1]), (POSITION_KEY, "0.0")),
            "no number": credentials("one", tokens[1]),
            "negative": credentials(-1, tokens[1]),
            "huge": credentials("1" * 300, tokens[1]),
            "no position": ((NODE_KEY, "1"), (TOKEN_KEY, tokens[1])),
            "nonsense position": credentials(1, tokens[1], "here"),
        }
        seen = {}
        for name, metadata in strangers.items():
            with Proxy(site.server.port) as proxy, Raw(int(proxy.address.rpartition(":")[2]), metadata) as raw:
                assert raw.outcome() == ([], grpc.StatusCode.UNAUTHENTICATED, "refused", (), ()), name
                seen[name] = answers(b"".join(proxy.seen))
        assert len(seen["nothing at all"]) == 1
        assert {name for name, answer in seen.items() if answer != seen["nothing at all"]} == set()
        with Raw(site.server.port, credentials(1, tokens[1])) as raw:
            raw.welcome()  # none of them has used it up


def answers(stream: bytes) -> list[tuple[int, int, int, bytes]]:
    """Return the HTTP/2 frames that carry an answer: type, flags, stream, payload."""
    found = []
    while len(stream) >= 9:
        size = int.from_bytes(stream[:3], "big")
        kind, flags, number = struct.unpack(">BBI", stream[3:9])
        if kind in (0, 1, 9):  # data, headers, continuation; not settings, pings, resets, windows
            found.append((kind, flags, number, stream[9 : 9 + size]))
        stream = stream[9 + size :]
    return found


def test_a_refused_client_says_so(security: TLS | None) -> None:
    with Site(tls=security) as site:
        for node, token in ((1, bytes(32)), (9, b""), (2**64 - 1, b"x" * 32)):
            assert why(site.client(node, token)) == f"the server at 127.0.0.1:{site.server.port} refused this client"
        assert site.ended == []


def test_a_token_works_once() -> None:
    with Site() as site:
        token = site.server.admit(1)
        with Raw(site.server.port, credentials(1, token)) as first:
            second_token = first.welcome()
            first.send(data_frame(1))
            eventually(lambda: site.messages[1])  # which shows that the second has arrived
            with Raw(site.server.port, credentials(1, token)) as thief:
                assert thief.outcome()[:3] == ([], grpc.StatusCode.UNAUTHENTICATED, "refused")
            first.send(data_frame(2, b"unharmed"))
            eventually(lambda: site.messages[1][1:] == [b"unharmed"])
        with Raw(site.server.port, credentials(1, second_token)) as back:
            assert back.welcome() not in (token, second_token)


def test_an_idle_client_confirms_its_new_token_as_well() -> None:
    with Site() as site:
        token = site.server.admit(1)
        client = site.client(1, token)
        eventually(lambda: client._token != token)
        eventually(lambda: not site.server._sessions[1].tokens.accept(token))
        with Raw(site.server.port, credentials(1, token)) as thief:
            assert thief.outcome()[:3] == ([], grpc.StatusCode.UNAUTHENTICATED, "refused")
        assert site.server.state(1) == "connected"


def test_a_welcome_that_was_lost_does_not_lock_the_client_out() -> None:
    with Site() as site:
        token = site.server.admit(1)
        tokens = [token]
        for _ in range(3):
            with Raw(site.server.port, credentials(1, token)) as raw:  # it does not see, or not use, its new token
                tokens.append(raw.welcome())
        assert len(set(tokens)) == 4
        with Raw(site.server.port, credentials(1, tokens[1])) as raw:  # a successor that was succeeded
            assert raw.outcome()[1] == grpc.StatusCode.UNAUTHENTICATED
        with Raw(site.server.port, credentials(1, tokens[3])) as raw:
            raw.welcome()


def test_a_late_frame_of_an_old_connection_confirms_no_newer_token() -> None:
    with Site() as site:
        token = site.server.admit(1)
        with Raw(site.server.port, credentials(1, token)) as raw:
            second = raw.welcome()
            raw.send(ACKNOWLEDGEMENT, data_frame(1))
            eventually(lambda: site.messages[1])
        session = site.server._sessions[1]
        with Raw(site.server.port, credentials(1, second)) as lost:
            lost.welcome()
            # what the reader of the first connection had still in hand, while the welcome of the second got lost
            site.server._receive(session, 1, read_frame(data_frame(2, b"late")))
            assert site.messages[1] == [b"x"]
        with Raw(site.server.port, credentials(1, second)) as back:
            back.welcome()
            back.send(data_frame(2, b"again"))
            eventually(lambda: site.messages[1] == [b"x", b"again"])


def test_a_client_out_of_step_is_told_and_the_session_waits_for_a_better_one() -> None:
    with Site() as site:
        token = site.server.admit(1)
        with Raw(site.server.port, credentials(1, token, Position(5, 0))) as raw:
            assert raw.outcome()[:3] == ([], grpc.StatusCode.FAILED_PRECONDITION, "out of step")
        assert site.server.state(1) == "invited"
        with Raw(site.server.port, credentials(1, token)) as raw:
            raw.welcome()


def test_another_session_ends_the_older_one() -> None:
    with Site() as site:
        old = site.connected(1)
        site.server.send(1, [b"to the old one"])
        new = site.client(1)
        assert [bytes(chunks[0]) for chunks in old.messages()] == [b"to the old one"]
        assert old.reason == "another session was begun for this node"
        site.server.send(1, [b"to the new one"])
        assert bytes(next(new.messages())[0]) == b"to the new one"
        new.send([b"from the new one"])
        eventually(lambda: site.messages[1] == [b"from the new one"])
        assert site.ended == []


def test_no_more_than_max_nodes() -> None:
    with Site(LinkConfig(max_nodes=2)) as site:
        first = site.connected(1)
        site.server.admit(2)
        with pytest.raises(ConfigError, match=r"^2 nodes are connected, no more are allowed \(max_nodes\)$"):
            site.server.admit(3)
        assert site.server.state(3) == "absent"
        site.server.admit(2)  # in the place of its own
        site.server.release(1, "enough")
        assert why(first) == "enough"
        site.connected(3)


# --- strangers at the door ---

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that waits less long for a handshake."""
    monkeypatch.setattr(server_module, "_HANDSHAKE_S", 1)


def hung_up(peer: socket.socket) -> bool:
    """Return whether the server has hung up on a peer to which it says nothing."""
    with suppress(BlockingIOError, ConnectionResetError):
        return peer.recv(4096, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    return bool(select.select([peer], [], [], 0)[0])


def dropped(peer: socket.socket) -> bool:
    """Wait until the server hangs up."""
    peer.settimeout(PATIENCE_S)
    with suppress(ConnectionResetError):
        while peer.recv(4096):
            pass
    return True


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "words", [b"", b"GET / HTTP/1.1\r\n\r\n", PREFACE, PREFACE + b"\0\0\0\4\0\0\0\0\0", b"\x16\x03\x01\x02\x00"]
)
def test_a_peer_without_a_call_is_dropped(security: TLS | None, words: bytes) -> None:
    with Site(tls=security) as site:
        address = ("127.0.0.1", site.server.port)
        with socket.create_connection(address) as peer:
            peer.sendall(words)
            assert dropped(peer)
        with echo(site.client(1)):
            site.server.send(1, [b"still there"])
            eventually(lambda: site.messages[1])


@pytest.mark.usefixtures("hasty")
def test_a_channel_without_a_call_is_closed() -> None:
    with Site() as site, Proxy(site.server.port) as proxy, grpc.insecure_channel(proxy.address, CHANNEL) as channel:
        grpc.channel_ready_future(channel).result(PATIENCE_S)
        eventually(lambda: not proxy._sockets)
        assert proxy.connections == 1


@pytest.mark.usefixtures("hasty")
def test_a_good_client_is_served_among_many_silent_ones(security: TLS | None) -> None:
    """Twice as many as the server takes at once: it forgets them one by one."""
    config = LinkConfig(max_nodes=2, grace_s=60.0)
    with Site(config, security) as site, ExitStack() as stack:
        for _ in range(80):
            stack.enter_context(socket.create_connection(("127.0.0.1", site.server.port)))
        stack.enter_context(echo(site.client(1)))
        site.server.send(1, [bytes(2 * MIB)])
        eventually(lambda: site.messages[1] == [bytes(2 * MIB)])


def test_more_connections_than_nodes_could_need_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_HANDSHAKE_S", 3600)
    config = LinkConfig(max_nodes=2)
    most = 2 * (config.max_nodes + server_module._SPARE_CALLS)
    with Site(config) as site, echo(site.connected(1)), ExitStack() as stack:
        address = ("127.0.0.1", site.server.port)
        peers = [stack.enter_context(socket.create_connection(address)) for _ in range(most + 20)]
        eventually(lambda: sum(map(hung_up, peers)) >= 20)
        site.server.send(1, [b"still there"])
        eventually(lambda: site.messages[1])


def test_an_idle_client_is_not_taken_for_a_silent_one(hasty: None) -> None:
    with Site() as site, Proxy(site.server.port) as proxy, echo(site.connected(1, address=proxy.address)):
        threading.Event().wait(2.5)
        assert proxy.connections == 1
        site.server.send(1, [b"hello"])
        eventually(lambda: site.messages[1])
        assert site.ended == []


def test_metadata_have_a_limit() -> None:
    with Site() as site:
        token = site.server.admit(1)
        for size in (5_000, 60_000):
            with Raw(site.server.port, (*credentials(1, token), ("junk", "x" * size))) as raw:
                assert raw.outcome()[1] == grpc.StatusCode.RESOURCE_EXHAUSTED
        with Raw(site.server.port, (*credentials(1, token), ("junk", "x" * 1000))) as raw:
            raw.welcome()


def test_other_methods_are_not_there() -> None:
    with Site() as site:
        token = site.server.admit(1)
        for method in ("/fl_edge.Link/Leave", "/", "/fl_edge.Link/Stay/"):
            with Raw(site.server.port, credentials(1, token), method) as raw:
                assert raw.outcome()[:2] == ([], grpc.StatusCode.UNIMPLEMENTED)


def test_a_client_in_the_clear_and_a_server_with_tls_and_the_reverse(certificates: TLS, tmp_path: Path) -> None:
    another = make_tls(tmp_path)
    for server_tls, authority in (
        (certificates, b""),
        (None, certificates.authority),
        (certificates, another.authority),
        (certificates, b"no certificate"),
    ):
        with Site(LinkConfig(grace_s=0.5), server_tls) as site:
            client = site.client(1, authority=authority)
            address = f"127.0.0.1:{site.server.port}"
            assert why(client).startswith(f"no connection to {address} for 0.5 s: ")
            assert len(client.reason) > len(f"no connection to {address} for 0.5 s: ") + 5
            assert site.server.state(1) == "invited"
            with echo(site.client(2)):
                site.server.send(2, [b"still there"])
                eventually(lambda: site.messages[2])
            site.server.release(1, "enough")


def test_a_certificate_is_for_its_host(certificates: TLS) -> None:
    with Site(LinkConfig(grace_s=0.5), certificates) as site:
        assert "no connection to 127.0.0.2" in why(site.client(1, address=f"127.0.0.2:{site.server.port}"))
        with echo(site.client(2, address=f"localhost:{site.server.port}")):
            site.server.send(2, [b"hello"])
            eventually(lambda: site.messages[2])


def start(listen: str, tls: TLS | None = None, config: LinkConfig | None = None) -> LinkServer:
    return LinkServer(config or LinkConfig(), listen, tls, lambda *_: None, lambda *_: None)


@pytest.mark.parametrize(
    "listen",
    ["", "nowhere", "127.0.0.1", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:99999", "127.0.0.1:-1", "1.2.3.4:0", ":"],
)
def test_an_address_that_cannot_be_listened_on(security: TLS | None, listen: str) -> None:
    with pytest.raises(ConfigError, match=r"must be host:port with a free port of this machine") as caught:
        start(listen, security)
    assert str(caught.value).startswith(f"cannot listen on {listen}: ")
    assert "\n" not in str(caught.value)


def test_a_port_in_use() -> None:
    with Site() as site, pytest.raises(ConfigError, match=f"^cannot listen on 127.0.0.1:{site.server.port}: "):
        start(f"127.0.0.1:{site.server.port}")


def test_certificates_that_do_not_work(certificates: TLS, tmp_path: Path) -> None:
    another = make_tls(tmp_path)
    for wrong in (
        dataclasses.replace(certificates, key=another.key),
        dataclasses.replace(certificates, key=certificates.certificate),
        dataclasses.replace(certificates, certificate=certificates.key),
        dataclasses.replace(certificates, certificate=b"-----BEGIN CERTIFICATE-----\nnonsense"),
    ):
        with pytest.raises(ConfigError, match=r"certificate and key must belong together$") as caught:
            start("127.0.0.1:0", wrong)
        assert "\n" not in str(caught.value)


def test_settings_out_of_range_do_not_start() -> None:
    with pytest.raises(ConfigError, match=r"^heartbeat_s=0.0 is not allowed"):
        start("127.0.0.1:0", config=LinkConfig(heartbeat_s=0.0))


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


SCRIPT = """
import dataclasses, json, logging, multiprocessing, os, sys, threading
from fl_edge.link.resident.client import Invitation, LinkClient
invitation = json.loads(sys.stdin.readline())
for name in ("authority", "token"):
    invitation[name] = bytes.fromhex(invitation[name])
client = LinkClient(Invitation(**invitation))
"""


@contextmanager
def process(invitation: Invitation, script: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a client in a process of its own."""
    given = dataclasses.asdict(invitation)
    given |= {name: given[name].hex() for name in ("authority", "token")}
    started = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT + textwrap.dedent(script)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        assert started.stdin
        started.stdin.write(json_line(given))
        started.stdin.flush()
        yield started
    finally:
        started.kill()
        started.communicate()


def json_line(value: object) -> str:
    import json

    return json.dumps(value) + "\n"


def test_closing_does_not_wait_for_a_frozen_client() -> None:
    config = LinkConfig(heartbeat_s=3600.0)
    with Site(config) as site, process(site.invitation(1), "list(client.messages())") as frozen:
        eventually(lambda: site.server.state(1) == "connected")
        other = site.connected(2)
        frozen.send_signal(signal.SIGSTOP)
        for _ in range(30):
            site.server.send(1, [bytes(MIB)])
        site.server.close("the run has ended", 0.5)
        assert why(other) == "the run has ended"
        assert site.ended == []


def test_a_killed_client_is_missed_after_the_grace() -> None:
    config = LinkConfig(grace_s=0.5)
    with Site(config) as site, process(site.invitation(1), "list(client.messages())") as killed:
        eventually(lambda: site.server.state(1) == "connected")
        killed.kill()
        eventually(lambda: site.ended)
        assert site.ended == [(1, "no connection for 0.5 s")]


def test_a_client_may_fork_as_data_loaders_do() -> None:
    """The children inherit the socket and gRPC's locks; the session must not notice."""
    script = """
        def work(number):
            return number * number
        for chunks in client.messages():
            with multiprocessing.get_context("fork").Pool(2) as pool:
                client.send([repr(pool.map(work, range(4))).encode()])
        print(client.reason)
    """
    with Site() as site, process(site.invitation(1), script) as forking:
        for _ in range(3):
            site.server.send(1, [b"go"])
        eventually(lambda: len(site.messages[1]) == 3)
        assert site.messages[1] == [b"[0, 1, 4, 9]"] * 3
        site.server.release(1, "thank you")
        output, _ = forking.communicate(timeout=PATIENCE_S)
        assert output.splitlines()[-1] == "thank you"
        assert "Traceback" not in output


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


def test_no_thread_keeps_a_process_alive_that_forgot_to_close() -> None:
    script = """
        from fl_edge.link.resident.config import LinkConfig
        from fl_edge.link.resident.server import LinkServer
        server = LinkServer(LinkConfig(), "127.0.0.1:0", None, lambda *_: None, lambda *_: None)
        own = dataclasses.replace(client._invitation, address=f"127.0.0.1:{server.port}", token=server.admit(1))
        another = LinkClient(own)
        server.send(1, [b"hello"])
        next(another.messages())
        another.send([b"x"])
        print(server.state(1))
    """
    with Site() as site, process(site.invitation(1), script) as forgetful:
        output, _ = forgetful.communicate(timeout=PATIENCE_S)
        assert output.splitlines()[0] == "connected"
        assert "Traceback" not in output
        assert forgetful.returncode == 0


@pytest.mark.parametrize("verbosity", ["INFO", "DEBUG"])
def test_no_token_is_in_any_log(certificates: TLS, tmp_path: Path, verbosity: str) -> None:
    """A session with cuts, refusals and ends, everything that can be logged logged, by gRPC too."""
    files = []
    for name in ("certificate", "key", "authority"):
        files.append(tmp_path / name)
        files[-1].write_bytes(getattr(certificates, name))
    script = f"""
        import secrets
        logging.basicConfig(level=logging.DEBUG)
        issued, make = [], secrets.token_bytes
        secrets.token_bytes = lambda size: issued.append(make(size)) or issued[-1]
        from fl_edge.link.resident.config import TLS, LinkConfig
        from fl_edge.link.resident.server import LinkServer
        tls = TLS.from_files(*{[str(file) for file in files]!r})
        server = LinkServer(LinkConfig(), "127.0.0.1:0", tls, lambda *_: None, lambda *_: None)
        address = f"127.0.0.1:{{server.port}}"
        client.close("this one is not needed")
        for node in range(3):
            own = dataclasses.replace(
                client._invitation, address=address, authority=tls.authority, node_id=node, token=server.admit(node)
            )
            print(own, tls, server._sessions[node], server._sessions[node].tokens)
            one = LinkClient(own)
            server.send(node, [b"hello"])
            next(one.messages())
            one._call.cancel()
            server.send(node, [b"hello"])
            next(one.messages())
            another = LinkClient(own)
            print(list(another.messages()), another.reason)
            server.expel(node, "enough") if node else one.close("enough")
        logging.debug("the end")
        server.close("done")
        print("issued", *[token.hex() for token in issued])
    """
    with Site() as site, process(site.invitation(1), script, GRPC_VERBOSITY=verbosity) as talkative:
        output, _ = talkative.communicate(timeout=PATIENCE_S)
    log, _, issued = output.rpartition("issued ")
    assert talkative.returncode == 0, output
    assert "DEBUG:root:the end" in log
    tokens = [bytes.fromhex(token) for token in issued.split()]
    assert len(tokens) >= 6
    for token in tokens:
        assert not [form for form in written(token) if form in log]
    key = certificates.key.decode().splitlines()[1]
    assert key not in log


def written(secret: bytes) -> list[str]:
    from base64 import b64encode, urlsafe_b64encode

    plain = [b64encode(secret).decode().rstrip("="), urlsafe_b64encode(secret).decode().rstrip("=")]
    return [secret.hex(), secret.hex().upper(), repr(secret)[2:-1], *plain]


# --- ten thousand attempts on one server ---

STRANGE = [
    b"",
    b"\0",
    b"\xff" * 40,
    "ä½".encode(),
    b"%00",
    b"0.0",
    b"1" * 3000,
    b"../..",
    bytes(range(1, 120)),
    b"\r\nx: y",
]


def mutated_frame(source: random.Random, number: int, config: LinkConfig) -> bytes:
    """Return a valid frame for message `number`, or one that is valid no longer."""
    content = source.randbytes(source.choice([1, 30, config.frame_bytes]))
    choice = source.random()
    frame = bytearray(data_frame(number, content))
    if choice < 0.25:  # a field
        offset, size = source.choice([(0, 2), (2, 1), (3, 1), (4, 4), (8, 8), (16, 8), (24, 8)])
        values = [0, 1, 2, 3, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1, source.getrandbits(64), number + 1]
        frame[offset : offset + size] = (source.choice(values) % 2 ** (8 * size)).to_bytes(size, "little")
    elif choice < 0.4:
        del frame[source.randrange(len(frame)) :]
    elif choice < 0.5:
        frame += source.randbytes(source.choice([1, 8, 100]))
    elif choice < 0.6:
        for _ in range(source.randint(1, 5)):
            frame[source.randrange(len(frame))] ^= 1 << source.randrange(8)
    elif choice < 0.65:
        return source.randbytes(source.randrange(100))
    elif choice < 0.7:
        return make_frame(
            source.choice(list(Kind)), source.choice([0, 0, 5]), [source.randbytes(source.choice([0, 44, 9]))]
        )
    elif choice < 0.75:
        return data_frame(
            number, bytes(config.frame_bytes), total=source.choice([config.frame_bytes + 1, 2**41, 2**63])
        )
    elif choice < 0.85:
        return data_frame(source.choice([0, 1, number - 1, number + 1, number + 2]) % 2**64, content)
    return bytes(frame)


def header(name: bytes, value: bytes) -> bytes:
    """Return a header field as HPACK has it, never indexed."""
    return b"\x10" + hpack_text(name) + hpack_text(value)


def hpack_text(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes([size]) + text
    size -= 127
    coded = b"\x7f"
    while size >= 128:
        coded, size = coded + bytes([size % 128 + 128]), size // 128
    return coded + bytes([size]) + text


def http2_frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, number) + payload


HELLO = PREFACE + http2_frame(4, 0, 0, b"")


def mutated_request(source: random.Random, token: bytes) -> list[tuple[bytes, bytes]]:
    from base64 import b64encode

    fields = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", METHOD.encode()), (b":authority", b"localhost"),
        (b"te", b"trailers"), (b"content-type", b"application/grpc"),
        (NODE_KEY.encode(), b"1"), (TOKEN_KEY.encode(), b64encode(token)), (POSITION_KEY.encode(), b"0.0"),
    ]  # fmt: skip
    for _ in range(source.randint(1, 3)):
        at = source.randrange(len(fields))
        name, value = fields[at]
        fields[at : at + 1] = source.choice(
            [
                [],
                [(name, source.choice(STRANGE))],
                [(name, value), (name, source.choice(STRANGE))],
                [(name, value[: len(value) // 2])],
                [(name, source.randbytes(source.randrange(60)))],
                [(source.choice(STRANGE) or b"x", value)],
                [(name.upper(), value)],
                [(name, value)] * 20,
            ]
        )
        if not fields:
            break
    return fields


def knock(address: tuple[str, int], messages: list[bytes]) -> bytes:
    """Say something on a TCP connection, hang up, and return what the server said."""
    got = b""
    with socket.create_connection(address) as peer, suppress(ConnectionError):
        peer.settimeout(PATIENCE_S)
        for message in messages:
            peer.sendall(message)
            while select.select([peer], [], [], 0)[0] and (more := peer.recv(65_536)):
                got += more
        with suppress(OSError):  # it may have hung up already
            peer.shutdown(socket.SHUT_WR)
        while more := peer.recv(65_536):
            got += more
    return got


class Storm:
    """Attempts on one server, by node 1 and by strangers."""

    def __init__(self, site: Site, seed: int) -> None:
        self.site, self.source = site, random.Random(seed)
        self.address = ("127.0.0.1", site.server.port)
        self.attempts = 0

    def frames(self, count: int) -> None:
        """Send frames as an admitted node, which is admitted again when its session has ended."""
        until = self.attempts + count
        while self.attempts < until:
            token = self.site.server.admit(1)
            number = 1
            for _ in range(self.source.randint(1, 3)):  # connections
                with Raw(self.site.server.port, credentials(1, token)) as raw:
                    token = raw.welcome()
                    frames = []
                    for _ in range(self.source.randint(2, 6)):
                        frames.append(mutated_frame(self.source, number, self.site.config))
                        frames += [data_frame(number)] * self.source.randint(0, 2)
                        number += 1
                    if self.source.random() < 0.2:
                        self.source.shuffle(frames)
                    raw.send(*frames)
                    self.attempts += len(frames)
                    raw.hang_up()
                    raw.outcome()
                if self.site.server.state(1) == "absent":
                    break

    def calls(self, count: int) -> None:
        """Try to connect with metadata that gRPC itself would send."""
        source = self.source
        with grpc.insecure_channel(f"127.0.0.1:{self.site.server.port}", CHANNEL) as channel:
            for _ in range(count):
                texts = ["", "1", "2", "-1", "0.0", "1.1", "x" * 200, "9" * 19, "18446744073709551616", "1e3", "~!@ #"]
                fields: list[tuple[str, str | bytes]] = []
                for key in (NODE_KEY, POSITION_KEY, TOKEN_KEY, "fl-edge-other", "grpc-timeout", "junk-bin"):
                    for _ in range(source.choice([0, 1, 1, 2])):
                        junk = source.randbytes(source.choice([0, 1, 31, 32, 33, 500]))
                        fields.append((key, junk if key.endswith("-bin") else source.choice(texts)))
                fields = [field for field in fields if field[0] != "grpc-timeout"]
                method = source.choice([METHOD] * 9 + ["/fl_edge.Link/Go"])
                with Raw(channel, tuple(fields), method) as raw:
                    raw.send(b"junk")
                    frames, code, *_ = raw.outcome()
                assert frames == []
                assert code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)
                self.attempts += 1

    def requests(self, count: int) -> None:
        """Send hand-made HTTP/2, and what is none."""
        source = self.source
        for _ in range(count // 10):
            parts = [HELLO] if source.random() < 0.9 else []
            for number in range(10):
                block = b"".join(header(*field) for field in mutated_request(source, source.randbytes(32)))
                if source.random() < 0.1:
                    block = block[: source.randrange(len(block) + 1)] + source.randbytes(5)
                flags = source.choice([4, 4, 4, 5, 0])
                parts.append(http2_frame(1, flags, 2 * number + 1, block))
                if source.random() < 0.3:
                    parts.append(http2_frame(source.randrange(12), source.randrange(256), number, source.randbytes(30)))
            if source.random() < 0.1:
                parts = [source.randbytes(source.randrange(2000)) for _ in range(10)]
            self.attempts += 10
            assert not [frame for frame in answers(knock(self.address, parts)) if frame[0] == 0]  # no data


def test_ten_thousand_mutations_later_the_server_is_as_it_was(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    config = LinkConfig(frame_kib=1, max_message_mib=1, grace_s=600.0)
    process = psutil.Process()
    with Site(config) as site:
        site.server.admit(2)
        warm = Storm(site, 1)
        for attempt in (warm.frames, warm.calls, warm.requests):
            attempt(300)
        gc.collect()
        site.server.release(1, "warm")
        eventually(lambda: sum(thread.name.startswith("fl_edge") for thread in threading.enumerate()) == 0)
        threads, memory = threading.active_count(), process.memory_info().rss
        storm = Storm(site, 2)
        storm.frames(6_000)
        storm.calls(2_000)
        storm.requests(2_000)
        assert storm.attempts >= 10_000
        ended = len(site.ended)
        assert ended > 300
        assert {node for node, _ in site.ended} == {1}
        assert all(reason.isprintable() for _, reason in site.ended)
        site.server.release(1, "enough")
        site.messages.clear()
        with echo(site.client(1)):
            site.server.send(1, [bytes(100_000)])
            eventually(lambda: site.messages[1] == [bytes(100_000)])
            site.server.release(1, "thank you")
        eventually(lambda: threading.active_count() <= threads + 2)
        gc.collect()
        assert process.memory_info().rss < memory + 48 * MIB
        assert len(site.ended) == ended
        assert site.server.state(2) == "invited"
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    assert "Traceback" not in "".join(capfd.readouterr())
