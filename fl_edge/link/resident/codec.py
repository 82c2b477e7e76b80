"""Flower messages as bytes, and back: what travels between a ServerApp and its resident clients.

An encoded message is

========================  ==============================================================================
bytes                     meaning
========================  ==============================================================================
4                         length of the header, unsigned, little-endian
length of the header      header, msgpack
the rest                  one segment an array, without gaps, in the header's order
========================  ==============================================================================

The header holds msgpack arrays and scalars only (no maps, hence no duplicate keys, and no extension types)::

    [version, metadata, error, records]           error or records is nil
    metadata  [run_id, message_id, src_node_id, dst_node_id, reply_to_message_id, group_id, created_at, ttl,
               message_type, src_task_id, dst_task_id]
    error     [code, reason]
    records   [[kind, name, keys, values], ...]   kind "array", "config" or "metric"; one value a key

A value of a ConfigRecord or MetricRecord is a msgpack scalar or an array of scalars of one kind, and comes back with
its exact Python type. A value of an ArrayRecord is ``[dtype, shape, stype, length of its segment, encoding]``; the
encoding is "raw" (the segment is the array's bytes) or a scheme of :mod:`fl_edge.link.resident.compression`.

What may be sent is what Flower itself can send: integers from -2**63 to 2**64 - 1, and no list that needs both ends of
that range. Beyond that, a header has at most 16 MiB, dtype and stype 64 characters, a shape 64 axes of 0 to 2**63 - 1
(and see :class:`Limits`). The decoder trusts nothing: memory goes to what has arrived, never to what is announced; a
segment is copied at most once, and a header takes at most 50 times its length while it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, TypeVar

import msgpack
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict

from fl_edge.errors import ReplyError
from fl_edge.link.arrays import FastArray
from fl_edge.link.resident.checks import (
    KINDS,
    METADATA,
    check_array,
    check_count,
    check_error,
    check_metadata,
    describes_array,
    in_range,
    is_plain,
    place,
    place_of,
    sequence,
    shown,
)
from fl_edge.link.resident.compression import RAW, Buffer, Compressor, decompress

VERSION = 1

T = TypeVar("T")

# What decoded messages and their parts are made like.
_RECORDS: dict[str, Any] = {"array": ArrayRecord(), "config": ConfigRecord(), "metric": MetricRecord()}
_CONTENT = RecordDict()
_MESSAGE: Message = Message(metadata=Metadata(0, "", 0, 0, "", "", 0.0, 0.0, "query"), content=_CONTENT)  # type: ignore[call-overload]
_METADATA_KEYS = tuple(f"_{field}" for field in METADATA)  # where Flower keeps them
_metadata_of = itemgetter(*_METADATA_KEYS)


@dataclass(frozen=True)
class Limits:
    """What a received message may have at most.

    Parameters
    ----------
    header_bytes
        Length of the header in bytes.
    records, arrays
        Number of records in the message, and of arrays in all its records together.
    """

    header_bytes: int = 16 * 2**20
    records: int = 10_000
    arrays: int = 100_000


DEFAULT_LIMITS = Limits()


def encode(message: Message, compressor: Compressor | None = None) -> list[Buffer]:
    """Encode a message.

    Parameters
    ----------
    message
        Any message that Flower can send.
    compressor
        Asked for each array; without one, arrays travel as they are.

    Returns
    -------
    list[bytes | memoryview]
        Parts whose concatenation is the encoded message. Uncompressed arrays are not copied: the parts are their bytes.

    Raises
    ------
    TypeError, ValueError
        Something that cannot be sent; the line names record and key.
    """
    metadata = list(_metadata_of(message.metadata.__dict__))
    metadata[6:8] = map(float, metadata[6:8])  # Flower, too, sends a ttl of 10 as 10.0
    check_metadata(metadata)
    segments: list[Buffer] = []
    error = records = None
    if message.has_error():
        error = (message.error.code, message.error.reason)
        check_error(error)
    else:
        content = message.content.__dict__["_data"]  # views of a record look up each key in Python
        records = [_encode_record(message, name, content[name], segments, compressor) for name in content]
        check_count(len(records), DEFAULT_LIMITS.records, "records")
        check_count(len(segments), DEFAULT_LIMITS.arrays, "arrays")
    try:
        header = msgpack.packb((VERSION, metadata, error, records))
    except UnicodeEncodeError as problem:
        raise ValueError(f"{place_of(problem.object, records or [])}text is not Unicode") from problem
    check_count(len(header), DEFAULT_LIMITS.header_bytes, "bytes outside arrays")
    return [len(header).to_bytes(4, "little") + header, *segments]


def _encode_record(
    message: Message, name: str, record: Any, segments: list[Buffer], compressor: Compressor | None
) -> list[Any]:
    """Return a record's entry in the header, and append the segments of its arrays."""
    values: list[Any] = []
    data = record.__dict__["_data"]
    if isinstance(record, ArrayRecord):
        kind = "array"
        for key, array in data.items():
            data_of_array = array.buffer if type(array) is FastArray else array.data
            readable = type(array) is FastArray or isinstance(data_of_array, bytes)
            if not (readable and describes_array(array.dtype, array.shape, array.stype)):
                raise ValueError(f"{place(name, key)}an array of {array.dtype}, {array.shape} cannot be sent")
            encoding, segment = RAW, data_of_array
            if compressor is not None:
                encoding, segment = compressor.compress(array, (message.metadata.message_type, name, key))
            values.append((array.dtype, array.shape, array.stype, len(segment), encoding))
            segments.append(segment)
    else:
        kind = "config" if isinstance(record, ConfigRecord) else "metric"
        scalars = KINDS[kind]
        for key, value in data.items():
            values.append(value if is_plain(value, scalars) else _plain(value, scalars, name, key))
    return [kind, name, list(data), values]


