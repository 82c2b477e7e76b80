"""The frame: what one gRPC message between the server and a resident client holds.

A Flower message may be a gigabyte; it travels as frames of at most `frame_bytes`, so that neither side ever copies or
queues more than a frame at once and a cut connection costs no more than one. All numbers are little-endian.

======  ====  ============  ==================================================================================
offset  size  field         meaning
======  ====  ============  ==================================================================================
0       2     magic         ``FE``
2       1     version       1; any other is refused
3       1     kind          1 welcome, 2 data, 3 acknowledgement, 4 farewell
4       4     part          which part of its message, from 0 (data; else 0)
8       8     message       number of the message in its direction, from 1 (data; else 0)
16      8     acknowledged  the highest number up to which the sender has received every message whole
24      8     total         bytes of the whole message (data; else 0), at most `max_message_bytes`
32      -     payload       see below, at most `frame_bytes`
======  ====  ============  ==================================================================================

- *welcome*, server to client, the first frame of every connection: the 32 bytes of the token for the next connection,
  then how far the server has received (u64 whole messages, u32 parts of the next one).
- *data*: bytes ``[part * frame_bytes, (part + 1) * frame_bytes)`` of a message encoded by
  :mod:`fl_edge.link.resident.codec`; every part but the last is full.
- *acknowledgement*: nothing; its field `acknowledged` is what counts, as it does in every frame.
- *farewell*: why the sender ends the session, UTF-8, at most 1 KiB. Nothing follows it.

A client opens a connection with gRPC metadata (:data:`NODE_KEY`, :data:`TOKEN_KEY`, :data:`POSITION_KEY`): who it is,
its token, and how far it has received. Who does not present a valid token is cut off before any frame is read.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from fl_edge.errors import ReplyError

Buffer = bytes | memoryview

METHOD = "/fl_edge.Link/Stay"
NODE_KEY, TOKEN_KEY, POSITION_KEY = "fl-edge-node", "fl-edge-token-bin", "fl-edge-received"
TOKEN_BYTES = 32
FAREWELL_BYTES = 1024

_MAGIC, _VERSION = b"FE", 1
_HEADER = struct.Struct("<2sBBIQQQ")
_WELCOME = struct.Struct(f"<{TOKEN_BYTES}sQI")
HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    """What a frame is for."""

    WELCOME = 1
    DATA = 2
    ACKNOWLEDGEMENT = 3
    FAREWELL = 4


_KINDS = {int(kind): kind for kind in Kind}


class Position(NamedTuple):
    """How far a receiver has come: whole messages, and parts of the next one."""

    messages: int = 0
    parts: int = 0

    def __str__(self) -> str:
        return f"{self.messages}.{self.parts}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read what ``str`` wrote.

        Raises
        ------
        ReplyError
            Anything else.
        """
        numbers = text.split(".")
        if len(text) > 32 or len(numbers) != 2 or not all(each.isascii() and each.isdecimal() for each in numbers):
            raise ReplyError("a position must be two numbers with a dot between them")
        return cls(*map(int, numbers))


class Frame(NamedTuple):
    """A frame that was received; `payload` is a view of what gRPC delivered."""

    kind: Kind
    part: int
    message: int
    acknowledged: int
    total: int
    payload: memoryview


def make_frame(
    kind: Kind, acknowledged: int, payload: Sequence[Buffer] = (), *, message: int = 0, part: int = 0, total: int = 0
) -> bytes:
    """Put a frame together; the payload is copied once."""
    return b"".join([_HEADER.pack(_MAGIC, _VERSION, kind, part, message, acknowledged, total), *payload])


def read_frame(data: bytes) -> Frame:
    """Check a frame and take it apart, without copying its payload.

    Raises
    ------
    ReplyError
        It is no frame of this version, or its fields contradict its kind.
    """
    if len(data) < HEADER_BYTES:
        raise ReplyError(f"a frame of {len(data)} bytes is shorter than its header of {HEADER_BYTES}")
    magic, version, kind, part, message, acknowledged, total = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise ReplyError(f"a frame begins with {magic!r} version {version}, not with {_MAGIC!r} version {_VERSION}")
    size = len(data) - HEADER_BYTES
    if kind == Kind.DATA:
        wrong = not message or not 0 < size <= total
    elif kind == Kind.WELCOME:
        wrong = size != _WELCOME.size
    else:
        wrong = size > (FAREWELL_BYTES if kind == Kind.FAREWELL else 0)
    if kind not in _KINDS or wrong or (kind != Kind.DATA and (part or message or total)):
        raise ReplyError(f"a frame contradicts itself: kind {kind}, message {message}, {size} of {total} bytes")
    return Frame(_KINDS[kind], part, message, acknowledged, total, memoryview(data)[HEADER_BYTES:])


def make_welcome(token: bytes, received: Position) -> bytes:
    """Return the frame that answers a valid token."""
    return make_frame(Kind.WELCOME, received.messages, [_WELCOME.pack(token, received.messages, received.parts)])


def read_welcome(frame: Frame) -> tuple[bytes, Position]:
    """Return the token for the next connection, and how far the server has received."""
    token, messages, parts = _WELCOME.unpack(frame.payload)
    return token, Position(messages, parts)


def read_farewell(frame: Frame) -> str:
    """Return why the other end ends the session, as one printable line."""
    text = bytes(frame.payload).decode(errors="replace")
    return "".join(each if each.isprintable() else " " for each in text).strip()
