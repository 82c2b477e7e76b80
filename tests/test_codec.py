from __future__ import annotations

import enum
import random
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.errors import ReplyError
from fl_edge.link.flower import identify_process
from fl_edge.link.packing import pack
from fl_edge.link.resident.codec import Limits, decode, encode
from fl_edge.link.resident.compression import Compressor

identify_process(1)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SIGNED = st.integers(-(2**63), 2**63 - 1)
UNSIGNED = st.integers(0, 2**64 - 1)


def lists(*kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(*(st.lists(kind, max_size=5) for kind in kinds))


NUMBERS = (SIGNED, UNSIGNED, st.floats())
SCALARS = (*NUMBERS, st.booleans(), TEXT, st.binary(max_size=20))
CONFIGS = st.dictionaries(TEXT, st.one_of(*SCALARS, lists(*SCALARS)), max_size=6)
METRICS = st.dictionaries(TEXT, st.one_of(*NUMBERS, lists(*NUMBERS)), max_size=6)
NUMPY = st.builds(
    lambda shape, kind: Array(np.ones(shape, kind)),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(["float32", "float64", "int8", "bool", "complex64", "<U3", "datetime64[s]"]),
)
FOREIGN = st.builds(
    Array, TEXT, st.lists(st.integers(0, 2**63 - 1), max_size=4).map(tuple), TEXT, st.binary(max_size=5_000)
)
ARRAYS = st.dictionaries(TEXT, st.one_of(NUMPY, FOREIGN), max_size=4)
RECORDS = st.one_of(CONFIGS.map(ConfigRecord), METRICS.map(MetricRecord), ARRAYS.map(ArrayRecord))
CONTENTS = st.dictionaries(TEXT, RECORDS, max_size=5).map(RecordDict)
ERRORS = st.builds(Error, SIGNED, st.none() | TEXT)
METADATA = st.builds(
    Metadata,
    *(UNSIGNED, TEXT, UNSIGNED, UNSIGNED, TEXT, TEXT, st.floats(), st.floats()),
    st.sampled_from(
        ["train", "evaluate", "query", "query.größe", "train.a_1", "system", "reconnect", "get_properties"]
    ),
    *(st.none() | UNSIGNED, st.none() | UNSIGNED),
)


def build(metadata: Metadata, body: RecordDict | Error) -> Message:
    if isinstance(body, Error):
        return Message(error=body, metadata=metadata)  # type: ignore[call-overload, no-any-return]
    return Message(content=body, metadata=metadata)  # type: ignore[call-overload, no-any-return]


MESSAGES = st.builds(build, METADATA, CONTENTS | ERRORS)


def picture(message: Message) -> Any:
    """Everything in a message, with types and order; NaN equals NaN."""
    records: list[Any] = []
    for name, record in (message.content if message.has_content() else {}).items():
        values: list[Any] = []
        for key, value in record.items():
            if isinstance(value, Array):
                values.append((key, value.dtype, type(value.shape), value.shape, value.stype, value.data))
            else:
                kinds = [type(item) for item in value] if isinstance(value, list) else type(value)
                values.append((key, kinds, repr(value)))
        records.append((name, type(record), values))
    error = (message.error.code, message.error.reason) if message.has_error() else None
    return repr(vars(message.metadata)), error, records


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    ends = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(ends)]


def typical(**config: Any) -> Message:
    """A message with every kind of record."""
    values: dict[str, Any] = {"round": 3, "lr": 0.5, "name": "ü", "raw": b"\0", "on": True, "list": [1, 2]}
    content: dict[str, Any] = {
        "config": ConfigRecord(values | config),
        "arrays": ArrayRecord({"w": Array(np.arange(6.0, dtype=np.float32)), "e": Array(np.zeros((0, 2)))}),
        "metrics": MetricRecord({"loss": 0.25, "counts": [1, 2**64 - 1], "none": []}),
    }
    return Message(RecordDict(content), 7, "train", ttl=60.0, group_id="4")


