"""FLAP, a peer of COMP that looks at how much inputs fluctuate.

Read for the rule, and written anew: CASIA-IVA-Lab/FLAP, ``lib/prune.py`` (``prune_flap``) and ``lib/layerwrapper.py``.
Its heads of 128 become the key/value groups of the model at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from benchmarks.comp_peers_cut import LayerScores, Rounding, cut, even_plan, global_plan
from benchmarks.comp_peers_moments import Moments, column_scores, consumers, input_moments, weight_of
from fl_edge.pruning import kept_indices
from fl_edge.pruning.units import base_linear


@dataclass(frozen=True)
class Flap:
    """FLAP: An and others, "Fluctuation-based Adaptive Structured Pruning", AAAI 2024, arXiv 2312.11983.

    As in the source, the attention's metric is squared, metrics are standardised within a layer and averaged over a
    head, a head costs as many channels as it has parameters, and what removed columns carried on average becomes a bias
    of the output map. These biases, one hidden width each, are not counted as prunable parameters.

    Attributes
    ----------
    metric
        ``WIFV``: variance of the input times squared norm of the column; ``IFV``: variance alone; ``WIFN``: Wanda's.
    across_layers
        Whether one threshold holds for all layers (``AL``); else all lose the same share (``UL-UM``).
    heads
        ``pooled``: heads and channels below one threshold (``AM``); else heads among themselves, rounded so (``MM``).
    """

    metric: Literal["WIFV", "IFV", "WIFN"] = "WIFV"
    across_layers: bool = True
    heads: Rounding | Literal["pooled"] = "pooled"

    def __call__(self, model: nn.Module, tokens: Tensor, ratio: float) -> nn.Module:
        """Return a pruned copy whose output maps have biases."""
        moments = input_moments(model, tokens)
        scores = self._scores(model, moments)
        if self.heads == "pooled":
            plan = global_plan(model, scores, ratio, "pooled")
        else:
            plan = (global_plan if self.across_layers else even_plan)(model, scores, ratio, self.heads)
        pruned = cut(model, plan, ratio)
        for each in consumers(model):
            carried = moments[each.path].mean.clone()
            carried[kept_indices(each, plan).to(carried.device)] = 0
            lost = weight_of(model, each) @ carried
            linear = base_linear(pruned.get_submodule(each.path), each.path)
            bias = lost if linear.bias is None else linear.bias.detach() + lost
            linear.bias = nn.Parameter(bias.to(linear.weight.dtype))
        return pruned

    def _scores(self, model: nn.Module, moments: Mapping[str, Moments]) -> Sequence[LayerScores]:
        columns = {}
        for each in consumers(model):
            weight, found = weight_of(model, each), moments[each.path]
            if self.metric == "WIFN":
                value = weight.abs().mean(0) * found.norm
            else:
                value = found.variance * (weight.square().sum(0) if self.metric == "WIFV" else 1)
            if each.unit == "heads":
                value = value.square()
            if self.across_layers:
                value = (value - value.mean()) / value.std()
            columns[each.path] = value / each.width
        return column_scores(model, columns)
