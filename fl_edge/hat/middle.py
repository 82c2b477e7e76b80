"""The middle submodel, run on the rows of many requests at once.

HAT's cloud mixes verifications of many devices with prompt chunks in one batch; the form is *ours*
(:mod:`fl_edge.hat.attention`). A request's result does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fl_edge.hat.attention import IMPLEMENTATION, Batch, Group, Span, grouped
from fl_edge.hat.pool import Pool
from fl_edge.hat.split import MiddleModel


@dataclass(frozen=True, eq=False)
class Item:
    """What the middle submodel is to run of one request.

    Attributes
    ----------
    span
        Where the rows belong.
    rows
        (n, d).
    """

    span: Span
    rows: Tensor


class Middle:
    """The middle submodel with the keys and values of all requests.

    Parameters
    ----------
    model
        The middle submodel; it is changed to attend by way of the pool.
    capacity
        Most rows of a request.
    tokens
        Budget of keys and values: rows of all requests together.

    Attributes
    ----------
    pool
        Where keys and values are kept.
    width, dtype
        d, and what is computed in.
    capacity
        As given, or the model's context length if that is less.

    Raises
    ------
    ConfigError
        A budget that is less than one request.
    """

    def __init__(self, model: MiddleModel, capacity: int, tokens: int) -> None:
        self._model, body, config = model, model.body, model.config
        attention = body.layers[0].self_attn
        self._device, self.dtype = attention.o_proj.weight.device, attention.o_proj.weight.dtype
        self.width: int = config.hidden_size
        self.capacity = min(capacity, config.max_position_embeddings)
        shape = len(body.layers), config.num_key_value_heads, attention.head_dim
        self.pool = Pool(*shape, self.capacity, tokens, self._device, self.dtype)
        body.set_attn_implementation(IMPLEMENTATION)

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[Tensor]:
        """Run rows of several requests as one batch; their keys and values stay in the pool.

        Parameters
        ----------
        items
            At most one of each slot. What the pool holds of it before the span's base must be there.

        Returns
        -------
        list of Tensor
            For each item, in order, its rows after the middle submodel, (n, d), on the device of the first one's rows.
        """
        spans = [item.span for item in items]
        order = grouped(spans)
        groups = [Group([spans[index] for index in group], self._device, self.dtype) for group in order]
        for group, indices in zip(groups, order, strict=True):
            self.pool.define((spans[index].slot for index in indices), group.length)
        line = [index for group in order for index in group]
        rows = torch.cat([items[index].rows for index in line]).to(self._device, self.dtype)
        batch, positions = _batch(self.pool, groups, [spans[index] for index in line])
        found = self._model(rows[None], positions=positions, batch=batch)[0].to(items[0].rows.device)
        ends = [0]
        for index in line:
            ends.append(ends[-1] + spans[index].count)
        parts = {index: found[start:end] for index, (start, end) in zip(line, pairwise(ends), strict=True)}
        return [parts[index] for index in range(len(items))]


def _batch(pool: Pool, groups: Sequence[Group], spans: Sequence[Span]) -> tuple[Batch, Tensor]:
    """Return what attention takes, and the rows' positions, (1, r)."""
    places = [
        (span.slot, span.base + row, span.base + depth) for span in spans for row, depth in enumerate(span.depths())
    ]
    slots, rows, positions = torch.tensor(places, device=groups[0].device).T.contiguous()
    return Batch(pool, groups, slots, rows), positions[None]