@settings(max_examples=300, deadline=None)
@given(MESSAGES, st.lists(st.integers(0, 100_000), max_size=8), st.booleans())
def test_round_trip_keeps_everything_however_it_is_cut(message: Message, places: list[int], views: bool) -> None:
    chunks: list[Any] = cut(b"".join(encode(message)), places)
    if views:
        chunks = [part for chunk in chunks for part in (memoryview(chunk), b"")]
    assert picture(decode(chunks)) == picture(message)


@settings(max_examples=50, deadline=None)
@given(CONTENTS)
def test_replies_come_back_as_replies(content: RecordDict) -> None:
    asked = decode(encode(typical()))
    reply = Message(content, reply_to=asked)
    assert picture(decode(encode(reply))) == picture(reply)


def test_what_comes_back_is_flowers_own_and_can_be_edited() -> None:
    message = decode(encode(typical()))
    assert [type(record) for record in message.content.values()] == [ConfigRecord, ArrayRecord, MetricRecord]
    config: Any = message.content["config"]
    assert list(config) == ["round", "lr", "name", "raw", "on", "list"]
    config["list"].append(3)
    config["new"] = "value"
    with pytest.raises(TypeError):
        config["bad"] = None
    array: Any = message.content.array_records["arrays"]["w"]
    assert isinstance(array, Array)
    assert array.numpy().tolist() == [0, 1, 2, 3, 4, 5]
    assert typical().content == decode(encode(typical())).content
    assert message.content.array_records["arrays"].object_id == typical().content.array_records["arrays"].object_id


def test_bytes_of_arrays_are_not_copied_on_the_way_out_and_once_on_the_way_in() -> None:
    message = typical()
    arrays = message.content.array_records["arrays"]
    header, *segments = encode(message)
    assert len(segments) == 2
    assert all(segment is array.data for segment, array in zip(segments, arrays.values(), strict=True))
    data = bytearray(b"".join([header, *segments]))
    received = decode([memoryview(data)])
    data[:] = bytes(len(data))
    assert picture(received) == picture(message)
    assert type(received.content.array_records["arrays"]["w"].data) is bytes


def test_a_segment_in_many_chunks_takes_its_size_once() -> None:
    size = 8 * 2**20
    wire = b"".join(encode(Message(RecordDict({"a": ArrayRecord({"w": Array(np.ones(size, "u1"))})}), 1, "train")))
    chunks = [wire[start : start + 2**18] for start in range(0, len(wire), 2**18)]
    tracemalloc.start()
    try:
        decode(chunks)
        assert tracemalloc.get_traced_memory()[1] < 1.1 * size
    finally:
        tracemalloc.stop()


class Mode(enum.IntEnum):
    FAST = 2


class Name(str, enum.Enum):  # noqa: UP042 - its str() is not its value
    RED = "red"


@pytest.mark.filterwarnings("ignore:Field .* got a boolean:DeprecationWarning")  # of protobuf, under Flower
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.1), 0.1),
        ([0.5, np.float64(1)], [0.5, 1.0]),
        (Mode.FAST, 2),
        ([3, True], [3, 1]),
        (Name.RED, "red"),
        (2**64 - 1, 2**64 - 1),
        ([2**64 - 1, 0], [2**64 - 1, 0]),
        ([-(2**63), 2**63 - 1], [-(2**63), 2**63 - 1]),
    ],
)
def test_values_of_derived_types_arrive_as_flower_sends_them(value: Any, expected: Any) -> None:
    message = typical(value=value)
    sent: Any = ConfigRecord.inflate(message.content.config_records["config"].deflate())
    received: Any = decode(encode(message)).content.config_records["config"]["value"]
    assert repr(received) == repr(sent["value"]) == repr(expected)


