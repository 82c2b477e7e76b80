from __future__ import annotations

import json
import math
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save

from fl_edge.errors import ReplyError
from fl_edge.link.flower import identify_process
from fl_edge.link.packing import pack, unpack
from fl_edge.link.resident.codec import decode, encode
from fl_edge.link.resident.compression import SCHEMES, Compressor, decompress

identify_process(1)

Scheme = Literal["bf16", "int8"]
Floats = NDArray[np.float32]
WHERE = ("train", "arrays", "w")
SHAPES = [
    (1,),
    (7,),
    (1024,),
    (1025,),
    (3000,),
    (5, 3),
    (2, 63),
    (2, 64),
    (3, 5, 13),
    (3, 2, 64),
    (4, 4096),
    (2, 4097),
    (1, 1, 1),
]
ANY_BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40).map(
    lambda bits: np.array(bits, "<u4").view("<f4")
)


def normal(shape: tuple[int, ...], seed: int = 0, spread: float = 3) -> Floats:
    """Values whose sizes differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(spread * rng.standard_normal(shape))).astype(np.float32)


def through(compressor: Compressor, array: Array, where: tuple[str, str, str] = WHERE) -> tuple[str, Array]:
    """Send an array and receive it."""
    encoding, segment = compressor.compress(array, where)
    if encoding == "raw":
        assert segment is array.data
        return encoding, array
    assert len(segment) < len(array.data) or len(array.data) < 200
    data = decompress(segment, encoding, array.dtype, array.shape, array.stype)
    assert (type(data), len(data)) == (bytes, len(array.data))
    return encoding, Array(array.dtype, array.shape, array.stype, data)


def sent(compressor: Compressor, values: Floats, where: tuple[str, str, str] = WHERE) -> Floats:
    encoding, array = through(compressor, Array(values), where)
    assert encoding != "raw"
    assert array.data[:128] == Array(values).data[:128]
    result = array.numpy()
    assert (result.dtype, result.shape) == (values.dtype, values.shape)
    return result


def rows_of(values: Floats) -> list[Any]:
    """The rows that share a scale, as the documentation has it."""
    width = 0
    for axes in range(1, values.ndim):
        if math.prod(values.shape[-axes:]) >= 64:
            width = math.prod(values.shape[-axes:])
            break
    flat = values.reshape(-1)
    width = width if 0 < width <= 4096 else 1024
    return [flat[start : start + width] for start in range(0, flat.size, width)]


def steps(values: Any) -> Any:
    """The scale of each value's row."""
    return np.concatenate([np.full(row.size, np.abs(row).max() / 127) for row in rows_of(values)]).reshape(values.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_what_torch_rounds_to(shape: tuple[int, ...]) -> None:
    values = normal(shape)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(sent(Compressor("bf16"), values), expected)


@settings(max_examples=300, deadline=None)
@given(ANY_BITS)
@example(
    np.array([0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0xFF800000, 0x80000000, 1, 0x3F808000, 0x3F818000], "<u4").view("<f4")
)
def test_bf16_of_any_bits(values: Floats) -> None:
    result = sent(Compressor("bf16"), values)
    assert np.array_equal(np.isnan(result), np.isnan(values))
    assert np.array_equal(np.signbit(result), np.signbit(values))
    expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    assert np.array_equal(result, expected, equal_nan=True)
    ordinary = np.isfinite(values) & (np.abs(values) >= np.finfo(np.float32).tiny) & (np.abs(values) < 3.389e38)
    exact = values[ordinary].astype(np.float64)
    assert (np.abs(result[ordinary] - exact) <= 2**-8 * np.abs(exact)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step_of_its_row(shape: tuple[int, ...]) -> None:
    values = normal(shape)
    error = np.abs(sent(Compressor("int8"), values) - values.astype(np.float64))
    assert (error <= steps(values) * 0.500001 + 1e-45).all()
    assert len(Compressor("int8").compress(Array(values), WHERE)[1]) == 128 + 1 + values.size + 4 * len(rows_of(values))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=30))
@example([0.0, -0.0])
@example([1e-45, -1e-45, 2e-43])
@example([9.999e37, -9.999e37, 1.0])
def test_int8_of_any_size_of_values(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    scale = max(np.abs(values).max() / 127, float(np.finfo(np.float32).tiny))
    error = np.abs(sent(Compressor("int8"), values) - values.astype(np.float64))
    assert (error <= scale * 0.50001).all()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 999))
