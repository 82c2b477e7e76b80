"""What a device's adapter must be before it may touch the global one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.fedspine.factors import Factors

_A, _B = ".lora_A.weight", ".lora_B.weight"  # peft's endings


def named(adapter: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return the factors of each module under the names that peft gives them, a before b."""
    return {
        name: tensor
        for module, factors in adapter.items()
        for name, tensor in ((module + _A, factors.a), (module + _B, factors.b))
    }


def checked_adapter(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], rank: int
) -> dict[str, Factors]:
    """Return a device's factors, module by module in the order of ``shapes``.

    Parameters
    ----------
    tensors
        What came back, named as by :func:`named`.
    shapes
        For each module that was sent, how many rows and columns the device keeps after its round: (d_out', d_in').
    rank
        That the device was given.

    Raises
    ------
    ReplyError
        A missing or an unexpected tensor, another rank or shape than was due, integers, numbers that are not finite.
    """
    due = {name for module in shapes for name in (module + _A, module + _B)}
    if unexpected := sorted(tensors.keys() - due):
        raise ReplyError(f"{unexpected[0]}: no such tensor was sent")
    adapter = {}
    for module, (rows, columns) in shapes.items():
        a, b = _floating(tensors, module + _A), _floating(tensors, module + _B)
        if len(a) != rank or b.shape[1] != rank:
            raise ReplyError(f"{module}: rank {len(a)} in a and {b.shape[1]} in b; {rank} was given")
        if a.shape[1] != columns or len(b) != rows:
            raise ReplyError(f"{module}: {len(b)} rows and {a.shape[1]} columns; {rows} and {columns} were due")
        for name, tensor in ((module + _A, a), (module + _B, b)):
            if not torch.isfinite(tensor).all():
                raise ReplyError(f"{name}: numbers that are not all finite")
        adapter[module] = Factors(a, b)
    return adapter


def checked_samples(samples: int) -> int:
    """Return n_i, the number of samples a device trained on.

    Raises
    ------
    ReplyError
        Fewer than 1: the device's factors are those it was sent.
    """
    if samples < 1:
        raise ReplyError(f"{samples} samples; at least 1 is due")
    return samples


def _floating(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ReplyError(f"no tensor {name}")
    found = tensors[name]
    if found.ndim != 2 or not found.is_floating_point():
        raise ReplyError(f"{name} of shape {tuple(found.shape)} {found.dtype}; a matrix of floating type was due")
    return found
