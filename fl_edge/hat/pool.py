"""Keys and values of all requests in the cloud: one slot of fixed capacity for each request.

*Ours*. The cache classes of transformers, which the device uses, hold one batch of sequences of the same length: they
can neither be cut back for one request alone, nor leave out the requests that are not in a batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fl_edge.errors import ConfigError

_STEP = 64  # rows by which what is defined of a slot grows


class Pool:
    """Slots for keys and values, allocated at the first use.

    On a CPU memory that was never written costs nothing, so the capacity may be the model's context length.

    Parameters
    ----------
    layers, heads, head_dim
        Decoder layers of the middle submodel, key/value heads, width of a head.
    capacity
        Most rows of a request.
    tokens
        Budget: rows of all requests together. There are ``tokens // capacity`` slots.
    device, dtype
        Of the middle submodel.

    Attributes
    ----------
    slots
        How many there are.
    free
        How many of them are free.

    Raises
    ------
    ConfigError
        A budget that is less than one request.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        capacity: int,
        tokens: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if tokens < capacity:
            raise ConfigError(f"a cache of {tokens} tokens holds no request of {capacity}; it must be at least as many")
        self.capacity, self.slots = capacity, tokens // capacity
        self._shape = layers, 2, self.slots, heads, capacity, head_dim
        self._device, self._dtype = device, dtype
        self._free = list(range(self.slots))  # a heap: low slots first, so that those in use lie side by side
        self._defined = [0] * self.slots

    @property
    def free(self) -> int:
        """Slots that are free."""
        return len(self._free)

    def take(self) -> int | None:
        """Return a free slot, None if there is none."""
        return heapq.heappop(self._free) if self._free else None

    def give_back(self, slot: int) -> None:
        """Free a slot."""
        self.forget(slot, 0)
        heapq.heappush(self._free, slot)

    def forget(self, slot: int, base: int) -> None:
        """Take what stands at ``base`` and beyond for undefined: needed after numbers that are not finite."""
        self._defined[slot] = min(self._defined[slot], base)

    def define(self, slots: Iterable[int], length: int) -> None:
        """Write zeros where the first ``length`` rows of these slots are undefined.

        A row that is masked still is multiplied, by zero: it may be anything but NaN.
        """
        for slot in slots:
            if (start := self._defined[slot]) < length:
                self._defined[slot] = stop = min(self.capacity, -(-length // _STEP) * _STEP)
                self._store[:, :, slot, :, start:stop] = 0

    def move(self, slot: int, base: int, kept: Sequence[int]) -> None:
        """Move the kept rows, counted from ``base`` and ascending, to ``base`` and behind it."""
        there = self._store[:, :, slot, :, base:]
        index = torch.tensor(kept, device=there.device)
        there[..., : len(kept), :] = there.index_select(3, index)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer, (slots, heads, capacity, head_dim) each, as views."""
        return self._views[layer]

    @cached_property
    def _store(self) -> Tensor:
        return torch.empty(self._shape, device=self._device, dtype=self._dtype)

    @cached_property
    def _views(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer[0], layer[1]) for layer in self._store]