@pytest.mark.parametrize(
    "value", [2**64, -(2**63) - 1, [2**64], [2**64 - 1, -1], [-(2**63) - 1], [True, 2**64], "\ud800", ["a", "\udfff"]]
)
def test_what_flower_cannot_send_is_refused_by_name(value: Any) -> None:
    message = typical()
    message.content["config"].__dict__["_data"]["key"] = value
    with pytest.raises(ValueError, match=r"surrogates|out of range|required argument|must be"):
        message.content.config_records["config"].deflate()
    with pytest.raises(ValueError, match=r"^record 'config', key 'key': (integers have|text is)"):
        encode(message)


@pytest.mark.parametrize("value", [None, {}, [1, "a"], [[1]], (1, 2), object(), [None], bytearray(b"a"), 1j])
def test_what_is_no_value_is_refused_by_name(value: Any) -> None:
    message = typical()
    message.content["metrics"].__dict__["_data"]["key"] = value
    with pytest.raises(TypeError, match=r"^record 'metrics', key 'key': .* no value that Flower can send$"):
        encode(message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "x" * 65),
        ("stype", "x" * 65),
        ("dtype", None),
        ("shape", (-1,)),
        ("shape", (2**63,)),
        ("shape", [1]),
        ("shape", (1.0,)),
        ("shape", (1,) * 65),
        ("data", memoryview(b"a")),
    ],
)
def test_what_is_no_array_is_refused_by_name(field: str, value: Any) -> None:
    message = typical()
    setattr(message.content.array_records["arrays"]["w"], field, value)
    with pytest.raises(ValueError, match=r"^record 'arrays', key 'w': an array of "):
        encode(message)


def test_other_things_that_cannot_be_sent() -> None:
    for node in (-1, 2**64):
        message = typical()
        message.metadata.dst_node_id = node
        with pytest.raises(ValueError, match=rf"^dst_node_id cannot be {node}$"):
            encode(message)
    message = typical()
    message.metadata.group_id = "\ud800"
    with pytest.raises(ValueError, match=r"^text is not Unicode$"):
        encode(message)
    with pytest.raises(ValueError, match=r"^an error cannot have code 9223372036854775808, reason 'x'$"):
        encode(Message(Error(2**63, "x"), reply_to=typical()))
    with pytest.raises(ValueError, match=r"^167\d\d\d\d\d bytes outside arrays, at most 16777216 are allowed$"):
        encode(typical(blob=bytes(2**24)))
    with pytest.raises(ValueError, match=r"^10001 records, at most 10000 are allowed$"):
        encode(Message(RecordDict({str(index): ConfigRecord() for index in range(10_001)}), 1, "train"))
    many = ArrayRecord(dict.fromkeys(map(str, range(100_001)), Array("u1", (0,), "raw", b"")))
    with pytest.raises(ValueError, match=r"^100001 arrays, at most 100000 are allowed$"):
        encode(Message(RecordDict({"a": many}), 1, "train"))


def test_times_may_be_whole_numbers_as_in_flower() -> None:
    received = decode(encode(Message(RecordDict(), 1, "train", ttl=10)))
    assert repr(received.metadata.ttl) == "10.0"


# What must be refused. A message is taken apart, one thing is changed, and the line must name what is wrong.


def fields_of(message: Message) -> Any:
    header, *segments = encode(message)
    return msgpack.unpackb(header[4:]), b"".join(segments)


def wire(fields: Any, segments: bytes) -> bytes:
    header = fields if isinstance(fields, bytes) else msgpack.packb(fields)
    return len(header).to_bytes(4, "little") + header + segments


def refused(data: bytes, line: str, limits: Limits | None = None) -> None:
    with pytest.raises(ReplyError, match=f"^message cannot be read: {line}") as caught:
        decode([data], limits or Limits())
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


