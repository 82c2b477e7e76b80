"""The server's end: a gRPC server on which each admitted node keeps one session.

Knows nodes, tokens and bytes; nothing of Flower.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from functools import partial
from typing import Any

import grpc

from fl_edge.config import check
from fl_edge.errors import ConfigError, ReplyError
from fl_edge.link.resident.config import TLS, LinkConfig
from fl_edge.link.resident.frames import (
    HEADER_BYTES,
    METHOD,
    NODE_KEY,
    POSITION_KEY,
    TOKEN_KEY,
    Buffer,
    Frame,
    Kind,
    Position,
    make_welcome,
    read_farewell,
    read_frame,
)
from fl_edge.link.resident.stream import Stream
from fl_edge.link.resident.tokens import Tokens

log = logging.getLogger("flwr.fl_edge")
# gRPC logs a traceback for each path or header that is not UTF-8: any stranger could fill the log with them
logging.getLogger("grpc._cython.cygrpc").addFilter(lambda record: "Invalid encoding" not in str(record.msg))

_SPARE_CALLS = 16  # calls at once beyond one a node: reconnections, and peers that will be refused
_HANDSHAKE_S = 10  # for TLS and HTTP/2; a connection without a call is closed after as long
_METADATA_BYTES = 4096
_MOST_NODES = 2**63  # a node's number must fit into Flower's messages
_CANCEL_S = 1.0  # for calls to end that were cut off; gRPC itself waits until a frozen peer misses a heartbeat


class Session:
    """A node that was admitted: its stream, and the tokens it may come with."""

    def __init__(self, node_id: int, config: LinkConfig) -> None:
        self.node_id = node_id
        self.stream = Stream(config.frame_bytes, config.max_message_bytes)
        self.tokens = Tokens()
        self.connections = 0  # that were ever made
        self.connected = False
        self.busy = False  # with a message from it
        self.expiry: threading.Timer | None = None  # runs while it is cut

    def part(self, reason: str) -> None:
        """Accept no connection any more; say farewell on the one that stands."""
        self.tokens.void()
        self.stream.finish(reason)
        if self.expiry:
            self.expiry.cancel()


class LinkServer:
    """Listens for admitted nodes, and carries messages to and from them.

    Parameters
    ----------
    config
        Limits and time-outs.
    listen
        ``host:port``; port 0 takes a free one.
    tls
        Certificate; without it everything travels in the clear.
    on_message
        Called with a node and the chunks of a message from it, in a thread of that node. As long as it does not return,
        no more is read from the node.
    on_end
        Called once for a session that ended by itself (not by :meth:`release`, :meth:`close` or another :meth:`admit`):
        with the node and the reason. What it had sent and was not taken in by then is dropped.
    opens
        Asked whether a token begins a session for a node that has none. By default none does: nodes are admitted.

    Raises
    ------
    ConfigError
        A setting is out of range, the address cannot be listened on, or the certificate does not work.
    """

    def __init__(
        self,
        config: LinkConfig,
        listen: str,
        tls: TLS | None,
        on_message: Callable[[int, Sequence[Buffer]], None],
        on_end: Callable[[int, str], None],
        opens: Callable[[bytes], bool] | None = None,
    ) -> None:
        check(config)
        self._config = config
        self._on_message = on_message
        self._on_end = on_end
        self._opens = opens
        self._changed = threading.Condition()
        self._sessions: dict[int, Session] = {}
        self._server = grpc.server(
            _ThreadPerCall(),  # type: ignore[arg-type] # any Executor will do, whatever the stubs say
            options=_options(config),
            maximum_concurrent_rpcs=config.max_nodes + _SPARE_CALLS,
        )
        self._server.add_generic_rpc_handlers((_Route(self._stay),))
        self.port = self._listen(listen, tls)
        self._server.start()

    def _listen(self, listen: str, tls: TLS | None) -> int:
        try:
            if not 0 <= int(listen.rpartition(":")[2]) < 2**16:  # gRPC would take the remainder
                raise ValueError
            if tls is None:
                return self._server.add_insecure_port(listen)
            credentials = grpc.ssl_server_credentials([(tls.key, tls.certificate)])
            return self._server.add_secure_port(listen, credentials)
        except (RuntimeError, ValueError):
            raise ConfigError(
                f"cannot listen on {listen}: it must be host:port with a free port of this machine"
                + (", and certificate and key must belong together" if tls else "")
            ) from None

    # --- for the owner ---

    def admit(self, node_id: int) -> bytes:
        """Begin a session for a node, ending the one it may have, and return the token for its first connection.

        Raises
        ------
        ConfigError
            There are `max_nodes` sessions.
        """
        with self._changed:
            old = self._sessions.pop(node_id, None)
            if len(self._sessions) >= self._config.max_nodes:
                raise ConfigError(f"{self._config.max_nodes} nodes are connected, no more are allowed (max_nodes)")
            session = self._sessions[node_id] = Session(node_id, self._config)
            token = session.tokens.issue()
        if old:
            old.part("another session was begun for this node")
        return token

    def send(self, node_id: int, parts: Sequence[Buffer]) -> None:
        """Queue an encoded message to an admitted node; it leaves as soon as the node is connected.

        Raises
        ------
        KeyError
            The node has no session.
        ValueError
            The message is too long.
        """
        self._sessions[node_id].stream.send(parts)

    def nodes(self) -> list[int]:
        """Return the nodes that have a session, be it cut."""
        return list(self._sessions)

    def state(self, node_id: int) -> str:
        """Return ``absent`` (no session), ``invited`` (no connection yet), ``connected`` or ``cut``."""
        session = self._sessions.get(node_id)
        if session is None:
            return "absent"
        return "connected" if session.connected else "cut" if session.connections else "invited"

    def release(self, node_id: int, reason: str) -> None:
        """End a session: what was queued is sent, then the farewell. Its tokens are void at once."""
        with self._changed:
            session = self._sessions.pop(node_id, None)
        if session:
            session.part(reason)

    def expel(self, node_id: int, reason: str) -> None:
        """End a session as if the node had been lost: `on_end` is called."""
        if session := self._sessions.get(node_id):
            self._end(session, reason)

    def close(self, reason: str, patience_s: float = 5.0) -> None:
        """End all sessions and the server, when the farewells were said or `patience_s` has passed."""
        with self._changed:
            sessions = list(self._sessions.values())
            self._sessions.clear()
        for session in sessions:
            session.part(reason)
        deadline = time.monotonic() + patience_s
        with self._changed:
            self._changed.wait_for(lambda: not any(each.connected for each in sessions), deadline - time.monotonic())
        remaining = max(0.0, deadline - time.monotonic())
        self._server.stop(remaining).wait(remaining + _CANCEL_S)

    # --- sessions ---

    def _end(self, session: Session, reason: str) -> None:
        """End a session that was not released."""
        with self._changed:
            if self._sessions.get(session.node_id) is not session:
                return
            del self._sessions[session.node_id]
        session.part(reason)
        self._on_end(session.node_id, reason)

    def _stay(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Serve one connection; returns the frames to send."""
        offered = {key: value for key, value in context.invocation_metadata() or () if key.startswith("fl-edge-")}
        with self._changed:
            session, token, position = self._recognise(offered)
            if session is None:
                # one answer for all who are refused: they learn nothing
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "refused")
                raise AssertionError("abort raises")
            try:
                connection = session.stream.connect(position)
            except ReplyError:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, "out of step")
            session.connections += 1
            session.connected = True
            if session.expiry:
                session.expiry.cancel()
            self._changed.notify_all()
            welcome = make_welcome(session.tokens.issue(used=token), session.stream.received)
        if not context.add_callback(partial(self._disconnected, session, connection)):
            self._disconnected(session, connection)  # it is gone already
        reader = partial(self._read, session, connection, requests, context)
        threading.Thread(target=reader, name=f"fl_edge-read-{session.node_id}", daemon=True).start()
        return _after(welcome, session.stream.frames(connection))

    def _recognise(self, offered: dict[str, Any]) -> tuple[Session | None, bytes, Position]:
        """Return the session that the metadata are good for, if any."""
        token = offered.get(TOKEN_KEY, b"")
        token = token if isinstance(token, bytes) else b""
        node = str(offered.get(NODE_KEY, ""))
        number = int(node) if node.isascii() and node.isdecimal() and len(node) <= 20 else None
        session = None if number is None else self._sessions.get(number)
        good = (session or _nobody).tokens.accept(token)
        try:
            position = Position.parse(str(offered.get(POSITION_KEY, "")))
        except ReplyError:
            return None, token, Position()
        if number is not None and session is None and position == Position():
            session = self._opened(number, token)
            good = session is not None
        return (session if good else None), token, position

    def _opened(self, node_id: int, token: bytes) -> Session | None:
        """Begin a session for a node that comes by itself, if its token is good for that and there is room."""
        room = 0 < node_id < _MOST_NODES and len(self._sessions) < self._config.max_nodes
        if self._opens is None or not self._opens(token) or not room:
            return None
        session = self._sessions[node_id] = Session(node_id, self._config)
        session.tokens.issue(used=token)
        return session

    def _read(self, session: Session, connection: int, requests: Iterator[bytes], context: Any) -> None:
        """Take in what a node sends on one connection."""
        try:
            for data in requests:
                frame = read_frame(data)
                if frame.kind == Kind.FAREWELL:
                    self._end(session, f"the node left: {read_farewell(frame)}")
                    return  # the call ends when the farewell has been answered
                if frame.kind == Kind.WELCOME:
                    raise ReplyError("only a server welcomes")
                self._receive(session, connection, frame)
        except ReplyError as error:
            self._end(session, f"the node sent what cannot be: {error}")
        except grpc.RpcError:
            return  # the connection broke; the callback of its context knows
        except Exception as error:
            log.exception("a message from node %d could not be taken in", session.node_id)
            self._end(session, f"its message could not be taken in: {type(error).__name__}")
        context.cancel()

    def _receive(self, session: Session, connection: int, frame: Frame) -> None:
        """Take in a frame, when those before it have been taken in, be it from an older connection."""
        with self._changed:
            if connection == session.connections:
                session.tokens.confirm()
            self._changed.wait_for(lambda: not session.busy or connection != session.connections)
            if connection != session.connections:
                return  # it comes again on the newer connection
            session.busy = True
        try:
            chunks = session.stream.receive(frame)
            if chunks and self._sessions.get(session.node_id) is session:
                self._on_message(session.node_id, chunks)
        finally:
            with self._changed:
                session.busy = False
                self._changed.notify_all()

    def _disconnected(self, session: Session, connection: int) -> None:
        """Give a node that lost its connection time to come back."""
        with self._changed:
            if not session.stream.disconnect(connection):
                return  # a newer connection stands
            session.connected = False
            self._changed.notify_all()
            if self._sessions.get(session.node_id) is not session:
                return  # it has ended
            reason = f"no connection for {self._config.grace_s:g} s"
            session.expiry = threading.Timer(self._config.grace_s, self._expire, (session, connection, reason))
            session.expiry.daemon = True
            session.expiry.start()

    def _expire(self, session: Session, connection: int, reason: str) -> None:
        if not session.connected and session.connections == connection:
            self._end(session, reason)