def _plain(value: Any, scalars: frozenset[type], name: str, key: str) -> Any:
    """Return a value as Flower would send it whose type is only derived from one of Flower's (NumPy's, an enum's)."""
    for base in (bool, int, float, str, bytes):
        items = value if isinstance(value, list) else [value]
        if base in scalars and all(isinstance(item, base) for item in items):
            if base is int:  # a list of integers may hold truth values
                items = [int(item) for item in items]
                if not in_range(items):
                    raise ValueError(f"{place(name, key)}integers have more than 64 bits")
                return items if isinstance(value, list) else items[0]
            return value
    raise TypeError(f"{place(name, key)}{shown(value)} is no value that Flower can send")


def decode(chunks: Sequence[Buffer], limits: Limits = DEFAULT_LIMITS) -> Message:
    """Decode a message.

    Parameters
    ----------
    chunks
        The encoded message, cut anywhere. Views must be of single bytes.
    limits
        What it may have at most.

    Returns
    -------
    Message
        Its arrays may share the memory of ``chunks`` of bytes; of those that can be changed they share none.

    Raises
    ------
    ReplyError
        Damaged or foreign bytes, whatever is in them; one line says what is wrong.
    """
    try:
        reader = _Reader(chunks)
        length = int.from_bytes(reader.take(4), "little")
        check_count(length, limits.header_bytes, "bytes outside arrays")
        metadata, error, records = _read_header(reader.take(length))
        if error is not None:
            check_count(reader.left, 0, "bytes after an error")
            return _like(_MESSAGE, _metadata=metadata, _content=None, _error=Error(*error))
        content = _read_records(records, reader, limits)
    except ValueError as problem:
        raise ReplyError(f"message cannot be read: {problem}") from problem
    return _like(_MESSAGE, _metadata=metadata, _content=content)


