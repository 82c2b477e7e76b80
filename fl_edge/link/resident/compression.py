"""Lossy compression of float32 arrays on their way; off unless asked for.

Two forms of arrays are compressed: NumPy's of type float32 (``stype`` "numpy.ndarray", C order, at least one axis and
one value), and packed arrays (``stype`` "safetensors"), tensor by tensor where it is F32. All else travels as it is.
The receiver gets an array of the same dtype, shape and ``stype``, and a packed array keeps its header to the bit.

========  =========  ===================================================================================================
scheme    bytes      what is lost
========  =========  ===================================================================================================
"bf16"    2 a value  bits beyond bfloat16, rounded to nearest, ties to even: relative error of normal numbers at most
                     2**-8; beyond 3.39e38 infinite. NaN and infinity stay.
"int8"    1 a value, each row is ``scale`` times integers from -127 to 127, with ``scale = max|row| / 127``: error at
          4 a row    most ``scale / 2`` (and the rounding of float32). It is kept and added to the next array of the
                     same message type, record, key, tensor and shape (error feedback), so that the sum of all that is
                     received stays within ``scale / 2`` of the sum of all that was sent. A tensor with NaN, infinity
                     or a value beyond 1e38 travels as it is, and what was kept for it is forgotten.
========  =========  ===================================================================================================

A row of "int8" is a slice along the last axes, as few as make 64 values, the first axis never among them: a sample of
a batch, or what belongs to one output channel of a weight. Where that makes none, or more than 4096 values, the tensor
is taken as flat, and cut into rows of 1024 values, the last one shorter.

A compressed segment is the array's own header (of .npy, or of safetensors with its length), then the tensors in their
order. A float32 tensor starts with a byte: 1 if it is compressed, 0 if it travels as it is. "int8" has the scales of
all rows first, little-endian, then the integers.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

from fl_edge.link.arrays import PACKED_STYPE, npy_header

Buffer = bytes | memoryview
Floats = NDArray[np.float32]

RAW = "raw"
SCHEMES = ("bf16", "int8")

_ROW, _MIN_ROW, _MAX_ROW = 1024, 64, 4096
_LARGEST = np.float32(1e38)  # beyond, a rounded value or a value plus feedback might become infinite
_SMALLEST_SCALE = np.finfo(np.float32).tiny  # a smaller one would be rounded itself; also serves rows of zeros
_MAX_HEADER, _MAX_AXES = 2**20, 64  # thousands of tensors; a longer one is left alone
_BLOCK = 2**16  # values worked on at a time: they stay in the cache from one operation to the next


class _Piece(NamedTuple):
    """A stretch of an array's bytes."""

    name: str
    length: int
    shape: tuple[int, ...] | None  # of a float32 tensor to compress; nothing for what travels as it is