def test_what_int8_loses_is_sent_later(shape: tuple[int, ...], seed: int) -> None:
    """Over 50 messages, the sum received stays within half a step of the sum sent."""
    compressor = Compressor("int8")
    wanted, received, rounding = np.zeros(shape), np.zeros(shape), 0.0
    for number in range(50):
        values = normal(shape, seed + number, spread=0.5)
        before = wanted - received
        wanted = wanted + values
        received = received + sent(compressor, values)
        rounding += 2e-7 * float(np.abs(values).max() + np.abs(before).max())
        assert (np.abs(wanted - received) <= steps(before + values) * 0.501 + rounding).all()
    forgetful = sum(sent(Compressor("int8"), normal(shape, seed + number, spread=0.5)) for number in range(50))
    if math.prod(shape) > 100:
        assert np.abs(wanted - received).sum() < np.abs(wanted - forgetful).sum() / 2


def test_a_constant_too_small_for_a_step_arrives_in_the_end() -> None:
    compressor = Compressor("int8")
    values = np.array([1.0, 0.001], np.float32)
    assert sent(compressor, values)[1] == 0
    total = sum(sent(compressor, values)[1] for _ in range(99))
    assert abs(total - 0.1) < 1 / 127


@pytest.mark.parametrize(
    ("where", "shape"),
    [
        (("evaluate", "arrays", "w"), (2,)),
        (("train", "other", "w"), (2,)),
        (("train", "arrays", "v"), (2,)),
        (WHERE, (1, 2)),
    ],
)
def test_feedback_goes_to_the_same_array_only(where: tuple[str, str, str], shape: tuple[int, ...]) -> None:
    compressor, values = Compressor("int8"), np.array([1.0, 0.003], np.float32)
    assert sent(compressor, values)[1] == 0
    assert sent(compressor, values.reshape(shape), where).reshape(-1)[1] == 0
    assert sent(compressor, values)[1] > 0
    assert sent(compressor, values.reshape(shape), where).reshape(-1)[1] > 0


def test_feedback_of_packed_tensors_is_kept_by_name() -> None:
    compressor, tensor = Compressor("int8"), torch.tensor([1.0, 0.003])
    for names, arrives in [(("a",), False), (("b",), False), (("a", "c"), True), (("b", "c"), True)]:
        encoding, array = through(compressor, pack(dict.fromkeys(names, tensor)))
        assert encoding == "int8"
        assert bool(unpack(array)[names[0]][1] > 0) == arrives


def test_memory_for_feedback_is_bounded_and_the_longest_unused_goes_first() -> None:
    values = np.array([1.0, 0.003] * 512, np.float32)
    compressor = Compressor("int8", max_residual_bytes=2 * values.nbytes)

    def arrives(name: str) -> bool:
        return bool(sent(compressor, values, ("train", "arrays", name))[1])

    assert [arrives(name) for name in "aba"] == [False, False, True]
    assert compressor.residual_bytes == 2 * values.nbytes
    assert not arrives("c")  # b goes
    assert compressor.residual_bytes == 2 * values.nbytes
    assert not arrives("b")  # a goes
    assert arrives("c")
    small = Compressor("int8", max_residual_bytes=values.nbytes - 1)
    assert [sent(small, values)[1] for _ in range(3)] == [0, 0, 0]
    assert small.residual_bytes == 0


def test_residual_memory_is_all_that_is_kept() -> None:
    """Small tensors are not padded to full rows."""
    compressor = Compressor("int8")
    for index in range(100):
        compressor.compress(Array(np.ones(3, np.float32)), ("train", "arrays", str(index)))
    assert compressor.residual_bytes == 100 * 12
    assert sum(residual.nbytes for residual in compressor._residuals.values()) == 100 * 12


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_what_int8_cannot_hold_travels_as_it_is_and_its_feedback_is_forgotten(bad: float) -> None:
    compressor, values = Compressor("int8"), np.array([1.0, 0.003], np.float32)
    assert sent(compressor, values)[1] == 0
    broken = Array(np.array([bad, 0.003], np.float32))
    assert through(compressor, broken) == ("raw", broken)
    assert compressor.residual_bytes == 0
    assert sent(compressor, values)[1] == 0
    assert sent(compressor, values)[1] > 0


def test_feedback_that_overflows_is_found() -> None:
    compressor = Compressor("int8")
    for _ in range(3):
        sent(compressor, np.array([9.9e37, 3e35, -3e35], np.float32))
    broken = Array(np.array([np.finfo(np.float32).max] * 3, np.float32))
    assert through(compressor, broken)[0] == "raw"


