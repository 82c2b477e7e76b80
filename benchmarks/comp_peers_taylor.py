"""LLM-Pruner's Taylor score: Ma and others, "LLM-Pruner", NeurIPS 2023, arXiv 2305.11627.

Read for the rule, and written anew: horseee/LLM-Pruner, ``hf_prune.py`` (block-wise), ``scripts/llama_prune.sh`` and
``LLMPruner/pruner/hf_llama_pruner.py`` (``TaylorImportance``). Its heads become the key/value groups of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.comp_models import rows_at_once
from benchmarks.comp_peers_cut import LayerScores, Rounding, by_unit, cut, even_plan, global_plan
from fl_edge.pruning import PruningPlan, full_plan, kept_indices, members
from fl_edge.pruning.units import base_linear

Order = Literal["param_first", "vectorize", "param_second", "param_mix"]


def _each_gradient(model: Any, tokens: Tensor, at_once: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield (sequences, gradient of their mean loss by path of a prunable map)."""
    weights = {each.path: base_linear(model.get_submodule(each.path), each.path).weight for each in members(model)}
    device = next(model.parameters()).device
    for rows in rows_at_once(tokens, at_once):
        ids = rows.to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        yield len(rows), dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the mean loss on sequences (s, n) by path of a prunable map."""
    total: dict[str, Tensor] = {}
    for count, found in _each_gradient(model, tokens, 4096):
        for path, gradient in found.items():
            total[path] = total.get(path, torch.zeros_like(gradient)) + gradient * (count / len(tokens))
    return total


def mean_squares(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Return the mean over sequences of the squared gradient of a sequence, by path of a prunable map."""
    total: dict[str, Tensor] = {}
    for _, found in _each_gradient(model, tokens, 1):
        for path, gradient in found.items():
            total[path] = total.get(path, torch.zeros_like(gradient)) + gradient.square() / len(tokens)
    return total


@dataclass(frozen=True)
class Taylor:
    """LLM-Pruner without its fine-tuning.

    Attributes
    ----------
    order
        Of the salience of a weight: ``param_first`` |w g| (its default), summed over the rows and columns of a unit;
        ``vectorize`` the same, but the absolute value of a row's or column's sum; ``param_second`` |w h w| and
        ``param_mix`` |w g - w h w / 2| with h the mean squared gradient of a sequence.
    protect
        Layers at either end that stay whole. The source's script leaves 4 of 32 at the start and 2 at the end.
    examples, length
        How many sequences, and how many tokens of each, the gradient is of; 0 for all there are. The source takes 10
        of 64.
    across_layers
        Whether units compete with those of other layers (``global_pruning``); else all open layers lose the same share.
    per_parameter
        Across layers: scores are divided by a unit's parameters, so that heads and channels compare. *Ours*.
    heads
        How the share of heads is rounded to whole ones (the source rounds down); ``none`` prunes channels only;
        ``pooled``, only across layers: heads and channels in one order.
    steps
        In which the ratio grows to its value, with gradients measured anew (``iterative_steps``).
    """

    order: Order = "param_first"
    protect: int = 1
    examples: int = 0
    length: int = 0
    across_layers: bool = False
    per_parameter: bool = False
    heads: Rounding | Literal["pooled"] = "floor"
    steps: int = 1

    def __call__(self, model: nn.Module, tokens: Tensor, ratio: float) -> nn.Module:
        """Return a pruned copy."""
        text = tokens[: self.examples or None, : self.length or None]
        masked = model if self.steps == 1 else copy.deepcopy(model)
        for step in range(1, self.steps + 1):
            plan = self._plan(model, self._scores(masked, text), ratio * step / self.steps)
            if step < self.steps:
                _mask(masked, plan)
        return cut(model, plan, ratio)

    def _plan(self, model: nn.Module, scores: list[LayerScores], ratio: float) -> PruningPlan:
        layers = range(self.protect, len(scores) - self.protect)
        if self.heads == "pooled":
            return global_plan(model, scores, ratio, "pooled", layers)
        return (global_plan if self.across_layers else even_plan)(model, scores, ratio, self.heads, layers)

    def _scores(self, model: nn.Module, tokens: Tensor) -> list[LayerScores]:
        slope = {} if self.order == "param_second" else gradients(model, tokens)
        curve = mean_squares(model, tokens) if self.order in ("param_second", "param_mix") else {}
        return taylor_scores(model, slope, curve, self.order == "vectorize", self.per_parameter)


def taylor_scores(
    model: nn.Module, slope: Mapping[str, Tensor], curve: Mapping[str, Tensor], by_vector: bool, per_parameter: bool
) -> list[LayerScores]:
    """Return the scores of all layers' units: what Taylor's expansion of the loss says about their weights.

    Parameters
    ----------
    slope, curve
        First and second derivatives by path of a prunable map, shaped like its weight; either may be empty.
    by_vector
        Whether saliences cancel within a row or column.
    per_parameter
        Whether scores are divided by the weights they are of.
    """
    found: dict[tuple[int, str], Any] = {}
    sizes: dict[tuple[int, str], int] = {}
    for each in members(model):
        weight, key = base_linear(model.get_submodule(each.path), each.path).weight.detach(), (each.layer, each.unit)
        salience = weight * slope[each.path] if slope else torch.zeros_like(weight)
        if curve:
            salience = salience - weight.square() * curve[each.path] * (0.5 if slope else 1.0)
        lines = salience.sum(1 - each.axis).abs() if by_vector else salience.abs().sum(1 - each.axis)
        found[key] = found.get(key, 0) + by_unit(lines.double(), each.width)
        sizes[key] = sizes.get(key, 0) + each.width * weight.shape[1 - each.axis]
    if per_parameter:
        found = {key: values / sizes[key] for key, values in found.items()}
    return [
        LayerScores(found[each, "heads"], found[each, "channels"]) for each in sorted({layer for layer, _ in found})
    ]


@torch.no_grad()
def _mask(model: nn.Module, plan: PruningPlan) -> None:
    """Zero all weights of units that a plan removes: their scores are 0 from then on, so the next plan is nested."""
    full = full_plan(model)
    for each in members(model):
        weight = base_linear(model.get_submodule(each.path), each.path).weight
        gone = torch.ones(len(full.kept(each.layer, each.unit)) * each.width, dtype=torch.bool)
        gone[kept_indices(each, plan)] = False
        (weight.T if each.axis else weight)[gone.to(weight.device)] = 0