FIELDS = ["run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id"]
FIELDS += ["created_at", "ttl", "message_type", "src_task_id", "dst_task_id"]
NO_UINT: list[Any] = [-1, 1.0, True, "1", b"1", [1], {}]
NO_TEXT: list[Any] = [1, 1.0, True, b"a", ["a"], {}, None]
NO_FLOAT: list[Any] = [1, True, "1", None, [1.0], {}]
# Where in the header of typical() -> what is put there, and the line that refuses it. Records stand in field 3.
BAD: list[tuple[tuple[int, ...], list[Any], str]] = [
    ((0,), [0, 2, True, 1.0, "1", None, [1], {}, 2**64 - 1], "its version is "),
    ((1,), [None, [], [1] * 10, [1] * 12, "metadata---", {}], "metadata cannot be "),
    *(((1, place), [*NO_UINT, None], f"{FIELDS[place]} cannot be ") for place in (0, 2, 3)),
    *(((1, place), NO_UINT, f"{FIELDS[place]} cannot be ") for place in (9, 10)),
    *(((1, place), NO_TEXT, f"{FIELDS[place]} cannot be ") for place in (1, 4, 5, 8)),
    *(((1, place), NO_FLOAT, f"{FIELDS[place]} cannot be ") for place in (6, 7)),
    ((1, 8), ["", "fit", "train.", "train.a.b", "train.1", "a\n" * 999], "its type is '"),
    ((2,), [[1, "x"], 1], "it must hold either an error or records"),
    ((3,), [None], "it must hold either an error or records"),
    ((3,), [1, "ab", b"ab", {}, True], "records cannot be "),
    ((3, 0), [None, "conf", [], ["config", "a", []], {}, [1] * 5], "record cannot be "),
    ((3, 0, 0), ["", "arrays", 1, None, [], {}, b"array"], "record 'config' is of kind "),
    ((3, 0, 1), [1, None, b"a", [], {}, ["a"]], "names and keys of record "),
    ((3, 1, 1), ["config"], "names and keys of record 'config' must be text, each once"),
    ((3, 0, 2), [None, "abcdef", {}, 6], "keys cannot be "),
    ((3, 0, 2, 0), [1, None, b"a", {}, ["a"], "lr"], "names and keys of record 'config'"),
    ((3, 0, 3), [None, "abcdef", [1] * 5, [1] * 7, {}], "values cannot be "),
    (
        (3, 0, 3, 0),
        [None, {}, [None], [1, 1.0], [1, True], ["a", b"a"], [[1]], [-1, 2**64 - 1]],
        "record 'config', key 'round': .* is no value of a config record",
    ),
    (
        (3, 2, 3, 0),
        ["a", b"a", True, ["a"], [True], [b"a"], None],
        "record 'metrics', key 'loss': .* is no value of a metric record",
    ),
    ((3, 1, 3, 0), [None, 1, "abcde", [], [1] * 4, [1] * 6, {}], "array cannot be "),
    *(
        ((3, 1, 3, 0, place), bad, "record 'arrays', key 'w': dtype, shape, stype or length are damaged")
        for place, bad in [
            (0, [*NO_TEXT, "x" * 65]),
            (1, [None, 1, "6", [-1], [True], [1.0], ["6"], [2**63], [1] * 65, [[1]], {}]),
            (2, [*NO_TEXT, "x" * 65]),
            (3, [*NO_UINT, None]),
        ]
    ),
    ((3, 1, 3, 0, 3), [0, 151, 153, 2**63, 2**64 - 1], r"\d+ bytes of arrays were announced, 280 are there"),
    ((3, 1, 3, 0, 4), [None, 1, "", "RAW", b"raw", ["raw"], {}, "zip"], "record 'arrays', key 'w': the encoding "),
]


@pytest.mark.parametrize(("path", "bad", "line"), [(path, bad, line) for path, values, line in BAD for bad in values])
def test_each_field_is_checked(path: tuple[int, ...], bad: Any, line: str) -> None:
    fields, segments = fields_of(typical())
    assert decode([wire(fields, segments)])
    inside = fields
    for step in path[:-1]:
        inside = inside[step]
    inside[path[-1]] = bad
    refused(wire(fields, segments), line)