def _read_header(header: bytes) -> tuple[Metadata, Any, Any]:
    """Return the metadata; and of the error and the records, neither of which has been looked into, one."""
    try:
        fields = msgpack.unpackb(header, use_list=False, max_map_len=0, max_ext_len=0)
    except ValueError as problem:
        raise ValueError(f"its header is no msgpack: {type(problem).__name__}") from problem
    version, metadata, error, records = sequence(fields, 4, "header")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"its version is {shown(version)}, {VERSION} is understood")
    check_metadata(sequence(metadata, len(METADATA), "metadata"))
    if (error is None) == (records is None):
        raise ValueError("it must hold either an error or records")
    if error is not None:
        check_error(error)
    if not _is_message_type(metadata[8]):
        raise ValueError(f"its type is {shown(metadata[8])}")
    return _like(_MESSAGE.metadata, **dict(zip(_METADATA_KEYS, metadata, strict=True))), error, records


@lru_cache(maxsize=256)
def _is_message_type(text: str) -> bool:
    """Whether Flower takes it for a type of message."""
    try:
        Metadata(0, "", 0, 0, "", "", 0.0, 0.0, text)
    except ValueError:
        return False
    return True


def _like(template: T, **changed: Any) -> T:
    """Return an object of Flower's that is like another but for some attributes.

    Its constructors check, on each message, what has been checked here already, at several times the price. A template
    made by them keeps what later releases may add.
    """
    made: T = object.__new__(type(template))
    made.__dict__.update(template.__dict__, **changed)
    return made


def _read_records(entries: Any, reader: _Reader, limits: Limits) -> RecordDict:
    """Build the records of a message; everything is checked before the first segment is read."""
    contents: dict[str, Any] = {}
    arrays: list[tuple[dict[str, Any], str]] = []
    check_count(len(sequence(entries, None, "records")), limits.records, "records")
    for entry in entries:
        kind, name, keys, values = sequence(entry, 4, "record")
        names = (name, *sequence(keys, None, "keys"))
        if not all(type(text) is str for text in names) or name in contents or len(set(keys)) != len(keys):
            raise ValueError(f"names and keys of record {shown(name)} must be text, each once")
        data = dict(zip(keys, sequence(values, len(keys), "values"), strict=True))
        if kind == "array":
            for key, value in data.items():
                check_array(value, name, key)
                arrays.append((data, key))
        elif type(kind) is str and kind in KINDS:
            scalars = KINDS[kind]
            for key, value in data.items():
                plain = list(value) if type(value) is tuple else value
                if not is_plain(plain, scalars):
                    raise ValueError(f"{place(name, key)}{shown(plain)} is no value of a {kind} record")
                data[key] = plain
        else:
            raise ValueError(f"record {shown(name)} is of kind {shown(kind)}")
        contents[name] = _like(_RECORDS[kind], _data=data)
    check_count(len(arrays), limits.arrays, "arrays")
    if (announced := sum(data[key][3] for data, key in arrays)) != reader.left:
        raise ValueError(f"{announced} bytes of arrays were announced, {reader.left} are there")
    for data, key in arrays:
        dtype, shape, stype, length, encoding = data[key]
        segment = reader.view(length)
        if encoding != RAW:
            segment = decompress(bytes(segment), encoding, dtype, shape, stype)
        data[key] = FastArray.of(dtype, shape, stype, segment)
    return _like(_CONTENT, _data=contents)


class _Reader:
    """Reads bytes that lie in several chunks."""

    def __init__(self, chunks: Sequence[Buffer]) -> None:
        self.left = sum(map(len, chunks))
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")  # of the chunk that is being read

    def view(self, size: int) -> Buffer:
        """Return the next bytes; where they lie in one chunk that nobody can change, a view of it."""
        if size <= len(self._rest) and self._rest.readonly:
            view, self._rest = self._rest[:size], self._rest[size:]
            self.left -= size
            return view
        return self.take(size)

    def take(self, size: int) -> bytes:
        """Return the next bytes, copied once."""
        if size > self.left:
            raise ValueError(f"it ends {size - self.left} bytes early")
        self.left -= size
        pieces = []
        while size > len(self._rest):
            pieces.append(self._rest)
            size -= len(self._rest)
            self._rest = memoryview(next(self._chunks))
        pieces.append(self._rest[:size])
        self._rest = self._rest[size:]
        return b"".join(pieces)