def test_one_bad_tensor_leaves_the_others_of_a_packed_array_compressed() -> None:
    compressor = Compressor("int8")
    small = torch.tensor([1.0, 0.003])
    for bad, arrives in [(1.0, False), (math.nan, True)]:
        encoding, array = through(compressor, pack({"bad": torch.tensor([bad, 0.003]), "good": small}))
        assert encoding == "int8"
        assert bool(unpack(array)["good"][1] > 0) == arrives
    assert unpack(array)["bad"].isnan()[0]
    assert unpack(array)["bad"][1] == np.float32(0.003)
    assert through(compressor, pack({"bad": torch.tensor([math.inf])}))[0] == "raw"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_arrays_of_mixed_types_keep_their_layout(scheme: Scheme) -> None:
    tensors = {
        "weight": torch.from_numpy(normal((33, 70))),
        "bias": torch.from_numpy(normal((33,))),
        "ü": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(5, 5).bfloat16(),
        "double": torch.randn(3).double(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "odd": torch.arange(3, dtype=torch.uint8),
    }
    array = pack(tensors)
    encoding, received = through(Compressor(scheme), array)
    assert encoding == scheme
    assert (received.dtype, received.shape, received.stype) == (array.dtype, array.shape, array.stype)
    end = 8 + int.from_bytes(array.data[:8], "little")
    assert received.data[:end] == array.data[:end]
    result = unpack(received)
    assert set(result) == set(tensors)
    for name, tensor in tensors.items():
        assert (result[name].dtype, result[name].shape) == (tensor.dtype, tensor.shape)
        if tensor.dtype == torch.float32:
            alone = (
                torch.from_numpy(sent(Compressor(scheme), tensor.numpy())) if tensor.dim() and len(tensor) else tensor
            )
            assert torch.equal(result[name], alone) or (name == "ü" and torch.allclose(result[name], alone))
        else:
            assert torch.equal(result[name], tensor)
    assert pack(result).data == received.data  # still in canonical form


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "array",
    [
        Array(np.ones((), np.float32)),
        Array(np.ones((0, 3), np.float32)),
        Array(np.asfortranarray(np.ones((2, 3), np.float32))),
        Array(np.ones(3)),
        Array(np.ones(3, np.float16)),
        Array(np.ones(3, ">f4")),
        Array(np.ones(3, np.int32)),
        Array("float32", (4,), "numpy.ndarray", Array(np.ones(3, np.float32)).data),
        Array("float32", (3,), "numpy.ndarray", Array(np.ones(3, np.float32)).data + b"x"),
        Array("float32", (3,), "numpy.ndarray", Array(np.ones(3, np.float32)).data[:-1]),
        Array("float32", (3,), "numpy.ndarray", b""),
        Array("float32", (3,), "torch", Array(np.ones(3, np.float32)).data),
        pack({"a": torch.ones(3).double(), "b": torch.zeros(0)}),
        pack({}),
        Array("uint8", (3,), "safetensors", b"abc"),
        Array("uint8", (8,), "safetensors", b"\xff" * 8),
        Array("uint8", (1,), "safetensors", pack({"a": torch.ones(3)}).data + b"x"),
        Array("uint8", (1,), "safetensors", pack({"a": torch.ones(3)}).data[:-1]),
        Array("uint8", (1,), "safetensors", pack({"a" * 2**20: torch.ones(3)}).data),
    ],
)
def test_all_else_travels_as_it_is(scheme: Scheme, array: Array) -> None:
    compressor = Compressor(scheme)
    assert through(compressor, array)[0] == "raw"
    assert compressor.residual_bytes == 0


def test_a_packed_array_may_hold_a_description() -> None:
    data = save({"t": torch.ones(5)}, {"format": "pt"})
    encoding, received = through(Compressor("bf16"), Array("uint8", (len(data),), "safetensors", data))
    assert (encoding, received.data) == ("bf16", data)


def test_only_known_schemes_are_taken() -> None:
    assert get_args(Scheme) == SCHEMES
    with pytest.raises(ValueError, match=r"^scheme: 'zip' is not allowed, one of bf16, int8$"):
        Compressor("zip")  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_whole_message_travels_compressed(scheme: Scheme) -> None:
    values = normal((40, 70))
    arrays = ArrayRecord(
        {
            "a": Array(values),
            "b": Array(values.astype(np.int64)),
            "c": Array(values),
            "p": pack({"t": torch.from_numpy(values)}),
        }
    )
    message = Message(RecordDict({"arrays": arrays}), 1, "train")
    compressor = Compressor(scheme)
    for _ in range(2):
        parts = encode(message, compressor)
        assert sum(map(len, parts)) < 0.85 * sum(len(array.data) for array in arrays.values())
        received = decode([b"".join(parts)]).content.array_records["arrays"]
        assert received["b"] == arrays["b"]
        for key in "acp":
            assert (received[key].dtype, received[key].shape) == (arrays[key].dtype, arrays[key].shape)
        tolerance = steps(values) * 1.001 if scheme == "int8" else np.abs(values) * 2**-8
        assert (np.abs(received["a"].numpy() - values) <= tolerance).all()
        assert np.array_equal(unpack(received["p"])["t"].numpy(), received["a"].numpy())
        assert received["c"] == received["a"]  # each with its own feedback
    elsewhere = encode(Message(RecordDict({"arrays": arrays}), 1, "evaluate"), compressor)
    assert elsewhere[1] == encode(message, Compressor(scheme))[1]  # nothing was left over for evaluate


