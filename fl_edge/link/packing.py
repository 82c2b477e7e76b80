"""Many tensors in one Flower array.

In a deployment every array of a message is its own HTTP request, so two hundred small arrays take five times as long as
one that holds the same bytes. A packed array holds safetensors bytes: they say themselves what is in them, carry
bfloat16 (which a numpy-backed array cannot), and reading them never executes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Array
from safetensors.torch import load, save

from fl_edge.errors import ReplyError
from fl_edge.link.arrays import PACKED_STYPE, FastArray, npy_header


def pack(tensors: Mapping[str, torch.Tensor]) -> Array:
    """Put many tensors into one array.

    Parameters
    ----------
    tensors
        Tensors by name, of any shape (also 0-d, empty, non-contiguous, views of one storage) and on any device.

    Returns
    -------
    Array
        ``stype`` "safetensors", ``dtype`` "uint8", ``shape`` (number of bytes,). Equal tensors give equal bytes,
        whatever their order in ``tensors``.

    Raises
    ------
    TypeError
        A data type that safetensors does not know.
    """
    if "__metadata__" in tensors:
        raise TypeError("a tensor cannot be named '__metadata__': safetensors keeps that name for itself")
    ready: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        # safetensors refuses tensors that share memory (tied weights, slices of one flat vector): give each its own.
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    try:
        data = save(ready)
    except KeyError as error:
        raise TypeError(f"safetensors cannot hold tensors of type {error}") from error
    return Array(dtype="uint8", shape=(len(data),), stype=PACKED_STYPE, data=data)


def unpack(array: Array) -> dict[str, torch.Tensor]:
    """Take the tensors out of an array made by :func:`pack`.

    Parameters
    ----------
    array
        A packed array; it may come from a device and is checked, not trusted.

    Returns
    -------
    dict[str, torch.Tensor]
        Writable tensors on the CPU, none of which shares memory with ``array``.

    Raises
    ------
    ReplyError
        The array is not of ``stype`` "safetensors", or its bytes are damaged.
    """
    if array.stype != PACKED_STYPE:
        raise ReplyError(f"array of stype {array.stype!r} cannot be unpacked, expected {PACKED_STYPE!r}")
    try:
        return load(array.data)
    except Exception as error:  # damaged bytes surface as SafetensorError, KeyError, ValueError, RuntimeError, ...
        detail = (str(error).splitlines() or [""])[0]
        raise ReplyError(f"packed tensors cannot be read: {type(error).__name__}: {detail}") from error


def flat_array(vector: torch.Tensor) -> Array:
    """Put one tensor into an array that stock strategies can average.

    The result equals ``Array(vector.numpy())`` to the bit, at a third of its price: the header that ``np.save`` writes
    anew each time is kept.

    Parameters
    ----------
    vector
        A tensor on the CPU, of any shape, of a type that numpy knows.
    """
    values = vector.detach().numpy()
    dtype = _dtype_name(values.dtype)
    return FastArray.of(dtype, values.shape, "numpy.ndarray", npy_header(dtype, values.shape) + values.tobytes())


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the payload of the tensors in bytes, without names, shapes and headers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@lru_cache(maxsize=64)
def _dtype_name(dtype: np.dtype[Any]) -> str:
    return str(dtype)  # numpy takes longer for this than for copying 20 kB
