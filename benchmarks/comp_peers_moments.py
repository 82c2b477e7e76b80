"""What enters the maps that consume prunable units, and scores of their columns, for the peers of COMP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.comp_models import rows_at_once
from benchmarks.comp_peers_cut import LayerScores, by_unit
from fl_edge.pruning import Member, members
from fl_edge.pruning.units import base_linear


@dataclass(frozen=True)
class Moments:
    """What the input of a map is like: mean, variance and L2 norm of each column over all tokens; all (columns,)."""

    mean: Tensor
    variance: Tensor
    norm: Tensor


class _Enough(Exception):  # noqa: N818 - no error: the rest of the model is not needed
    pass


@torch.no_grad()
def input_moments(model: Any, tokens: Tensor, layers: Collection[int] | None = None) -> dict[str, Moments]:
    """Return, by path, what enters the output maps of attention and of the feed-forward network, in float64.

    Parameters
    ----------
    tokens
        (sequences, length) int64.
    layers
        Which; by default all. The model is run no further than it takes.
    """
    maps, device = consumers(model, layers), next(model.parameters()).device
    sums: dict[str, tuple[Any, Any, int]] = {}

    def add(path: str, value: Tensor) -> None:
        columns = value.flatten(0, -2).double()
        total, squares, count = sums.get(path, (0.0, 0.0, 0))
        sums[path] = (total + columns.sum(0), squares + columns.square().sum(0), count + len(columns))
        if path == maps[-1].path:
            raise _Enough

    hooks = [
        model.get_submodule(each.path).register_forward_pre_hook(lambda _, inputs, path=each.path: add(path, inputs[0]))
        for each in maps
    ]
    try:
        for rows in rows_at_once(tokens):
            with suppress(_Enough):
                getattr(model, model.base_model_prefix)(input_ids=rows.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        path: Moments(total / count, (squares / count - (total / count).square()).clamp_min(0), squares.sqrt())
        for path, (total, squares, count) in sums.items()
    }


def consumers(model: nn.Module, layers: Collection[int] | None = None) -> list[Member]:
    """Return the output maps of attention and of the feed-forward network of these layers, by default of all."""
    return [each for each in members(model) if each.axis == 1 and (layers is None or each.layer in layers)]


def weight_of(model: nn.Module, member: Member) -> Tensor:
    """Return the weight of a member, (rows, columns) float64, without its gradient."""
    return base_linear(model.get_submodule(member.path), member.path).weight.detach().double()


def column_scores(model: nn.Module, columns: Mapping[str, Tensor]) -> list[LayerScores]:
    """Return the scores of layers whose output maps have these values of columns, summed over a head; layers ascend."""
    found: dict[int, dict[str, Tensor]] = {}
    for each in consumers(model):
        if each.path in columns:
            found.setdefault(each.layer, {})[each.unit] = by_unit(columns[each.path], each.width)
    return [LayerScores(**found[layer]) for layer in sorted(found)]