_nobody = Session(0, LinkConfig())  # a stranger's token is compared as carefully as any other
_nobody.tokens.issue()


def _after(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _options(config: LinkConfig) -> list[tuple[str, int]]:
    """Return gRPC's options: limits on strangers, and signs of life."""
    return [
        ("grpc.so_reuseport", 0),  # a port in use must be an error
        ("grpc.max_receive_message_length", config.frame_bytes + HEADER_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
        ("grpc.max_concurrent_streams", 2),
        ("grpc.max_allowed_incoming_connections", 2 * (config.max_nodes + _SPARE_CALLS)),
        ("grpc.server_handshake_timeout_ms", 1000 * _HANDSHAKE_S),
        ("grpc.http2.settings_timeout", 1000 * _HANDSHAKE_S),
        ("grpc.max_connection_idle_ms", 1000 * _HANDSHAKE_S),
        ("grpc.keepalive_time_ms", int(1000 * config.heartbeat_s)),
        ("grpc.keepalive_timeout_ms", int(1000 * config.heartbeat_s)),
        ("grpc.http2.ping_timeout_ms", int(1000 * config.heartbeat_s)),
        ("grpc.http2.min_ping_interval_without_data_ms", int(500 * config.heartbeat_s)),
        ("grpc.http2.max_pings_without_data", 0),
    ]


class _Route(grpc.GenericRpcHandler):
    """Serves :data:`METHOD` and nothing else; messages are bytes."""

    def __init__(self, stay: Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]) -> None:
        self._handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(stay)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        return self._handler if handler_call_details.method == METHOD else None


class _ThreadPerCall(futures.Executor):
    """Runs each call in a thread of its own: calls last as long as sessions.

    Unlike a pool's, the threads do not keep a process alive whose ServerApp forgot to close its grid.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        """Run a function in a new thread."""
        future: futures.Future[Any] = futures.Future()

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # a future carries whatever was raised
                future.set_exception(error)

        threading.Thread(target=work, name="fl_edge-link", daemon=True).start()
        return future
