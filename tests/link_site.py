"""What tests of LinkServer and LinkClient are made of: a server, a network that can be cut, and strangers."""

from __future__ import annotations

import dataclasses
import queue
import select
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from fl_edge.link.certificates import make_certificates
from fl_edge.link.resident.client import Invitation, LinkClient
from fl_edge.link.resident.config import TLS, LinkConfig
from fl_edge.link.resident.frames import (
    METHOD,
    NODE_KEY,
    POSITION_KEY,
    TOKEN_KEY,
    Buffer,
    Kind,
    make_frame,
    read_frame,
    read_welcome,
)
from fl_edge.link.resident.server import LinkServer

PATIENCE_S = 60.0  # a safety net only
A_MOMENT_S = 0.1  # long enough for something to happen that must not
MIB = 1024**2
Metadata = tuple[tuple[str, str | bytes], ...]


def eventually(condition: Callable[[], Any]) -> None:
    """Wait until something is so; how long it takes is no part of any test."""
    for _ in range(int(PATIENCE_S / 0.002)):
        if condition():
            return
        threading.Event().wait(0.002)
    raise AssertionError("it never came to be")


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


def make_tls(folder: Path) -> TLS:
    authority, certificate, key = (folder / f"{name}.pem" for name in ("ca", "server", "key"))
    make_certificates(authority, certificate, key)
    return TLS.from_files(certificate, key, authority)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


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
