"""LoRA pairs of one linear map, whole or as a pruned device holds them; which entries a device receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_edge.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Factors:
    """One LoRA pair; its product is ``b @ a``. The scale is left out: it is the same for every rank (alpha ∝ r).

    Parameters
    ----------
    a, b
        (r, d_in) and (d_out, r), r at least 1.
    """

    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or len(self.a) != self.b.shape[1] or not len(self.a):
            raise ConfigError(
                f"LoRA factors {tuple(self.a.shape)} and {tuple(self.b.shape)}; (r, d_in) and (d_out, r) are due"
            )

    @property
    def rank(self) -> int:
        """R, the number of rows of ``a``."""
        return len(self.a)


@dataclass(frozen=True, eq=False)
class Part:
    """What one device trained of one linear map.

    Parameters
    ----------
    factors
        In the shapes that the device holds: (r_i, kept columns) and (kept rows, r_i).
    weight
        Of the device, above 0; only ratios between the devices of one map matter.
    rows, columns
        Kept outputs (rows of ``b``) and inputs (columns of ``a``) as int64 indices; None means all.
    """

    factors: Factors
    weight: float
    rows: Tensor | None = None
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"a part of weight {self.weight}; a number above 0 is due")
        for index, held, name in (
            (self.rows, len(self.factors.b), "rows"),
            (self.columns, self.factors.a.shape[1], "columns"),
        ):
            if index is not None and len(index) != held:
                raise ConfigError(f"a part with {held} {name} and {len(index)} indices of kept {name}")


def gather(factors: Factors, rank: int, rows: Tensor | None = None, columns: Tensor | None = None) -> Factors:
    """Return what a device receives: the first ``rank`` directions, at its kept rows and columns.

    Where nothing is cut, the result shares the memory of ``factors``.

    Raises
    ------
    ConfigError
        A rank outside 1 to that of ``factors``.
    """
    if not 1 <= rank <= factors.rank:
        raise ConfigError(f"rank {rank} of an adapter of rank {factors.rank}; 1 to {factors.rank} is allowed")
    a, b = factors.a[:rank], factors.b[:, :rank]
    if columns is not None:
        a = a[:, columns.to(a.device)]
    if rows is not None:
        b = b[rows.to(b.device)]
    return Factors(a.contiguous(), b.contiguous())


def scatter(held: Factors, onto: Factors, rows: Tensor | None = None, columns: Tensor | None = None) -> Factors:
    """Return a copy of ``onto`` whose entries at a device's directions, rows and columns are the device's.

    The inverse of :func:`gather` on the entries held: ``scatter(gather(x, r, o, i), x, o, i)`` is x, and gathering from
    what was scattered gives the device's factors back, onto whatever they were scattered.
    """
    a, b = onto.a.clone(), onto.b.clone()
    a[: held.rank, slice(None) if columns is None else columns.to(a.device)] = held.a.to(a)
    b[slice(None) if rows is None else rows.to(b.device), : held.rank] = held.b.to(b)
    return Factors(a, b)


def fresh_rows(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Return rows of ``a`` as LoRA starts with them: uniform in ±1 / sqrt(d_in), peft's Kaiming default, float32."""
    bound = width**-0.5
    return torch.empty(count, width, device=generator.device).uniform_(-bound, bound, generator=generator)
