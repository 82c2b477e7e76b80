"""Peers of COMP with one score a column: structured magnitude and Wanda-sp.

Read for the rules, and written anew: CASIA-IVA-Lab/FLAP, ``lib/prune.py`` (``prune_magnitude_sp``, ``prune_wanda_sp``).
Its heads of 128 become the key/value groups of the model at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from benchmarks.comp_peers_cut import (
    LayerScores,
    Rounding,
    by_unit,
    check_size,
    cut,
    even_counts,
    even_plan,
    global_plan,
    keep_highest,
)
from benchmarks.comp_peers_moments import Moments, column_scores, consumers, input_moments, weight_of
from fl_edge.pruning import full_plan, members, prune


@dataclass(frozen=True)
class Magnitude:
    """Structured magnitude: the L2 norm of an output map's column, summed over a head.

    Attributes
    ----------
    group
        The norm of all rows and columns of a unit instead (*ours*; as LLM-Pruner's ``l2``, but the root is taken).
    across_layers
        Whether units compete with those of other layers; heads and channels still among themselves.
    heads
        How the share of heads is rounded to whole ones; ``none`` prunes channels only.
    """

    group: bool = False
    across_layers: bool = False
    heads: Rounding = "floor"

    def __call__(self, model: nn.Module, tokens: Tensor, ratio: float) -> nn.Module:  # noqa: ARG002
        """Return a pruned copy; the text is not looked at."""
        scores = self._groups(model) if self.group else self._columns(model)
        plan = (global_plan if self.across_layers else even_plan)(model, scores, ratio, self.heads)
        return cut(model, plan, ratio)

    def _columns(self, model: nn.Module) -> list[LayerScores]:
        return column_scores(model, {each.path: weight_of(model, each).norm(dim=0) for each in consumers(model)})

    def _groups(self, model: nn.Module) -> list[LayerScores]:
        squares: dict[tuple[int, str], Any] = {}
        for each in members(model):
            both = by_unit(weight_of(model, each).square().sum(1 - each.axis), each.width)
            squares[each.layer, each.unit] = squares.get((each.layer, each.unit), 0) + both
        layers = sorted({layer for layer, _ in squares})
        return [LayerScores(squares[each, "heads"].sqrt(), squares[each, "channels"].sqrt()) for each in layers]


def wanda_columns(model: nn.Module, moments: Mapping[str, Moments]) -> list[LayerScores]:
    """Return Wanda's ``|W| * norm of the input``, averaged over a column and summed over a head."""
    found = {each.path: each for each in consumers(model) if each.path in moments}
    values = {path: weight_of(model, each).abs().mean(0) * moments[path].norm for path, each in found.items()}
    return column_scores(model, values)


@dataclass(frozen=True)
class WandaSp:
    """Wanda-sp: Wanda (Sun and others, arXiv 2306.11695) on columns, by the authors of FLAP.

    All layers lose the same share. Layers are pruned from the first to the last, each by what enters it from the layers
    pruned before.

    Attributes
    ----------
    sequential
        False: scores come from the dense model.
    across_layers
        Not sequential, and units compete with those of other layers; a layer's scores are divided by their mean.
        *Ours*.
    heads
        How the share of heads is rounded to whole ones (the source rounds down); ``none`` prunes channels only.
    layers
        Which may lose units; None for all.
    """

    sequential: bool = True
    across_layers: bool = False
    heads: Rounding = "floor"
    layers: tuple[int, ...] | None = None

    def __call__(self, model: nn.Module, tokens: Tensor, ratio: float) -> nn.Module:
        """Return a pruned copy."""
        if not self.sequential:
            scores = wanda_columns(model, input_moments(model, tokens))
            if self.across_layers:
                even = [
                    LayerScores(each.heads / each.heads.mean(), each.channels / each.channels.mean()) for each in scores
                ]
                return cut(model, global_plan(model, even, ratio, self.heads, self.layers), ratio)
            return cut(model, even_plan(model, scores, ratio, self.heads, self.layers), ratio)
        pruned, plan = copy.deepcopy(model), full_plan(model)
        for layer, gone in enumerate(even_counts(model, ratio, self.heads, self.layers)):
            if any(gone):
                (score,) = wanda_columns(pruned, input_moments(pruned, tokens, (layer,)))
                layers = (*plan.layers[:layer], keep_highest(score, gone), *plan.layers[layer + 1 :])
                before, plan = plan, replace(plan, layers=layers)
                prune(pruned, plan, before)
        check_size(model, pruned, ratio)
        return pruned
