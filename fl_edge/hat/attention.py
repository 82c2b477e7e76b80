"""Attention of a batch in which each request has its own history: all else of a decoder layer sees plain rows.

That a batch mixes verifications and prompt chunks is HAT's. How they share one forward is *ours*: linear layers, norms
and rotary embeddings run on the rows of all requests in a line, (1, r, d). Attention writes the new keys and values
into the pool and runs over groups of requests, padded to their most rows and longest history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fl_edge.hat.pool import Pool

IMPLEMENTATION = "fl_edge_ragged"
_FEW = 16  # most rows of a request that shares a padded call
_WASTE = 2  # a padded call does at most this many times the work of its requests one by one


@dataclass(frozen=True)
class Span:
    """Rows of one request in a batch.

    Attributes
    ----------
    slot
        In the pool.
    base
        Rows of the request before these.
    count
        How many these are.
    parents
        Of a draft tree, as in an upload; None: a chain.
    """

    slot: int
    base: int
    count: int
    parents: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        """Rows of the request with these."""
        return self.base + self.count

    def depths(self) -> list[int]:
        """Return for each row how far behind ``base`` its position is."""
        if self.parents is None:
            return list(range(self.count))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    def lines(self) -> list[list[bool]]:
        """Return for each row which of the rows it follows, itself among them."""
        if self.parents is None:
            return [[other <= row for other in range(self.count)] for row in range(self.count)]
        lines: list[list[bool]] = []
        for row, parent in enumerate(self.parents):
            lines.append(list(lines[parent]) if parent >= 0 else [False] * self.count)
            lines[-1][row] = True
        return lines


def grouped(spans: Sequence[Span]) -> list[list[int]]:
    """Return which spans share a call of attention, those of a group by slot.

    A span of many rows stays alone. The others share calls as long as padding them to the most rows and the longest
    history does not make more than twice the work.
    """
    groups = [[index] for index, span in enumerate(spans) if span.count > _FEW]
    few = (index for index, span in enumerate(spans) if span.count <= _FEW)
    group: list[int] = []
    most = work = 0
    for index in sorted(few, key=lambda index: -spans[index].end):
        count, end = spans[index].count, spans[index].end
        longest = spans[group[0]].end if group else end
        if group and (len(group) + 1) * max(most, count) * longest > _WASTE * (work + count * end):
            groups.append(group)
            group, most, work = [], 0, 0
        group.append(index)
        most, work = max(most, count), work + count * end
    groups += [group] if group else []
    return [sorted(group, key=lambda index: spans[index].slot) for group in groups]


class Group:
    """Spans that share a call of attention: b of them, at most n rows each, histories of at most t rows with their own.

    Parameters
    ----------
    spans
        By slot.
    device, dtype
        Of queries.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device, dtype: torch.dtype) -> None:
        self._spans, self.device, self._dtype = spans, device, dtype
        self.total = sum(span.count for span in spans)
        self.most, self.length = max(span.count for span in spans), max(span.end for span in spans)
        slots = [span.slot for span in spans]
        adjacent = slots[-1] - slots[0] == len(slots) - 1
        self.slots = slice(slots[0], slots[-1] + 1) if adjacent else torch.tensor(slots, device=device)
        self.even = self.total == self.most * len(spans)
        if not self.even:
            # what is padded repeats the span's first row, since a row that may attend to nothing gives NaN
            starts = [sum(span.count for span in spans[:place]) for place in range(len(spans))]
            rows = [
                start + (row if row < span.count else 0)
                for start, span in zip(starts, spans, strict=True)
                for row in range(self.most)
            ]
            true = [row < span.count for span in spans for row in range(self.most)]
            self.padded = torch.tensor(rows, device=device)
            self.true = torch.tensor([place for place, each in enumerate(true) if each], device=device)
        self._masks: dict[tuple[int | None, int], Tensor | None] = {}

    @property
    def causal(self) -> bool:
        """One chain of rows without a history."""
        (first, *others) = self._spans
        return not others and first.base == 0 and first.parents is None and first.count > 1

    def mask(self, window: int | None, shared: int) -> Tensor | None:
        """Return what is added to the scores, (b, 1, shared n, t): 0 or -inf. None: nothing, or only causal.

        Made at the first layer that asks.

        Parameters
        ----------
        window
            Positions that a row sees, its own among them; None: all.
        shared
            Query heads of a key/value head; their rows stand one head after another.
        """
        window = None if window is None or window >= self.length else window
        if (key := (window, shared)) not in self._masks:
            self._masks[key] = self._make(window, shared)
        return self._masks[key]

    def _make(self, window: int | None, shared: int) -> Tensor | None:
        spans, most = self._spans, self.most
        single = len(spans) == 1 and most == 1
        if window is None and (self.causal or single):
            return None
        bases = torch.tensor([span.base for span in spans], device=self.device)[:, None, None]
        keys = torch.arange(self.length, device=self.device)
        depths = torch.tensor([_filled(span.depths(), most, 0) for span in spans], device=self.device)[..., None]
        if all(span.parents is None for span in spans):
            seen, places = keys <= bases + depths, keys  # (b, n, t), (t)
        else:
            lines = [[_filled(line, most, False) for line in _filled(span.lines(), most)] for span in spans]
            own = keys - bases  # (b, 1, t)
            behind = own.clamp(0, most - 1)
            line = torch.tensor(lines, device=self.device).gather(2, behind.expand(-1, most, -1))
            depth = depths.transpose(1, 2).gather(2, behind)
            seen, places = (own < 0) | (line & (own < most)), torch.where(own < 0, keys, bases + depth)
        if window is not None:
            seen &= bases + depths - places < window
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=self.device).masked_fill_(~seen, -torch.inf)
        return mask.repeat(1, shared, 1)[:, None]