# What must be refused.


def refused(segment: bytes, encoding: str, array: Array, line: str = "a compressed array ") -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        decompress(segment, encoding, array.dtype, array.shape, array.stype)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "array", [Array(normal((3, 70))), pack({"a": torch.ones(70), "b": torch.arange(3)})], ids=["npy", "packed"]
)
def test_damaged_segments_are_refused(scheme: Scheme, array: Array) -> None:
    segment = Compressor(scheme).compress(array, WHERE)[1]
    for end in range(len(segment)):
        refused(segment[:end], scheme, array)
    refused(segment + b"x", scheme, array, "a compressed array is too long")
    head = 128 if array.stype == "numpy.ndarray" else 8 + int.from_bytes(array.data[:8], "little")
    if array.stype == "numpy.ndarray":
        refused(segment[:head] + b"\2" + segment[head + 1 :], scheme, array, "a compressed array is damaged")
        raw = segment[:head] + b"\0" + array.data[head:]
        assert decompress(raw, scheme, array.dtype, array.shape, array.stype) == array.data
    message = Message(RecordDict({"arrays": ArrayRecord({"w": array})}), 1, "train")
    header, whole = encode(message, Compressor(scheme))
    assert len(whole) == len(segment)
    with pytest.raises(ReplyError, match=r"^message cannot be read: a compressed array "):
        decode([header, bytes(len(whole))])


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 0.0, 1e37])
def test_impossible_scales_are_refused(scale: float) -> None:
    array = Array(normal((3, 70)))
    segment = bytearray(Compressor("int8").compress(array, WHERE)[1])
    segment[133:137] = np.float32(scale).tobytes()
    refused(bytes(segment), "int8", array, "a compressed array has a damaged scale")


@pytest.mark.parametrize(
    "array",
    [
        Array("float64", (3,), "numpy.ndarray", b""),
        Array("float32", (0,), "numpy.ndarray", b""),
        Array("float32", (), "numpy.ndarray", b""),
        Array("float32", (2**63 - 1,) * 64, "numpy.ndarray", b""),
        Array("float32", (3,), "torch", b""),
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_arrays_that_are_never_compressed_are_refused(scheme: Scheme, array: Array) -> None:
    for data in (b"", Array(np.ones(3, np.float32)).data, bytes(500)):
        refused(data, scheme, array)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: list[Any] = [
    *([], 1, "a", None, {"a": 1}, {"a": None}, {"a": []}, {"a": {}}),
    *({"a": F32 | {"dtype": dtype}} for dtype in (None, 1)),
    *({"a": F32 | {"shape": shape}} for shape in (None, 2, [3], [1], [-2, -1], ["2"], [2.0], [True, 2], [[2]])),
    *({"a": F32 | {"shape": shape}} for shape in ([2, *[1] * 64], [2**63], [0, 2], [10**4000])),
    *({"a": F32 | {"data_offsets": offsets}} for offsets in (None, 8, [0], [0, 8, 9], [8, 0], [1, 9], ["0", "8"])),
    *(
        {"a": F32 | {"data_offsets": offsets}}
        for offsets in ([0, 2**63], [0.0, 8.0], [False, 8], [-8, 0], [0, 10**4000])
    ),
    {"a": F32, "b": F32},
    {"a": F32, "b": F32 | {"data_offsets": [9, 17]}},
    {"a": F32, "b": {"dtype": "U8", "shape": [4], "data_offsets": [8, 4]}},
]


@pytest.mark.parametrize(
    "header",
    [*map(json.dumps, HEADERS), '{"a":' * 9_000, "[" * 99_999, "{", "", '{"a":\xff}', '{"\ud800"}'],
    ids=lambda header: header[:40],
)
def test_damaged_headers_of_packed_arrays_are_left_alone_or_refused(header: str) -> None:
    text = header.encode("latin-1", "backslashreplace")
    data = len(text).to_bytes(8, "little") + text + bytes(9)
    array = Array("uint8", (len(data),), "safetensors", data)
    assert Compressor("int8").compress(array, WHERE) == ("raw", data)
    if header != json.dumps({"a": F32 | {"dtype": None}}) and header != json.dumps({"a": F32 | {"dtype": 1}}):
        refused(data, "int8", array)
    good = json.dumps({"a": F32}).encode()
    whole = len(good).to_bytes(8, "little") + good + bytes(8)
    assert Compressor("int8").compress(Array("uint8", (1,), "safetensors", whole), WHERE)[0] == "int8"
