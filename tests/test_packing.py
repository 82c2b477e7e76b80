from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.errors import ReplyError
from fl_edge.link.arrays import FastArray, npy_header
from fl_edge.link.packing import flat_array, pack, tensor_bytes, unpack

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
]
SMALL = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7, dtype=torch.int16)}


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text(max_size=8).filter(lambda name: name != "__metadata__"), max_size=4, unique=True))
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        tensors[name] = values.to(dtype).mT if len(shape) >= 2 and draw(st.booleans()) else values.to(dtype)
    return tensors


@settings(max_examples=150, deadline=None)
@given(tensor_dicts())
def test_round_trip_keeps_names_dtypes_shapes_and_bits(tensors: dict[str, torch.Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    array = pack(tensors)
    result = unpack(array)
    assert (array.stype, array.dtype, array.shape) == ("safetensors", "uint8", (len(array.data),))
    assert set(result) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name])
        assert result[name].dtype == tensor.dtype
        assert torch.equal(result[name], tensor)
        result[name].zero_()  # writable, and warnings are errors
    assert tensor_bytes(result) == tensor_bytes(tensors)
    assert len(array.data) >= tensor_bytes(tensors)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_reply_error_or_nothing(data: st.DataObject) -> None:
    damaged = bytearray(pack(SMALL).data)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for content in (bytes(damaged), cut):
        with contextlib.suppress(ReplyError):
            unpack(Array(dtype="uint8", shape=(len(content),), stype="safetensors", data=content))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_foreign_bytes_raise_reply_error(content: bytes) -> None:
    with pytest.raises(ReplyError, match=r"^packed tensors cannot be read: .*$"):
        unpack(Array(dtype="uint8", shape=(len(content),), stype="safetensors", data=content))


def test_order_of_names_does_not_change_the_bytes() -> None:
    assert pack(SMALL).data == pack(dict(reversed(SMALL.items()))).data


def test_tied_and_sliced_tensors_are_packed_by_value() -> None:
    flat = torch.arange(10.0, requires_grad=True)
    result = unpack(pack({"left": flat[:5], "right": flat[5:], "all": flat, "again": flat}))
    assert torch.equal(torch.cat([result["left"], result["right"]]), flat.detach())
    assert torch.equal(result["again"], result["all"])
    result["all"].zero_()
    assert result["again"].sum() == 45


def test_unpacked_tensors_do_not_share_memory_with_the_array() -> None:
    array = pack(SMALL)
    unpack(array)["a"].fill_(-1)
    assert torch.equal(unpack(array)["a"], SMALL["a"])


def test_wrong_stype_and_unknown_dtype_are_named() -> None:
    with pytest.raises(ReplyError, match=r"numpy\.ndarray"):
        unpack(dataclasses.replace(pack(SMALL), stype="numpy.ndarray"))
    with pytest.raises(TypeError, match="complex128"):
        pack({"c": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(TypeError, match="__metadata__"):
        pack({"__metadata__": torch.zeros(2)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
def test_flat_array_is_what_flower_would_make(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    assert flat_array(tensor) == Array(tensor.numpy())
    turned = torch.arange(6).reshape(2, 3).T
    assert torch.equal(torch.from_numpy(flat_array(turned).numpy()), turned)


def test_header_of_a_type_that_numpy_does_not_know_is_empty() -> None:
    assert npy_header("bfloat16", (2,)) == b""
    assert npy_header("object", (2,)) == b""
    assert npy_header("float32", (-2,)) == b""


def test_an_array_over_a_view_is_one_of_flowers_and_copies_only_when_asked() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    stock = Array(values)
    view = memoryview(b"before" + stock.data)[6:]
    array = FastArray.of(stock.dtype, stock.shape, stock.stype, view)
    assert array.buffer is view
    assert np.array_equal(array.numpy(), values)
    assert array.numpy().flags.writeable
    assert FastArray.like(array).__dict__["_buffer"] is view
    assert array.buffer is view
    assert array == stock
    assert type(array.data) is bytes
    assert array.buffer == array.data == stock.data
    assert array.object_id == stock.object_id
    array.data = b"other"
    assert array.buffer == b"other"
    assert FastArray.like(stock) == stock


def test_a_resident_client_does_not_import_torch() -> None:
    """It takes a second and 200 MB, and many an app has no use for it."""
    script = "import sys; from fl_edge.link.resident import ClientApp; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
