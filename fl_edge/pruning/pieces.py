"""A safetensors file written from pieces of its tensors, so that none of them is ever in memory as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape

_FORMATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_pieces(
    file: Path,
    layout: Layout,
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whole or not at all.

    Parameters
    ----------
    layout
        Of the tensors in the file; floating-point numbers.
    pieces
        Gives the numbers of a tensor in order, in pieces of any size.
    metadata
        Of the file.

    Raises
    ------
    OSError
        The disk is full, the folder is read-only, or it is gone; what stood there before is unchanged.
    """
    order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))  # so that every tensor is aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        dtype, shape = layout[name]
        start, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": _FORMATS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            begin = stream.tell()
            for name in order:
                for piece in pieces(name):
                    stream.write(_raw(piece.to(layout[name][0])))
            if stream.tell() - begin != end:
                raise ValueError(f"the pieces of {file.name} have {stream.tell() - begin} bytes instead of {end}")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _raw(piece: Tensor) -> memoryview:
    return piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
