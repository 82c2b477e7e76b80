"""One LoRA adapter out of many devices' adapters of different ranks and pruned shapes, one linear map at a time.

Rules, all of which divide by the weight of those who hold an entry, and keep the old value where nobody does:

=================  ======================================================================================
masked_mean        mean of a's and b's entries one by one: cheap, but mean(b) mean(a) is not mean(b a)
flexlora           mean of the products, then its best approximation (FlexLoRA, arXiv 2402.11505)
rank_partitioned   each direction's product averaged over those whose rank reaches it, then the best
                   approximation (raFLoRA, arXiv 2602.13486)
stacking           mean of the products, exactly, at the sum of all ranks (FLoRA, arXiv 2409.05976)
=================  ======================================================================================

The rules for pruned shapes are ours, as are the formulas of masked mean and rank_partitioned: FedSpine's notes say no
more than "reconstruct, then weight by heterogeneity", and of raFLoRA we read the abstract.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fl_edge.errors import ConfigError
from fl_edge.fedspine.factors import Factors, Part, fresh_rows
from fl_edge.fedspine.lowrank import Side, best

Rule = Literal["masked_mean", "flexlora", "rank_partitioned", "stacking"]


@torch.no_grad()
def aggregate(rule: Rule, parts: Iterable[Part], previous: Factors, rank: int, generator: torch.Generator) -> Factors:
    """Return the new global factors of one linear map.

    Parameters
    ----------
    rule
        One of the four in the module's docstring.
    parts
        At least one. masked_mean takes them one at a time and keeps none; the others need all parts of the map at once.
    previous
        The global factors that the devices started from. The result has their type and device; sums are in float64.
    rank
        Of the result, except for stacking, whose rank is the sum of the parts' (see :func:`truncate` for what devices
        then receive). masked_mean demands that ``previous`` has it.
    generator
        For fresh directions. Where the mean has fewer than ``rank`` nonzero singular values, a's further rows are drawn
        as LoRA starts with them and b's columns are zero: the product stays as it is, and the directions can train.

    Raises
    ------
    ConfigError
        An unknown rule, no part, a rank out of range, a part that does not fit ``previous``; for the rules on products,
        parts cut on both sides: who holds an entry of the product is then no longer a matter of its row or its column.
    """
    if rule not in get_args(Rule):
        raise ConfigError(f"no aggregation rule {rule!r}: there are {', '.join(get_args(Rule))}")
    widest = min(len(previous.b), previous.a.shape[1])
    if not 1 <= rank <= widest:
        raise ConfigError(f"rank {rank} of a map {(len(previous.b), previous.a.shape[1])}; 1 to {widest} is allowed")
    if rule == "masked_mean":
        return _masked_mean(parts, previous, rank)
    left, right = _mean_of_products(list(parts), previous, by_rank=rule == "rank_partitioned")
    if rule == "stacking":
        if len(left) <= widest:
            a = right.fill(previous.a.new_empty(len(right), right.width))
            return Factors(a, left.fill(previous.b.new_empty(left.width, len(left)).T).T)
        rank = widest
    return _padded(best(left, right, rank), rank, previous, generator)


@torch.no_grad()
def truncate(factors: Factors, rank: int, generator: torch.Generator) -> Factors:
    """Return the best approximation of the product by ``rank`` directions, ordered by singular value.

    What devices receive after stacking. FLoRA merges the whole stack into the base, which a device whose base is pruned
    and frozen cannot do. The first r directions of the result are in turn the best approximation of rank r, so that one
    call with the largest rank serves all devices, each by :func:`~fl_edge.fedspine.factors.gather`.
    """
    return _padded(best(Side([factors.b.T]), Side([factors.a]), rank), rank, factors, generator)


def _padded(pair: tuple[Tensor, Tensor], rank: int, like: Factors, generator: torch.Generator) -> Factors:
    u, v = pair
    missing = rank - len(u)
    if missing:
        u = torch.cat([u, u.new_zeros(missing, u.shape[1])])
        v = torch.cat([v, fresh_rows(missing, v.shape[1], generator).to(v)])
    return _like(like, u.T, v)


def _like(like: Factors, b: Tensor, a: Tensor) -> Factors:
    return Factors(a.to(like.a).contiguous(), b.to(like.b).contiguous())


def _fitting(parts: Iterable[Part], previous: Factors) -> Iterator[Part]:
    """Yield the parts, each after a look at its shapes."""
    shape, empty = (len(previous.b), previous.a.shape[1]), True
    for part in parts:
        empty = False
        held = (len(part.factors.b), part.factors.a.shape[1])
        for width, own, kept in zip(shape, held, (part.rows, part.columns), strict=True):
            if own != width if kept is None else own > width:
                raise ConfigError(f"a part of shape {held}; its map has {shape}")
        yield part
    if empty:
        raise ConfigError("no part to aggregate; at least one is due")


class _Mean:
    """Running weighted mean of (r_i, width) matrices, each filling the first r_i rows, at all columns or at some."""

    def __init__(self, like: Tensor) -> None:
        self.total = torch.zeros_like(like, dtype=torch.float64)  # keeps the strides of b's transpose
        self.weight = self.total.new_zeros(len(like), 1)  # (rank, 1) until somebody lacks a column

    def add(self, matrix: Tensor, weight: float, index: Tensor | None) -> None:
        rank = len(matrix)
        matrix = matrix.to(self.total.device)
        if index is None:
            self.total[:rank].add_(matrix, alpha=weight)
            self.weight[:rank] += weight
            return
        if self.weight.shape[1] == 1:
            self.weight = self.weight.repeat(1, self.total.shape[1])
        index = index.to(self.total.device)
        self.total[:rank, index] += weight * matrix.double()
        self.weight[:rank, index] += weight

    def settle(self, old: Tensor) -> Tensor:
        return torch.where(self.weight > 0, self.total / torch.where(self.weight > 0, self.weight, 1.0), old)


def _masked_mean(parts: Iterable[Part], previous: Factors, rank: int) -> Factors:
    if previous.rank != rank:
        raise ConfigError(f"masked_mean to rank {rank} from factors of rank {previous.rank}; the ranks must agree")
    a, b = _Mean(previous.a), _Mean(previous.b.T)
    for part in _fitting(parts, previous):
        if part.factors.rank > rank:
            raise ConfigError(f"a part of rank {part.factors.rank}; masked_mean takes up to that of the result, {rank}")
        a.add(part.factors.a, part.weight, part.columns)
        b.add(part.factors.b.T, part.weight, part.rows)
    return _like(previous, b.settle(previous.b.T).T, a.settle(previous.a))


def _mean_of_products(parts: Sequence[Part], previous: Factors, by_rank: bool) -> tuple[Side, Side]:
    """Return the left and right sides of the holders' mean of b @ a.

    An entry of the product is divided by the weight of those who hold its row (or its column), with ``by_rank`` those
    who also have the direction. That scales the entries of one side, so that the mean stays a sum of rank-one terms.
    What nobody holds joins it from the previous factors.
    """
    parts = list(_fitting(parts, previous))
    if any(part.columns is not None for part in parts):
        if any(part.rows is not None for part in parts):
            raise ConfigError("parts of one map cut in rows and in columns; masked_mean alone can average those")
        turned = [Part(_turned(part.factors), part.weight, rows=part.columns) for part in parts]
        return _mean_of_products(turned, _turned(previous), by_rank)[::-1]
    device, width = previous.b.device, len(previous.b)
    levels = max([previous.rank, *(part.factors.rank for part in parts)]) if by_rank else 1
    uncut = all(part.rows is None for part in parts)
    held = torch.zeros(levels, 1 if uncut else width, dtype=torch.float64, device=device)
    for part in parts:
        held[: part.factors.rank, _index(part.rows, device)] += part.weight
    orphans = held == 0
    share = 1 / torch.where(orphans, 1.0, held)
    left = [_whole(part.factors.b.T.to(device), part.rows, width) for part in parts]
    right = [part.factors.a.to(device) for part in parts]
    shares = [part.weight * share[: part.factors.rank] for part in parts]
    if orphans[: previous.rank].any():
        left.append(previous.b.T)
        right.append(previous.a)
        shares.append(orphans[: previous.rank].double())
    return Side(left, shares), Side(right)


def _turned(factors: Factors) -> Factors:
    return Factors(factors.b.T, factors.a.T)


def _index(kept: Tensor | None, device: torch.device) -> Tensor | slice:
    return slice(None) if kept is None else kept.to(device)


def _whole(matrix: Tensor, kept: Tensor | None, width: int) -> Tensor:
    """Return (r, kept) scattered into zeros (r, width)."""
    if kept is None:
        return matrix
    whole = matrix.new_zeros(len(matrix), width)
    whole[:, kept.to(matrix.device)] = matrix
    return whole
