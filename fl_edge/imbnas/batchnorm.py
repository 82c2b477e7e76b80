"""BatchNorm statistics of one path, estimated anew: additive over batches and devices, layer after layer.

Source: SPOS resets a candidate's statistics and takes up to 200 training batches before it tests the candidate
(specification, section 6). *Ours*: what a layer sees depends on how the layers before it are normalised, so the sums of
one layer are pooled over all images before any image goes on (``layerwise``). The result does not depend on how the
images are cut into batches or spread over devices, nor on any order: one device or ten, the same statistics. Within one
process that is a single forward pass; between devices it is one exchange a norm. ``batch`` is SPOS's way, one pass and
one exchange: every batch is normalised by itself, and only the sums are pooled.

Equal to the bit, too: images pass in chunks of one size, and the sums of every image are rounded to multiples of 2^-20,
so that they add up exactly in any order as long as they stay below 2^33; beyond that float64 rounds them as usual.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fl_edge.errors import DataError
from fl_edge.imbnas.blocks import Block
from fl_edge.imbnas.chunks import chunks
from fl_edge.imbnas.space import Architecture
from fl_edge.imbnas.supernet import EPSILON, PathNorm, Supernet

Parts = Sequence[tuple[Tensor, int]]  # batches, and how much of each is images
Walk = Generator[Tensor, Tensor, None]

_GRID = 2.0**20


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over everything that went into one norm.

    Attributes
    ----------
    count
        Values of a channel: images times places.
    total, squares
        (channels,) float64: sums of the values and of their squares.
    """

    count: int
    total: Tensor
    squares: Tensor

    def __add__(self, other: Moments) -> Moments:
        """Return the sums over both."""
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Tensor:
        """Return the mean of every channel, (channels,) float32.

        Raises
        ------
        DataError
            Sums over nothing.
        """
        return (self.total / self._values()).float()

    @property
    def variance(self) -> Tensor:
        """Return the biased variance of every channel, (channels,) float32; see :attr:`mean`."""
        values = self._values()
        return (self.squares / values - (self.total / values) ** 2).clamp(min=0).float()

    def _values(self) -> int:
        if not self.count:
            raise DataError("there are no images to estimate BatchNorm's statistics from; it takes at least 1")
        return self.count


Statistics = tuple[Moments, ...]  # one for every norm of a path, in order


def pool(parts: Iterable[Statistics]) -> Statistics:
    """Return the statistics over the union of what several devices saw.

    Raises
    ------
    DataError
        No parts at all.
    """
    layers = list(zip(*parts, strict=True))
    if not layers:
        raise DataError("there are no BatchNorm statistics to pool; it takes at least those of 1 device")
    return tuple(functools.reduce(operator.add, layer) for layer in layers)


@torch.no_grad()
def statistics(
    supernet: Supernet, architecture: Architecture, batches: Sequence[Tensor], *, layerwise: bool = True
) -> Statistics:
    """Return the statistics of a path's norms over all batches.

    Parameters
    ----------
    batches
        Images (b, c, h, w); layerwise, one layer's features of all of them are in memory. None give sums of nothing.
    layerwise
        Normalise with the sums of all batches, or every batch by itself.
    """
    path = supernet.path(architecture)
    if layerwise:
        return _advance(path, _chunks(batches))
    return pool(_advance(path, group) for group in [[(images, len(images))] for images in batches] or [[]])


@torch.no_grad()
def next_moments(
    supernet: Supernet, architecture: Architecture, batches: Sequence[Tensor], known: Statistics
) -> Moments:
    """Return a device's sums for the first norm that is not known yet: its part of one layerwise exchange.

    Sums of several devices add up; with the pooled ones appended, ``known`` is one norm longer.

    Parameters
    ----------
    batches
        The device's own images; none give sums of nothing.
    known
        Pooled statistics of the norms before, fewer than the path has.
    """
    path = supernet.path(architecture)
    parts = _chunks(batches)
    walks = [_walk(path, images) for images, _ in parts]
    inputs = [next(walk) for walk in walks]
    for moments in known:
        inputs = _onward(walks, inputs, moments)
    return _pooled(inputs, parts, norms(supernet, architecture)[len(known)])


def store(supernet: Supernet, architecture: Architecture, found: Statistics) -> None:
    """Put statistics where evaluation of this path takes them from; the next path must bring its own.

    Raises
    ------
    DataError
        Statistics of nothing, or of another number of norms.
    """
    places = norms(supernet, architecture)
    if len(found) != len(places):
        raise DataError(f"statistics of {len(found)} norms do not fit a path that has {len(places)}")
    for norm, moments in zip(places, found, strict=True):
        norm.mean.copy_(moments.mean)
        norm.variance.copy_(moments.variance)


def norms(supernet: Supernet, architecture: Architecture) -> list[PathNorm]:
    """Return a path's norms in the order of the forward pass."""
    return [layer for block in supernet.path(architecture) for layer in block.body if isinstance(layer, PathNorm)]


def _walk(path: Sequence[Block], images: Tensor) -> Walk:
    """Run a path, stopping at every norm: yield what goes in, take what comes out."""
    for block in path:
        inputs = images
        for layer in block.body:
            images = (yield images) if isinstance(layer, PathNorm) else layer(images)
        images = block.join(inputs, images)


def _advance(path: Sequence[Block], parts: Parts) -> Statistics:
    """Let all parts stop at each norm until their sums are together."""
    places = [layer for block in path for layer in block.body if isinstance(layer, PathNorm)]
    walks = [_walk(path, images) for images, _ in parts]
    inputs = [next(walk) for walk in walks]
    found = [_pooled(inputs, parts, places[0])]
    for norm in places[1:]:
        inputs = _onward(walks, inputs, found[-1])
        found.append(_pooled(inputs, parts, norm))
    return tuple(found)


def _onward(walks: Sequence[Walk], inputs: Sequence[Tensor], moments: Moments) -> list[Tensor]:
    """Normalise what stands in front of a norm, and let it go on to the next."""
    return [walk.send(_normalised(values, moments)) for walk, values in zip(walks, inputs, strict=True)]


def _chunks(batches: Sequence[Tensor]) -> Parts:
    return chunks(torch.cat(list(batches))) if batches else []


def _pooled(inputs: Sequence[Tensor], parts: Parts, norm: PathNorm) -> Moments:
    nothing = torch.zeros_like(norm.mean, dtype=torch.float64)
    found = (_moments(values[:count]) for values, (_, count) in zip(inputs, parts, strict=True))
    return sum(found, Moments(0, nothing, nothing))


def _moments(values: Tensor) -> Moments:
    exact = values.double()
    count = len(exact) * exact.shape[2] * exact.shape[3]
    return Moments(count, _rounded_sum(exact), _rounded_sum(exact * exact))


def _rounded_sum(values: Tensor) -> Tensor:
    return values.sum((2, 3)).mul_(_GRID).round_().sum(0).div_(_GRID)


def _normalised(values: Tensor, moments: Moments) -> Tensor:
    return functional.batch_norm(values, moments.mean, moments.variance, eps=EPSILON)
