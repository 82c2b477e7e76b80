"""What it costs a layer to lose units: the part of its output that is lost, by how many go. *Ours*.

A layer turns the hidden states by as much as its :meth:`~fl_edge.comp.similarity.Similarity.turn` says; where a part e
of its output's energy is lost, about e times as much is lost of the turn. So what all layers lose together is least
where the next parameter costs the same turn everywhere, which :func:`fl_edge.comp.allocation.spread` makes of the
curves. Nothing but forward passes of the dense model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_edge.comp.config import CompConfig
from fl_edge.comp.decision import blocks_of, neurons_of
from fl_edge.comp.scores import conditioning
from fl_edge.comp.statistics import Statistics
from fl_edge.comp.system import Solution, inverted

_POINTS = 32  # of a curve


def loss_curve(
    statistics: Statistics, weight: Tensor, bias: Tensor | None, width: int, config: CompConfig
) -> list[tuple[int, float]]:
    """Return how much of a map's output is lost when units go by score B and the weights of what stays are tuned again.

    The squared error rises at each step by the score of what goes, so no error has to be computed from the data. Layers
    with more neurons than ``config.block`` are taken block by block, as if what other blocks lose were independent.

    Parameters
    ----------
    statistics
        Of what enters the map, its own output wanted.
    weight, bias
        (o, n) and (o,), or None, of the map.
    width
        Neurons of a unit.

    Returns
    -------
    list
        (units removed, part of the energy lost), rising, from (0, 0) on; at least one unit stays.
    """
    if bias is not None:
        statistics = statistics.without_bias(bias)
    if config.bias:
        statistics = statistics.centred()
    original = weight.to(statistics.gram)
    units = original.shape[1] // width
    rises: dict[int, float] = {}  # by units removed of the first block; others lose as many at a time
    blocks = blocks_of(statistics, original, width, config.block)
    size = max(min(map(len, blocks)) // _POINTS, 1)
    for block in blocks:
        neurons = neurons_of(block, width)
        left = _untouched(
            statistics.gram[neurons][:, neurons].double(), original[:, neurons].T.double(), config.damping
        )
        gone = 0
        while gone + size < len(block):
            least = torch.topk(conditioning(left, width), size, largest=False).indices.sort().values
            out = neurons_of(least, width)
            gone += size
            rises[gone] = rises.get(gone, 0.0) + left.rise(out)
            left = left.without(out)
    curve, total = [(0, 0.0)], 0.0
    for gone, rise in sorted(rises.items()):
        total += rise / statistics.energy
        curve.append((min(gone * len(blocks), units - 1), total))
    return curve


def _untouched(gram: Tensor, weights: Tensor, damping: float) -> Solution:
    """Return the solution for a map's own output, which is its own weights (n, o)."""
    inverse = inverted(gram.double(), damping * float(gram.diagonal().double().mean()))[1]
    return Solution(torch.arange(len(gram), device=gram.device), weights.double(), inverse)


def curve_until(curve: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """Return a curve up to where ``most`` units are gone; there it is on a line through its neighbours."""
    after = next((place for place, (count, _) in enumerate(curve) if count >= most), len(curve) - 1)
    (a, x), (b, y) = curve[max(after - 1, 0)], curve[after]
    last = y if a == b else x + (y - x) * (most - a) / (b - a)
    return [*((count, lost) for count, lost in curve if count < most), (most, last)]
