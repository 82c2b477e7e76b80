"""Messages in order, each exactly once, over connections that may break at any byte.

A :class:`Stream` is one end of a session. It numbers what it sends and keeps it until the other end has acknowledged
it; it puts together what it receives and drops what it has already. When a connection breaks, the ends tell each other
how far they have received, and the sender goes on from there. Nothing in here knows of gRPC, threads are welcome.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate

from fl_edge.errors import ReplyError
from fl_edge.link.resident.frames import FAREWELL_BYTES, Buffer, Frame, Kind, Position, make_frame


class _Outgoing:
    """An encoded message that is not acknowledged; refers to the bytes it was given."""

    def __init__(self, number: int, parts: Sequence[Buffer]) -> None:
        self.number = number
        self._buffers = [memoryview(part) for part in parts if len(part)]
        self._ends = list(accumulate(len(buffer) for buffer in self._buffers))
        self.total = self._ends[-1] if self._ends else 0

    def slices(self, start: int, end: int) -> list[Buffer]:
        """Return views of the bytes from start to end."""
        found: list[Buffer] = []
        index = bisect_right(self._ends, start)
        while start < end:
            offset = self._ends[index] - len(self._buffers[index])
            stop = min(end, self._ends[index])
            found.append(self._buffers[index][start - offset : stop - offset])
            start, index = stop, index + 1
        return found


class Stream:
    """One end of a session.

    Parameters
    ----------
    frame_bytes
        Payload of a full frame; both ends must have the same.
    max_message_bytes
        A longer message is refused, in both directions.
    """

    def __init__(self, frame_bytes: int, max_message_bytes: int) -> None:
        self._frame_bytes = frame_bytes
        self._max_message_bytes = max_message_bytes
        self._changed = threading.Condition()
        self._outgoing: deque[_Outgoing] = deque()
        self._numbered = 0  # messages given to send()
        self._next = Position(1, 0)  # message and part to be framed next
        self._connection = 0
        self._open = False  # whether that connection stands
        self._farewell: bytes | None = None
        self._received = Position()
        self._chunks: list[Buffer] = []  # of the message under way
        self._expected = 0  # its bytes
        self._acknowledge = False

    # --- connections ---

    @property
    def received(self) -> Position:
        """How far this end has received."""
        with self._changed:
            return self._received

    def connect(self, other: Position) -> int:
        """Begin a connection to an end that has received so far; whatever connection there was ends.

        Returns
        -------
        int
            The connection's number, for :meth:`frames` and :meth:`disconnect`.

        Raises
        ------
        ReplyError
            The other end cannot be there: it has received what was never sent, or lost what it had acknowledged.
        """
        with self._changed:
            first = self._outgoing[0].number if self._outgoing else self._numbered + 1
            whole = other.messages
            if not first - 1 <= whole <= self._numbered or (whole == self._numbered and other.parts):
                raise ReplyError(f"the other end claims to have received {other} of {self._numbered} messages")
            self._forget(whole)
            if self._outgoing and other.parts * self._frame_bytes >= self._outgoing[0].total:
                raise ReplyError(f"the other end claims {other.parts} parts of a message that has fewer")
            self._next = Position(whole + 1, other.parts)
            self._connection += 1
            self._open = True
            self._changed.notify_all()
            return self._connection

    def disconnect(self, connection: int) -> bool:
        """End a connection, and return whether it was the one that stood."""
        with self._changed:
            stood = self._open and connection == self._connection
            if stood:
                self._open = False
                self._changed.notify_all()
            return stood

    # --- sending ---

    def send(self, parts: Sequence[Buffer]) -> None:
        """Queue an encoded message; its bytes must not change from now on.

        Raises
        ------
        ValueError
            It is empty, or longer than `max_message_bytes`.
        """
        with self._changed:
            message = _Outgoing(self._numbered + 1, parts)
            if not message.total:
                raise ValueError("a message without a byte cannot be sent")
            if message.total > self._max_message_bytes:
                raise ValueError(
                    f"a message of {message.total} bytes cannot be sent; it must be at most {self._max_message_bytes} "
                    "(max_message_mib)"
                )
            self._numbered += 1
            self._outgoing.append(message)
            self._changed.notify_all()

    def acknowledge(self) -> None:
        """Say how far this end has received, with or without a message to send."""
        with self._changed:
            self._acknowledge = True
            self._changed.notify_all()

    def finish(self, reason: str) -> None:
        """Let :meth:`frames` end with a farewell, after all that was queued before."""
        with self._changed:
            self._farewell = reason.encode()[:FAREWELL_BYTES].decode(errors="ignore").encode()
            self._changed.notify_all()

    def frames(self, connection: int) -> Iterator[bytes]:
        """Yield what there is to send, waiting for more, until the connection ends or the farewell is said."""
        last = False
        while not last:
            frame, last = self._frame(connection)  # in a call of its own: a message must not live on in this generator
            if frame:
                yield frame

    def _frame(self, connection: int) -> tuple[bytes, bool]:
        """Wait for a frame to send, and return it, and whether it is the last one."""
        with self._changed:
            while not self._due(connection):
                self._changed.wait()
            if connection != self._connection or not self._open:
                return b"", True
            self._acknowledge = False
            acknowledged = self._received.messages
            message, part = self._message_due(), self._next.parts
            if message:
                start, end = part * self._frame_bytes, min((part + 1) * self._frame_bytes, message.total)
                done = end == message.total
                self._next = Position(message.number + 1) if done else Position(message.number, part + 1)
            farewell = self._farewell
        if message:
            number, total, payload = message.number, message.total, message.slices(start, end)
            return make_frame(Kind.DATA, acknowledged, payload, message=number, part=part, total=total), False
        if farewell is not None:
            return make_frame(Kind.FAREWELL, acknowledged, [farewell]), True
        return make_frame(Kind.ACKNOWLEDGEMENT, acknowledged), False

    def _due(self, connection: int) -> bool:
        gone = connection != self._connection or not self._open
        return gone or self._acknowledge or self._message_due() is not None or self._farewell is not None

    def _message_due(self) -> _Outgoing | None:
        """Return the message whose part is to be framed next."""
        index = self._next.messages - self._outgoing[0].number if self._outgoing else 0
        return self._outgoing[index] if index < len(self._outgoing) else None

    def _forget(self, acknowledged: int) -> None:
        if acknowledged > self._numbered:
            raise ReplyError(f"message {acknowledged} was acknowledged; only {self._numbered} were sent")
        while self._outgoing and self._outgoing[0].number <= acknowledged:
            self._outgoing.popleft()
        self._next = max(self._next, Position(acknowledged + 1))

    # --- receiving ---

    def receive(self, frame: Frame) -> list[Buffer] | None:
        """Take in a frame of data or an acknowledgement.

        Returns
        -------
        list[Buffer] or None
            The bytes of a message, in chunks, if this frame completed it. What had been received before is dropped.

        Raises
        ------
        ReplyError
            A frame that cannot follow the last one; nothing of it was taken in.
        """
        with self._changed:
            self._forget(frame.acknowledged)
            if frame.kind != Kind.DATA:
                return None
            at = Position(frame.message, frame.part)
            due = Position(self._received.messages + 1, self._received.parts)
            if at < due:
                return None
            self._check(frame, at, due)
            self._chunks.append(frame.payload)
            if (frame.part + 1) * self._frame_bytes < frame.total:
                self._received = Position(self._received.messages, frame.part + 1)
                return None
            chunks, self._chunks = self._chunks, []
            self._received = Position(frame.message)
            if frame.part:  # a short message is acknowledged by the next frame; a long one is worth a frame of its own
                self._acknowledge = True
                self._changed.notify_all()
            return chunks

    def _check(self, frame: Frame, at: Position, due: Position) -> None:
        if at != due:
            raise ReplyError(f"part {at} was received where {due} was due")
        if frame.total > self._max_message_bytes:
            raise ReplyError(f"a message of {frame.total} bytes was announced; {self._max_message_bytes} are allowed")
        if frame.part and frame.total != self._expected:
            raise ReplyError(f"a message of {self._expected} bytes goes on as one of {frame.total}")
        if len(frame.payload) != min(self._frame_bytes, frame.total - frame.part * self._frame_bytes):
            raise ReplyError(f"part {at} of a message of {frame.total} bytes has {len(frame.payload)} bytes")
        self._expected = frame.total
