"""What goes through one linear map while hidden states pass its layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Seen:
    """What went into a linear map and came out of it, (s, n, features)."""

    inputs: Tensor
    outputs: Tensor


@contextmanager
def watched(linear: nn.Linear, hidden: Tensor) -> Iterator[Seen]:
    """Keep what goes through a map while hidden states (s, n, d) pass its layer, which may flatten them (OPT does)."""
    seen = Seen(torch.empty(0), torch.empty(0))

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        seen.inputs, seen.outputs = (each.view(*hidden.shape[:2], -1) for each in (inputs[0], outputs))

    handle = linear.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
