"""Best rank-r approximation of a sum of rank-one terms, without ever forming the sum where it is large.

A sum M = leftᵀ right of R terms has two sides, left (R, d_out) and right (R, d_in). With right rightᵀ = F Fᵀ, the
matrix C = Fᵀ (left leftᵀ) F is only (R, R) and has the nonzero eigenvalues of M Mᵀ, which are the squares of M's
singular values s; its eigenvectors V give M's left vectors, leftᵀ F V / s. All of it is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Singular values below this share of the largest are taken for zero: what float32, the type of all factors on devices
# and on the wire, cannot tell from it.
NEGLIGIBLE = torch.finfo(torch.float32).eps
# Rounding of C, relative to its largest eigenvalue, up to which its eigenvectors are exact enough (1e-6 of the sum).
_TRUSTED = 1e-13
_SLAB = 2**18  # numbers of a side that are held in float64 at once


@dataclass(frozen=True, eq=False)
class Side:
    """One side of the sum: R rows of one width, in blocks.

    Parameters
    ----------
    blocks
        (r_i, width) each, of any floating type; their rows one after another are the side.
    shares
        For each block None, or what its entries are multiplied with: float64, (1 or r_i, 1 or width).
    """

    blocks: Sequence[Tensor]
    shares: Sequence[Tensor] | None = None

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.blocks[0].shape[1]

    def __len__(self) -> int:
        return sum(len(block) for block in self.blocks)

    def slab(self, start: int, stop: int) -> Tensor:
        """Return columns ``start`` to ``stop``, (R, stop - start) float64."""
        slab = torch.cat([block[:, start:stop] for block in self.blocks]).double()
        if self.shares is None:
            return slab
        if self.shares[0].shape[1] == 1:
            return slab.mul_(self._column)
        for own, share in zip(torch.split(slab, [len(block) for block in self.blocks]), self.shares, strict=True):
            own.mul_(share[:, start:stop])
        return slab

    @cached_property
    def _column(self) -> Tensor:
        """The shares of rows that have one each, (R, 1)."""
        shares = zip(self.blocks, self.shares or (), strict=True)
        return torch.cat([share.expand(len(block), 1) for block, share in shares])

    def slabs(self) -> Iterator[Tensor]:
        """Yield all columns, some at a time, so that a large side is never held in float64."""
        if self._step >= self.width:
            yield self._only
            return
        for start in range(0, self.width, self._step):
            yield self.slab(start, min(start + self._step, self.width))

    @property
    def _step(self) -> int:
        return max(1, _SLAB // len(self))

    @cached_property
    def _only(self) -> Tensor:
        return self.slab(0, self.width)

    def fill(self, out: Tensor) -> Tensor:
        """Write the side into ``out``, (R, width) of any floating type, and return that."""
        for part, slab in zip(torch.split(out, self._step, dim=1), self.slabs(), strict=True):
            part.copy_(slab)
        return out

    def whole(self) -> Tensor:
        """Return the side as one matrix, (R, width) float64."""
        return self.fill(torch.empty(len(self), self.width, dtype=torch.float64, device=self.blocks[0].device))

    def gram(self) -> Tensor:
        """Return side sideᵀ, (R, R)."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64, device=self.blocks[0].device)
        tile = max(128, len(self) // 4)
        for slab in self.slabs():
            for start in range(0, len(self), tile):  # the upper triangle is enough
                total[start : start + tile, start:].addmm_(slab[start : start + tile], slab[start:].T)
        for start in range(0, len(self), tile):
            total[start + tile :, start : start + tile] = total[start : start + tile, start + tile :].T
        return total

    def mix(self, coefficients: Tensor) -> Tensor:
        """Return coefficients side, (k, width), for coefficients (k, R)."""
        return torch.cat([coefficients @ slab for slab in self.slabs()], dim=1)


def best(left: Side, right: Side, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of the sum by at most ``rank`` terms, in float64.

    Returns
    -------
    left, right vectors
        (k, d_out) and (k, d_in), k at most ``rank``, in descending order of singular values, each times the square root
        of its own. Values that are zero to float32 are left out. The largest entry of each left vector is positive, so
        that the result does not depend on the routine that found it.
    """
    wide = len(left) >= min(left.width, right.width)
    u, v = _dense(left, right, rank) if wide else _factored(left, right, rank)
    peaks = u.gather(1, u.abs().argmax(1, keepdim=True))  # (k, 1)
    signs = torch.where(peaks < 0, -1.0, 1.0).to(u)
    return u * signs, v * signs


def _factored(left: Side, right: Side, rank: int) -> tuple[Tensor, Tensor]:
    gram = right.gram()
    bound = torch.linalg.vector_norm(gram, 1, dim=1).amax()  # above the largest eigenvalue
    factor = _root(gram)
    gram = left.gram()
    bound = bound * torch.linalg.vector_norm(gram, 1, dim=1).amax()
    values, vectors = torch.linalg.eigh(factor.T @ (gram @ factor))
    if bound * torch.finfo(torch.float64).eps > _TRUSTED * values[-1]:
        return _orthogonal(left, right, rank)
    mixing = (factor @ vectors[:, _kept(values.clamp(min=0).sqrt(), rank)]).T
    u = left.mix(mixing)  # left vectors times s
    v = right.mix(mixing @ gram)  # right vectors times s²
    s = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return u / s.sqrt(), v / s**1.5


def _root(gram: Tensor) -> Tensor:
    """Return F, (R, at most R), with F Fᵀ = gram, also where terms depend on each other."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(gram)
    held = values > torch.finfo(torch.float64).eps * values[-1]
    factor = vectors[:, held] * values[held].sqrt()
    return factor


def _orthogonal(left: Side, right: Side, rank: int) -> tuple[Tensor, Tensor]:
    """QR of both sides and a small SVD: for terms that nearly cancel out, where squares would lose the sum's digits."""
    q_left, r_left = torch.linalg.qr(left.whole().T)
    q_right, r_right = torch.linalg.qr(right.whole().T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    held = _kept(s, rank)
    root = s[held].sqrt()[:, None]
    return (root * u.T[held]) @ q_left.T, (root * vh[held]) @ q_right.T


def _dense(left: Side, right: Side, rank: int) -> tuple[Tensor, Tensor]:
    """Form the sum, where it is no larger than its factors."""
    total = left.whole().T @ right.whole()
    tall = left.width > right.width
    total = total.T if tall else total
    values, vectors = torch.linalg.eigh(total @ total.T)
    u = vectors.T[_kept(values.clamp(min=0).sqrt(), rank)]
    v = u @ total  # right vectors times s
    root = torch.linalg.vector_norm(v, dim=1, keepdim=True).sqrt()
    u, v = u * root, v / root
    return (v, u) if tall else (u, v)


def _kept(s: Tensor, rank: int) -> Tensor:
    """Return the indices of the largest singular values, largest first, without those that are zero."""
    values, order = s.topk(min(rank, len(s)))
    return order[values > NEGLIGIBLE * values[0]]