class Compressor:
    """Compresses the arrays of one direction of one node's stream, for one thread.

    Parameters
    ----------
    scheme
        "bf16" or "int8".
    max_residual_bytes
        Memory for error feedback; beyond it, what was longest not used is forgotten.

    Raises
    ------
    ValueError
        An unknown scheme.

    Attributes
    ----------
    residual_bytes : int
        Memory that error feedback takes now.
    """

    def __init__(self, scheme: Literal["bf16", "int8"], max_residual_bytes: int = 256 * 2**20) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"scheme: {scheme!r} is not allowed, one of {', '.join(SCHEMES)}")
        self._scheme = scheme
        self._max_residual_bytes = max_residual_bytes
        self._residuals: OrderedDict[tuple[Any, ...], Floats] = OrderedDict()
        self.residual_bytes = 0

    def compress(self, array: Array, where: tuple[str, str, str]) -> tuple[str, bytes]:
        """Compress an array that is about to be sent; each call counts as one array sent.

        Parameters
        ----------
        array
            Any array.
        where
            Message type, record's name and array's key.

        Returns
        -------
        encoding, segment
            The scheme and the compressed bytes; or "raw" and the array's own bytes, not copied.
        """
        try:
            pieces = _pieces(array.data, array.dtype, array.shape, array.stype)
        except ValueError:  # nothing for us, but the receiver may know what to do with it
            return RAW, array.data
        if sum(piece.length for piece in pieces) != len(array.data):
            return RAW, array.data
        parts: list[Any] = []
        start, compressed = 0, False
        for name, length, shape in pieces:
            stretch = memoryview(array.data)[start : start + length]
            start += length
            if shape is not None:
                encoded = self._encode(np.frombuffer(stretch, "<f4"), shape, (*where, name, shape))
                parts.append(b"\1" if encoded else b"\0")
                compressed |= bool(encoded)
                parts += encoded or [stretch]
            else:
                parts.append(stretch)
        return (self._scheme, b"".join(parts)) if compressed else (RAW, array.data)

    def _encode(self, values: Floats, shape: tuple[int, ...], key: tuple[Any, ...]) -> list[Any]:
        """Return the bytes of a tensor; nothing if it cannot be compressed."""
        if self._scheme == "bf16":
            return [_to_bf16(values)]
        wanted = self._residuals.pop(key, None)
        if wanted is None:
            width = _row_width(shape)
            wanted = np.zeros((-(-values.size // width), width), np.float32)  # the last row is padded with zeros
        else:
            self.residual_bytes -= wanted.nbytes
        with np.errstate(over="ignore"):  # found below
            wanted.reshape(-1)[: values.size] += values
        if (quantised := _quantise(wanted)) is None:
            return []
        self._residuals[key] = wanted
        self.residual_bytes += wanted.nbytes
        while self.residual_bytes > self._max_residual_bytes:
            self.residual_bytes -= self._residuals.popitem(last=False)[1].nbytes
        scales, integers = quantised
        return [scales, integers.reshape(-1)[: values.size]]


def decompress(segment: bytes, encoding: str, dtype: str, shape: tuple[int, ...], stype: str) -> bytes:
    """Return the bytes of an array from a compressed segment.

    Parameters
    ----------
    segment
        What :meth:`Compressor.compress` made, or anything at all.
    encoding
        The scheme.
    dtype, shape, stype
        Of the array.

    Raises
    ------
    ValueError
        A damaged segment.
    """
    parts: list[Any] = []
    view = memoryview(segment)

    def take(length: int) -> memoryview:
        nonlocal view
        if length > len(view):
            raise ValueError("a compressed array ends early")
        taken, view = view[:length], view[length:]
        return taken

    for _, length, shape_of_piece in _pieces(segment, dtype, shape, stype):
        flag = 0 if shape_of_piece is None else take(1)[0]
        if flag > 1:
            raise ValueError("a compressed array is damaged")
        if not flag or shape_of_piece is None:
            parts.append(take(length))
        elif encoding == "bf16":
            parts.append(_from_bf16(np.frombuffer(take(length // 2), "<u2")))
        else:
            size, width = length // 4, _row_width(shape_of_piece)
            scales = np.frombuffer(take(-(-size // width) * 4), "<f4")
            parts.append(_restore(scales, np.frombuffer(take(size), np.int8), width))
    if view:
        raise ValueError("a compressed array is too long")
    return b"".join(parts)


def _pieces(data: bytes, dtype: str, shape: tuple[int, ...], stype: str) -> list[_Piece]:
    """Read the header with which an array's bytes start; those after it are not looked at.

    Raises
    ------
    ValueError
        No array with float32 values, or a damaged one.
    """
    if stype == "numpy.ndarray" and dtype == "float32" and shape and 0 not in shape:
        header = npy_header(dtype, shape)
        if data.startswith(header):
            return [_Piece("", len(header), None), _Piece("", 4 * math.prod(shape), shape)]
    if stype == PACKED_STYPE and 8 <= (end := 8 + int.from_bytes(data[:8], "little")) <= min(len(data), _MAX_HEADER):
        try:
            return [_Piece("", end, None), *_tensors(json.loads(data[8:end].decode()))]
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):  # JSON, but not of safetensors
            pass
    raise ValueError("a compressed array has a damaged header")


def _tensors(header: dict[str, Any]) -> Iterator[_Piece]:
    """Yield the tensors of a safetensors header in the order of their bytes, which must leave no gaps."""
    position = 0
    entries = [(entry["data_offsets"], name, entry) for name, entry in header.items() if name != "__metadata__"]
    for (start, end), name, entry in sorted(entries, key=lambda item: item[0]):
        shape = tuple(entry["shape"])
        if not all(type(number) is int and number >= 0 for number in (start, end, *shape)) or len(shape) > _MAX_AXES:
            raise ValueError(f"{name!r} has no offsets or no shape")
        is_float = entry["dtype"] == "F32" and start < end
        if start != position or end < start or (is_float and end - start != 4 * math.prod(shape)):
            raise ValueError(f"{name!r} lies elsewhere")
        position = end
        yield _Piece(name, end - start, shape if is_float else None)


def _row_width(shape: tuple[int, ...]) -> int:
    """Return how many values share a scale."""
    width = 1
    for axis in reversed(shape[1:]):
        width *= axis
        if width >= _MIN_ROW:
            break
    return width if _MIN_ROW <= width <= _MAX_ROW else min(_ROW, math.prod(shape))


def _quantise(rows: Floats) -> tuple[Floats, NDArray[np.int8]] | None:
    """Return scales (rows,) and integers (rows, width), and leave in ``rows`` what they lack; or do nothing at all."""
    step = max(1, _BLOCK // rows.shape[1])
    blocks = [slice(start, start + step) for start in range(0, len(rows), step)]
    peaks = np.concatenate([_peaks(rows[block]) for block in blocks])
    if not peaks.max() <= _LARGEST:  # also if it is NaN
        return None
    scales = np.maximum(peaks / np.float32(127), _SMALLEST_SCALE)
    integers = np.empty(rows.shape, np.int8)
    for block in blocks:
        scale = scales[block, None]
        rounded = rows[block] / scale
        np.rint(rounded, out=rounded)
        integers[block] = rounded
        rounded *= scale
        rows[block] -= rounded
    return scales, integers


def _peaks(rows: Floats) -> Floats:
    """Return the largest magnitude of each row, NaN if there is one."""
    folded = np.abs(rows)
    while (width := folded.shape[1]) > 1:  # folding; NumPy's own maximum of short rows takes ten times as long
        folded = np.maximum(folded[:, : (width + 1) // 2], folded[:, width // 2 :])
    return folded[:, 0]


def _restore(scales: Floats, integers: NDArray[np.int8], width: int) -> Floats:
    """Return the values (size,) of rows of which the last may be shorter."""
    if not (scales.min() > 0 and scales.max() <= _LARGEST / 100):
        raise ValueError("a compressed array has a damaged scale")
    values = integers.astype(np.float32)
    full = values.size // width
    values[: full * width].reshape(full, width)[...] *= scales[:full, None]
    values[full * width :] *= scales[-1]
    return values


def _to_bf16(values: Floats) -> NDArray[np.uint16]:
    """Return the upper halves of the values, rounded to nearest, ties to even."""
    bits, result = values.view(np.uint32), np.empty(values.size, np.uint16)
    for start in range(0, values.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        upper = block >> 16
        rounded = upper & 1
        rounded += block
        rounded += 0x7FFF
        rounded >>= 16
        nan = np.isnan(values[start : start + _BLOCK])
        if nan.any():  # rounding would make infinities or zeros of some of them
            rounded[nan] = upper[nan] | 0x40
        result[start : start + _BLOCK] = rounded
    return result


def _from_bf16(halves: NDArray[np.uint16]) -> NDArray[np.uint32]:
    return np.left_shift(halves, 16, dtype=np.uint32)
