"""From scores of units to a pruned copy of exactly the wanted size: what the peers of COMP share.

A peer's own rule decides which units go; sizes are made equal for all. Heads are coarse, so their number is the rule's
and channels fill up to the wanted number of parameters, to half a channel. Every layer keeps one unit of each kind.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fl_edge.errors import ConfigError
from fl_edge.pruning import LayerPlan, PruningPlan, full_plan, members, prune, unit_params
from fl_edge.pruning.units import base_linear

TOLERANCE = 0.01  # of the wanted number of remaining parameters
Rounding = Literal["floor", "nearest", "none"]


@dataclass(frozen=True)
class LayerScores:
    """How much the units of a layer matter; the lowest go first.

    Attributes
    ----------
    heads
        (heads,), or (groups,) with grouped queries.
    channels
        (channels,).
    """

    heads: Tensor
    channels: Tensor


def rounded(value: float, how: Rounding) -> int:
    """Return a share of units as whole units: rounded down, to the nearest, or none at all."""
    return 0 if how == "none" else int(value + (0.5 if how == "nearest" else 1e-9))


def prunable_weights(model: nn.Module) -> int:
    """Return the parameters in the weights of the blocks' linear maps."""
    return sum(base_linear(model.get_submodule(each.path), each.path).weight.numel() for each in members(model))


def check_size(dense: nn.Module, pruned: nn.Module, ratio: float) -> None:
    """Raise if what remains is not as asked.

    Raises
    ------
    ConfigError
        More than 1 % beside the wanted number of parameters.
    """
    wanted, left = (1 - ratio) * prunable_weights(dense), prunable_weights(pruned)
    if abs(left - wanted) > TOLERANCE * wanted:
        raise ConfigError(f"ratio={ratio} cannot be met with these units: {left} parameters remain, not {wanted:.0f}")


def even_counts(
    model: nn.Module, ratio: float, heads: Rounding, layers: Collection[int] | None = None
) -> list[tuple[int, int]]:
    """Return how many heads and channels each layer loses when all lose the same share of their parameters.

    Parameters
    ----------
    ratio
        Of the parameters of all layers.
    heads
        How the share of heads is rounded to whole ones.
    layers
        Which may lose units; by default all.
    """
    full, sizes = full_plan(model), unit_params(model)
    totals = [h * full.heads[i] + c * full.channels[i] for i, (h, c) in enumerate(sizes)]
    open_to = sorted(range(len(totals)) if layers is None else layers)
    share = ratio * sum(totals) / sum(totals[layer] for layer in open_to)
    counts, debt = [(0, 0)] * len(totals), 0.0
    for layer in open_to:
        head, channel = sizes[layer]
        gone = min(rounded(share * full.heads[layer], heads), full.heads[layer] - 1)
        debt += share * totals[layer] - gone * head  # what was rounded away before is made good here
        taken = max(0, min(round(debt / channel), full.channels[layer] - 1))
        debt -= taken * channel
        counts[layer] = (gone, taken)
    return counts


def keep_highest(scores: LayerScores, gone: tuple[int, int]) -> LayerPlan:
    """Return the layer without so many of its lowest heads and channels; of equal ones the first go."""
    both = [
        tuple(sorted(values.argsort(stable=True)[count:].tolist()))
        for values, count in zip((scores.heads, scores.channels), gone, strict=True)
    ]
    return LayerPlan(*both)


def even_plan(
    model: nn.Module,
    scores: Sequence[LayerScores],
    ratio: float,
    heads: Rounding,
    layers: Collection[int] | None = None,
) -> PruningPlan:
    """Return the plan by which all layers lose the same share; see :func:`even_counts`."""
    counts = even_counts(model, ratio, heads, layers)
    return _plan(model, [keep_highest(each, gone) for each, gone in zip(scores, counts, strict=True)])


def global_plan(
    model: nn.Module,
    scores: Sequence[LayerScores],
    ratio: float,
    heads: Rounding | Literal["pooled"],
    layers: Collection[int] | None = None,
) -> PruningPlan:
    """Return the plan by which units compete across layers.

    Parameters
    ----------
    heads
        ``pooled``: heads and channels in one order, each costing its parameters. Else heads lose their share, rounded
        so, among themselves, and channels the rest.
    """
    full, sizes = full_plan(model), unit_params(model)
    open_to = sorted(range(len(sizes)) if layers is None else layers)
    budget = ratio * sum(h * full.heads[i] + c * full.channels[i] for i, (h, c) in enumerate(sizes))
    share = budget / sum(sizes[i][0] * full.heads[i] + sizes[i][1] * full.channels[i] for i in open_to)
    units = [
        (float(score), layer, kind, index)
        for layer in open_to
        for kind, values in enumerate((scores[layer].heads, scores[layer].channels))
        for index, score in enumerate(values)
    ]
    if heads == "pooled":
        order, spare = sorted(units), sum(full.heads)
    else:
        order = sorted(units, key=lambda unit: (unit[2], unit))  # heads first, as many as are theirs
        spare = rounded(share * sum(full.heads[layer] for layer in open_to), heads)
    kept = [[set(layer.heads), set(layer.channels)] for layer in full.layers]
    for _, layer, kind, index in order:
        size = sizes[layer][kind]
        if len(kept[layer][kind]) > 1 and size <= budget + 0.5 * sizes[layer][1] and (kind or spare):
            kept[layer][kind].discard(index)
            budget -= size
            spare -= not kind
    return _plan(model, [LayerPlan(*(tuple(sorted(units)) for units in layer)) for layer in kept])


def cut(model: nn.Module, plan: PruningPlan, ratio: float) -> nn.Module:
    """Return a copy sliced to a plan.

    Raises
    ------
    ConfigError
        The plan does not have the wanted size.
    """
    pruned = copy.deepcopy(model)
    prune(pruned, plan)
    check_size(model, pruned, ratio)
    return pruned


def _plan(model: nn.Module, layers: Sequence[LayerPlan]) -> PruningPlan:
    full = full_plan(model)
    return PruningPlan(full.model_type, full.heads, full.channels, tuple(layers))


def by_unit(values: Tensor, width: int) -> Tensor:
    """Return the sums (units,) of values (units * width,)."""
    return values.view(-1, width).sum(1)