def _filled(values: list[Any], length: int, value: Any = None) -> list[Any]:
    """Repeat the first value, or the given one, up to a length."""
    return values + [values[0] if value is None else value] * (length - len(values))


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch as attention sees it; all that does not differ from layer to layer is made here.

    Attributes
    ----------
    pool
        Keys and values of all requests.
    groups
        Their rows stand one after another.
    slots, places
        (r) int64, where keys and values of each row go.
    """

    pool: Pool
    groups: Sequence[Group]
    slots: Tensor
    places: Tensor


def ragged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,  # noqa: ARG001 - transformers' interface
    scaling: float,
    batch: Batch,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Write keys and values of new rows, then attend, as an attention function of transformers.

    Parameters
    ----------
    query, key, value
        (1, heads, r, head_dim), rotated; keys and values may have fewer heads.

    Returns
    -------
    Tensor
        (1, r, heads, head_dim).
    """
    keys, values = batch.pool.layer(module.layer_idx)
    keys[batch.slots, :, batch.places] = key[0].transpose(0, 1)
    values[batch.slots, :, batch.places] = value[0].transpose(0, 1)
    found, start = [], 0
    for group in batch.groups:
        rows = query[0, :, start : start + group.total]
        found.append(_attended(group, rows, keys, values, scaling, sliding_window))
        start += group.total
    return (found[0] if len(found) == 1 else torch.cat(found))[None], None


def _attended(group: Group, query: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None) -> Tensor:
    """Return (rows, heads, head_dim) of a group's queries, (heads, rows, head_dim)."""
    heads, _, width = query.shape
    pairs, most = keys.shape[1], group.most
    shared = heads // pairs
    keys, values = (_chosen(each[:, :, : group.length], group.slots) for each in (keys, values))
    mask = group.mask(window, shared)
    if mask is None and group.causal:
        answer = scaled_dot_product_attention(
            query[None], keys, values, is_causal=True, scale=scaling, enable_gqa=shared > 1
        )
        return answer[0].transpose(0, 1)
    rows = query if group.even else query.index_select(1, group.padded)
    # heads that share keys become rows, so that keys are not repeated
    rows = rows.reshape(pairs, shared, -1, most, width).permute(2, 0, 1, 3, 4).reshape(-1, pairs, shared * most, width)
    answer = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)
    answer = answer.view(-1, pairs, shared, most, width).permute(0, 3, 1, 2, 4).reshape(-1, heads, width)
    return answer if group.even else answer.index_select(0, group.true)


def _chosen(stored: Tensor, slots: slice | Tensor) -> Tensor:
    return stored[slots] if isinstance(slots, slice) else stored.index_select(0, slots)


AttentionInterface.register(IMPLEMENTATION, ragged_attention)