BAD_ERRORS: list[tuple[list[Any], str]] = [
    (["ab", 1, [], [1], [1, "a", 2], {}, True, b"ab"], "error cannot be "),
    ([[code, "a"] for code in [*NO_UINT[1:], None, 2**63]], "an error cannot have code "),
    ([[1, reason] for reason in NO_TEXT[:-1]], "an error cannot have code 1, reason "),
]


@pytest.mark.parametrize(("error", "line"), [(bad, line) for values, line in BAD_ERRORS for bad in values])
def test_each_field_of_an_error_is_checked(error: Any, line: str) -> None:
    fields, _ = fields_of(Message(Error(1, "a"), reply_to=typical()))
    assert decode([wire(fields, b"")]).error == Error(1, "a")
    refused(wire(fields, b"x"), "1 bytes after an error, at most 0 are allowed")
    fields[2] = error
    refused(wire(fields, b""), line)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\x91",
        b"\x94\1",  # four fields announced, one there
        b"\x91" * 5_000,
        b"\xdd\xff\xff\xff\xff",  # 2**32 - 1 values
        b"\xdf\xff\xff\xff\xff",  # pairs
        b"\xdb\xff\xff\xff\xff",  # characters
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xc9\xff\xff\xff\xff\1",  # bytes of an extension type
        b"\x81\xa1a\1",  # a map
        b"\x82\xa1a\1\xa1a\2",  # a map with the same key twice
        b"\x81\1\2",  # a map with a key that is no text
        b"\x81\x90\2",  # ... that is a list
        b"\xd4\5x",  # an extension type
        b"\xd6\xff\0\0\0\0",  # a time
        b"\xd7\xff" + b"\xff" * 8,
        b"\xc7\0\xff",  # a time of no bytes
        b"\xa2\xc3\x28",  # not UTF-8
        b"\x90\x90",  # two values
    ],
    ids=bytes.hex,
)
def test_hostile_msgpack_is_refused(header: bytes) -> None:
    refused(wire(header, b""), r"its header is no msgpack: \w+$")
    fields = msgpack.packb(fields_of(typical())[0])
    refused(wire(fields.replace(b"\xa1\xc3\xbc"[:3], header, 1), b""), "")


@pytest.mark.parametrize("header", [b"\x80", b"\xc7\0\5", b"\x90", b"\xc0", b"\xa4abcd", b"\xcf" + b"\xff" * 8])
def test_a_header_that_is_something_else_is_refused(header: bytes) -> None:
    refused(wire(header, b""), "header cannot be ")


def test_lengths_are_checked_against_what_is_there() -> None:
    data = b"".join(encode(typical()))
    refused(b"", "it ends 4 bytes early")
    refused(data[:3], "it ends 1 bytes early")
    refused(data[:10], r"it ends \d+ bytes early")
    refused(b"\xff\xff\xff\0" + data[4:], r"it ends \d+ bytes early")
    refused(b"\xff\xff\xff\xff" + data[4:], "4294967295 bytes outside arrays, at most 16777216 are allowed")
    refused(data[:-1], "280 bytes of arrays were announced, 279 are there")
    refused(data + b"x", "280 bytes of arrays were announced, 281 are there")
    with pytest.raises(ReplyError):
        decode([])


def test_limits_hold() -> None:
    data = b"".join(encode(typical()))
    length = int.from_bytes(data[:4], "little")
    assert decode([data], Limits(header_bytes=length, records=3, arrays=2))
    refused(data, f"{length} bytes outside arrays, at most {length - 1} are allowed", Limits(header_bytes=length - 1))
    refused(data, "3 records, at most 2 are allowed", Limits(records=2))
    refused(data, "2 arrays, at most 1 are allowed", Limits(arrays=1))


