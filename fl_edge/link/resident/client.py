"""A client's end: one session with the server, kept over connections that break.

Knows an address, a token and bytes; nothing of Flower.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import grpc

from fl_edge.errors import ReplyError
from fl_edge.link.resident.frames import (
    HEADER_BYTES,
    METHOD,
    NODE_KEY,
    POSITION_KEY,
    TOKEN_KEY,
    Buffer,
    Frame,
    Kind,
    read_farewell,
    read_frame,
    read_welcome,
)
from fl_edge.link.resident.stream import Stream

_WAITING_MESSAGES = 16  # that were received and not taken; then nothing more is read
_RETRY_S = 0.2
_FINAL = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)


@dataclass(frozen=True)
class Invitation:
    """All that a client needs to come.

    Attributes
    ----------
    address
        ``host:port``.
    authority
        PEM of the certificate authority to trust; empty for a connection in the clear.
    token
        For the first connection; never shown.
    grace_s, heartbeat_s, frame_bytes, max_message_bytes
        As the server has them.
    """

    address: str
    node_id: int
    authority: bytes
    token: bytes = field(repr=False)
    grace_s: float
    heartbeat_s: float
    frame_bytes: int
    max_message_bytes: int


class LinkClient:
    """Keeps a session with the server that sent the invitation.

    ::

        client = LinkClient(invitation)
        for chunks in client.messages():
            client.send(answer(chunks))
        print(client.reason)  # why it ended

    Attributes
    ----------
    reason
        Why the session ended; empty as long as it lasts.
    refused
        Whether the server did not take the invitation's token, so that there never was a session.
    """

    def __init__(self, invitation: Invitation) -> None:
        self.reason = ""
        self.refused = False
        self._invitation = invitation
        self._token = invitation.token
        self._stream = Stream(invitation.frame_bytes, invitation.max_message_bytes)
        self._changed = threading.Condition()
        self._arrived: deque[list[Buffer]] = deque()
        self._leaving = False  # nobody takes what arrives any more
        self._stop = threading.Event()  # no connection shall be made any more
        self._ended = threading.Event()
        self._call: grpc.Call | None = None
        self._trouble = ""  # with the last connection
        threading.Thread(target=self._keep, name="fl_edge-link", daemon=True).start()

    def messages(self) -> Iterator[list[Buffer]]:
        """Yield the chunks of each message, until the session ends; then :attr:`reason` says why."""
        while chunks := self._take():
            yield chunks
            del chunks  # or it would live until the next message is there

    def send(self, parts: Sequence[Buffer]) -> None:
        """Queue an encoded message.

        Raises
        ------
        ValueError
            It is empty or too long.
        """
        self._stream.send(parts)

    def close(self, reason: str, patience_s: float = 5.0) -> None:
        """Leave: what was queued is sent, then the farewell; after `patience_s` the connection is cut.

        What has arrived and was not taken is dropped.
        """
        with self._changed:
            self.reason = self.reason or reason
            self._leaving = True
            self._arrived.clear()
            self._changed.notify_all()
        self._stream.finish(reason)
        if not self._ended.wait(patience_s):
            self._stop.set()
            if call := self._call:
                call.cancel()

    def _take(self) -> list[Buffer] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._ended.is_set())
            if not self._arrived:
                return None
            self._changed.notify_all()
            return self._arrived.popleft()

    def _put(self, chunks: list[Buffer]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._arrived) < _WAITING_MESSAGES)  # `close` makes room as well
            if not self._leaving:
                self._arrived.append(chunks)
                self._changed.notify_all()

    def _end(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._stop.set()

    def _keep(self) -> None:
        """Connect again and again, until the session has ended or the grace is over."""
        own = self._invitation
        last_heard = time.monotonic()
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                if self._connect_once():
                    last_heard = time.monotonic()
                elif time.monotonic() - last_heard > own.grace_s:
                    self._end(f"no connection to {own.address} for {own.grace_s:g} s: {self._trouble}")
                self._stop.wait(_RETRY_S - (time.monotonic() - began))
        finally:
            with self._changed:
                self._ended.set()
                self._changed.notify_all()

    def _connect_once(self) -> bool:
        """Serve one connection until it ends, and return whether the server was there."""
        welcomed = False
        with self._channel() as channel:
            metadata = (
                (NODE_KEY, str(self._invitation.node_id)),
                (TOKEN_KEY, self._token),
                (POSITION_KEY, str(self._stream.received)),
            )
            outgoing = _Outgoing(self._stream)
            method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
            self._call = call = method(iter(outgoing), metadata=metadata)
            if self._stop.is_set():  # `close` may have seen the call before
                call.cancel()
            try:
                for data in call:
                    frame = read_frame(data)
                    if not welcomed:
                        self._token, position = read_welcome(_expect(frame, Kind.WELCOME))
                        outgoing.begin(self._stream.connect(position))
                        self._stream.acknowledge()  # tells the server that the new token is here
                        welcomed = True
                    elif frame.kind == Kind.FAREWELL:
                        self._end(read_farewell(frame))
                        return True
                    else:
                        self._receive(frame)
            except grpc.RpcError as error:
                error.__traceback__ = None  # it refers to the call, which is the error: see below
                self._trouble = " ".join((error.details() or error.code().name).split())
                if error.code() in _FINAL:
                    self.refused = self._token == self._invitation.token
                    self._end(f"the server at {self._invitation.address} refused this client")
            except ReplyError as error:
                self._end(f"the server sent what cannot be: {error}")
            finally:
                outgoing.end()
                call.cancel()
                self._call = None  # a call that is left to the end of the process may never let it end
        return welcomed

    def _receive(self, frame: Frame) -> None:
        if chunks := self._stream.receive(frame):
            self._put(chunks)

    def _channel(self) -> grpc.Channel:
        own = self._invitation
        heartbeat_ms = int(1000 * own.heartbeat_s)
        options = [
            ("grpc.max_receive_message_length", own.frame_bytes + HEADER_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", heartbeat_ms),
            ("grpc.keepalive_timeout_ms", heartbeat_ms),
            ("grpc.http2.ping_timeout_ms", heartbeat_ms),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.min_reconnect_backoff_ms", max(1000, int(250 * own.grace_s))),  # the time a connection attempt has
            ("grpc.use_local_subchannel_pool", 1),  # a channel of one's own, not one that is backing off
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),
        ]
        if not own.authority:
            return grpc.insecure_channel(own.address, options)
        return grpc.secure_channel(own.address, grpc.ssl_channel_credentials(own.authority), options)


class _Outgoing:
    """What gRPC takes the frames to send from: nothing until the server has said how far it is."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._connection: int | None = None
        self._settled = threading.Event()

    def begin(self, connection: int) -> None:
        self._connection = connection
        self._settled.set()

    def end(self) -> None:
        if self._connection is not None:
            self._stream.disconnect(self._connection)
        self._settled.set()

    def __iter__(self) -> Iterator[bytes]:
        self._settled.wait()
        if self._connection is not None:
            yield from self._stream.frames(self._connection)


def _expect(frame: Frame, kind: Kind) -> Frame:
    if frame.kind != kind:
        raise ReplyError(f"a frame of kind {frame.kind.name} was received where {kind.name} was due")
    return frame
