"""How much each prunable unit matters, from the gradients that LoRA training computes anyway.

The gradient of a frozen weight is never formed. Its stand-in is what one step on the factors does to their product
(LoRAPrune's estimator, which the notes on FedSpine match)::

    G = dB A + B dA - dB dA                 stand-in for dL/dW, (d_out, d_in)
    I = |G * (W + s B A)|                   first-order Taylor saliency, element by element

I is summed over the rows (or columns) of a unit in each linear map that the unit reaches into, each map's sums are
scaled to length 1 where asked for, and the maps are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fl_edge.pruning.plan import Unit

if TYPE_CHECKING:
    from fl_edge.fedspine.lora import AdaptedMap

_ROW_ELEMENTS = 1 << 17  # a block of rows that stays in a core's cache
_TINY = 1e-8

UnitScores = list[dict[Unit, Tensor]]  # for each layer: "heads" (heads,) and "channels" (channels,), float32


def map_saliency(
    weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float, axis: int
) -> Tensor:
    """Return the sums of I over one linear map: (d_out,) for axis 0, (d_in,) for axis 1.

    Parameters
    ----------
    weight
        W, (d_out, d_in), frozen.
    a, b
        LoRA factors, (r, d_in) and (d_out, r), with their gradients.
    scale
        s = alpha / r.
    axis
        0: one sum a row; 1: one sum a column.

    Notes
    -----
    Computed in float32, block by block of rows: neither G nor W + s B A is ever there for a whole map.
    """
    a, b, grad_a, grad_b = a.float(), b.float(), grad_a.float(), grad_b.float()
    left = torch.cat([grad_b, b], 1)  # (d_out, 2r)
    right = torch.cat([a - grad_a, grad_a])  # (2r, d_in)
    scaled = a * scale
    rows = max(1, _ROW_ELEMENTS // weight.shape[1])
    sums = []
    for start in range(0, len(weight), rows):
        block = slice(start, start + rows)
        merged = torch.addmm(weight[block].float(), b[block], scaled)
        merged.mul_(left[block] @ right)
        sums.append(torch.linalg.vector_norm(merged, 1, dim=1 - axis))
    return torch.cat(sums) if axis == 0 else torch.stack(sums).sum(0)


@torch.no_grad()
def unit_scores(maps: Sequence[AdaptedMap], layers: int, normalise: bool) -> UnitScores:
    """Return the score of every unit, from the gradients that are there after `backward`.

    Parameters
    ----------
    maps
        The model's adapted linear maps; a map without gradients does not count.
    layers
        Transformer blocks of the model.
    normalise
        Scale each map's scores to length 1 before they are added (LoRAPrune's code), which lets no map dominate; else
        they are added as they are, which keeps them comparable between layers.
    """
    scores: UnitScores = [{} for _ in range(layers)]
    for each in maps:
        if each.a.grad is None or each.b.grad is None:
            continue
        member = each.member
        sums = map_saliency(each.weight, each.a, each.b, each.a.grad, each.b.grad, each.scale, member.axis)
        score = sums.view(-1, member.width).sum(1)
        if normalise:
            score = score / (torch.linalg.vector_norm(score) + _TINY)
        layer = scores[member.layer]
        layer[member.unit] = layer[member.unit] + score if member.unit in layer else score
    return scores


@dataclass
class Smoothing:
    """Exponential average of scores over the iterations of one round.

    Attributes
    ----------
    weight
        lambda: share of the past at every iteration (LoRAPrune: 0.9, APT: 0.85).
    mean
        The average of this round alone, free of the bias towards its start at zero.
    steps
        Iterations that entered it; one with a score that is not finite does not.
    """

    weight: float
    mean: UnitScores | None = None
    steps: int = 0

    def add(self, scores: UnitScores) -> None:
        """Take in the scores of an iteration."""
        sums = torch.stack([score.sum() for layer in scores for score in layer.values()])
        if not bool(torch.isfinite(sums).all()):  # scores are not negative: one that is not finite shows in the sum
            return
        self.steps += 1
        self.mean = scores if self.mean is None else join(self.mean, scores, self.weight, self.steps - 1, 1)


def join(past: UnitScores, new: UnitScores, weight: float, past_steps: int, new_steps: int) -> UnitScores:
    """Return the average over past and new iterations, as if one exponential average had run through them all.

    Both are unbiased averages, of `past_steps` and `new_steps` iterations; the newest iteration weighs
    1 - lambda, the one before it lambda (1 - lambda), and so on, divided by the sum of these weights.
    """
    if weight == 1.0:  # the limit: a plain mean
        kept = past_steps / (past_steps + new_steps)
    else:
        total = 1 - weight ** (past_steps + new_steps)
        kept = weight**new_steps * (1 - weight**past_steps) / total
    return [
        {unit: kept * before[unit] + (1 - kept) * score for unit, score in layer.items()}
        for before, layer in zip(past, new, strict=True)
    ]
