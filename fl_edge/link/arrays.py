"""Flower's arrays, made and read at a fraction of the price. Knows nothing of torch, which takes a second to import."""

from __future__ import annotations

import copy
import io
import math
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array

PACKED_STYPE = "safetensors"  # of arrays in which many tensors are packed: fl_edge.link.packing


class FastArray(Array):
    """A Flower array that is made, and read by ``numpy()``, at a fraction of the price; in all else it is the same.

    ``np.load`` parses a header each time; this class compares it with the one that must stand there, and falls back to
    Flower's own way where it does not. Its bytes may be a view of what a connection delivered, until somebody asks for
    them as ``data``; ``buffer`` is the way to read them without a copy.
    """

    __qualname__ = "Array"  # Flower writes the name into the bytes from which it makes an object's id
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...], stype: str, data: bytes | memoryview) -> FastArray:
        """Make an array without the constructor's checks, of bytes that nobody changes."""
        array = cls.__new__(cls)
        array.__dict__.update(dtype=dtype, shape=shape, stype=stype, _buffer=data)
        return array

    @property
    def buffer(self) -> bytes | memoryview:
        """The bytes, or a view of them."""
        return self.__dict__["_buffer"]  # type: ignore[no-any-return]

    @property
    def data(self) -> bytes:
        """The bytes."""
        if type(buffer := self.buffer) is not bytes:
            buffer = self.__dict__["_buffer"] = bytes(buffer)
        return buffer

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["_buffer"] = value

    @classmethod
    def like(cls, array: Array) -> Array:
        """Return an array of one's own with the same, shared, bytes."""
        if type(array) not in (Array, cls):
            return copy.copy(array)
        own = cls.__new__(cls)
        own.__dict__.update(array.__dict__)
        if type(array) is Array:
            own.__dict__["_buffer"] = own.__dict__.pop("data")
        return own

    def numpy(self) -> Any:
        """Return the values as a writable numpy array."""
        header, buffer = npy_header(self.dtype, self.shape), self.buffer
        if header and self.stype == "numpy.ndarray" and buffer[: len(header)] == header:
            size = math.prod(self.shape) * np.dtype(self.dtype).itemsize
            if len(buffer) == len(header) + size:
                return np.frombuffer(buffer, self.dtype, offset=len(header)).reshape(self.shape).copy()
        return super().numpy()

    def __eq__(self, other: object) -> bool:  # a dataclass never equals one of another class
        if not isinstance(other, Array):
            return NotImplemented
        return (self.dtype, self.shape, self.stype, self.data) == (other.dtype, other.shape, other.stype, other.data)

    def __reduce__(self) -> Any:  # what travels to another process (Ray) arrives as Flower's own class
        return Array, (self.dtype, self.shape, self.stype, self.data)


@lru_cache(maxsize=1024)
def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return what ``np.save`` writes before the values of such an array in C order; nothing for a foreign type."""
    try:
        kind = np.dtype(dtype)
    except (TypeError, ValueError):
        return b""
    if kind.hasobject or min(shape, default=0) < 0:
        return b""
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()