@pytest.mark.parametrize("filling", [b"\x91" * 999 + b"\xc0", b"\x90", b"\x91\xc0", b"\xa2ab", b"\xcb" + b"\1" * 8])
def test_a_header_full_of_small_things_takes_bounded_memory(filling: bytes) -> None:
    count = 2**18 // len(filling)
    data = wire(b"\xdd" + count.to_bytes(4, "big") + filling * count, b"")
    tracemalloc.start()
    try:
        refused(data, "header cannot be a tuple")
        assert tracemalloc.get_traced_memory()[1] < 51 * len(data)
    finally:
        tracemalloc.stop()


# Random damage. Whatever is done to a message, it is refused in one line, or it is a message that can be sent again.


def samples() -> list[bytes]:
    packed = pack({"a": torch.randn(5, 70), "b": torch.arange(3)})
    arrays = RecordDict({"arrays": ArrayRecord({"packed": packed, "w": Array(np.ones((2, 3), np.float32))})})
    message = Message(arrays, 3, "query.grow")
    plain = [typical(), message, Message(Error(2, "boom"), reply_to=message), Message(RecordDict(), 1, "evaluate")]
    compressed = [b"".join(encode(message, Compressor(scheme))) for scheme in ("bf16", "int8")]
    return [b"".join(encode(message)) for message in plain] + compressed


def flip(data: bytes, other: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def flip_in_header(data: bytes, other: bytes, rng: random.Random) -> bytes:
    damaged, end = bytearray(data), 4 + int.from_bytes(data[:4], "little")
    for _ in range(rng.randint(1, 3)):
        damaged[rng.randrange(4, end)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def truncate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, other: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + rng.randbytes(rng.randint(1, 9)) + data[place:]


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def edit_length(data: bytes, other: bytes, rng: random.Random) -> bytes:
    length = rng.choice([0, 1, 2**16, 2**24, 2**32 - 1, int.from_bytes(data[:4], "little") + rng.randint(-3, 3)])
    return length.to_bytes(4, "little") + data[4:]


def edit_fields(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Put something else in one place of a header that stays good msgpack."""
    end = 4 + int.from_bytes(data[:4], "little")
    fields = msgpack.unpackb(data[4:end])
    inside = fields
    while True:
        place = rng.randrange(len(inside))
        if not (isinstance(inside[place], list) and inside[place] and rng.random() < 0.8):
            break
        inside = inside[place]
    old = inside[place]
    near = old + rng.randint(-2, 2) if isinstance(old, int) else old
    values: list[Any] = [
        near,
        None,
        True,
        0,
        -1,
        2**64 - 1,
        1.5,
        "",
        "raw",
        "int8",
        "bf16",
        "array",
        b"",
        [],
        [1],
        {},
        ["a"] * 4,
    ]
    inside[place] = rng.choice([*values, [4, 4], inside[rng.randrange(len(inside))]])
    return wire(fields, data[end:])


@pytest.mark.parametrize(
    "damage",
    [flip, flip_in_header, truncate, insert, splice, edit_length, edit_fields],
    ids=lambda damage: damage.__name__,
)
def test_damaged_messages_are_refused_or_are_messages(damage: Callable[[bytes, bytes, random.Random], bytes]) -> None:
    rng, good, kept = random.Random(5), samples(), 0
    for index in range(2_000):
        data = damage(good[index % len(good)], rng.choice(good), rng)
        try:
            message = decode(cut(data, [rng.randrange(10_000) for _ in range(3)]))
        except ReplyError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert len(str(error)) < 400  # noqa: PT017
        else:
            kept += 1
            assert picture(decode(encode(message))) == picture(message)
    assert kept < 2_000


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_foreign_bytes_are_refused(data: bytes, as_header: bool) -> None:
    with pytest.raises(ReplyError):
        decode([wire(data, b"") if as_header else data])
