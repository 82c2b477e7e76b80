"""Which neurons of a layer go: step by step, the rest tuned again after each, under a guard on the mask's variance.

That neuron pruning is iterative, that the number of neurons that go is adjusted on the way, and that the variance of
the mask is checked after each step and kept in a range, so as not to over-fit the calibration text, is COMP's. The
number of steps, the bound and what happens when it is passed are *ours*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_edge.comp.system import Solution, System

Score = Callable[[Solution], Tensor]


@dataclass(frozen=True, eq=False)
class Elimination:
    """What an elimination left.

    Attributes
    ----------
    solution
        For the neurons that are left.
    order
        Numbers of the removed groups, the first to go first.
    guarded
        Whether the guard stopped it before it had removed as many as asked.
    """

    solution: Solution
    order: tuple[int, ...]
    guarded: bool


def eliminate(
    system: System, solution: Solution, score: Score, quota: int, width: int, steps: int, max_variance: float
) -> Elimination:
    """Remove groups of neurons from a layer.

    Parameters
    ----------
    system
        Of the layer.
    solution
        With all neurons left.
    score
        What the groups that are left matter, (groups left,); see :mod:`fl_edge.comp.scores`.
    quota
        Groups to remove.
    width
        Neurons of a group.
    steps
        Rounds in which the quota goes, about evenly.
    max_variance
        tau: a step after which the mask varies more is undone and tried again with half as many groups; where not even
        one group can go, the elimination stops.
    """
    order: list[int] = []
    size = largest = -(-quota // steps)
    while len(order) < quota:
        size = min(size, quota - len(order))
        least = torch.topk(score(solution), size, largest=False).indices  # ascending by score
        neurons = (least[:, None] * width + torch.arange(width, device=least.device)).flatten()
        tuned = solution.without(neurons)
        if variance(system, tuned) <= max_variance:
            order += (solution.kept[least * width] // width).tolist()
            solution, size = tuned, largest
        elif size == 1:
            return Elimination(solution, tuple(order), guarded=True)
        else:
            size //= 2
    return Elimination(solution, tuple(order), guarded=False)


def variance(system: System, solution: Solution) -> float:
    """Return the variance of the mask over the kept neurons.

    Where whole weights are tuned, a neuron's mask is the factor that takes its old column nearest to the new one.
    """
    prior = system.prior[solution.kept]
    lengths = torch.linalg.vector_norm(prior, dim=1).square()
    mask = torch.einsum("nk,nk->n", solution.values, prior) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
    return float(mask.var(correction=0)) if len(mask) else 0.0
