"""ShortGPT's way: whole layers go, the ones that change their input least.

Men and others, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853; read
for the rule: sramshetty/ShortGPT, ``short_gpt/metrics.py`` and ``short_gpt/short_llama.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.comp_models import rows_at_once
from benchmarks.comp_peers_cut import Rounding, check_size, prunable_weights
from benchmarks.comp_peers_scores import WandaSp
from fl_edge.pruning import LayerPlan, full_plan, prune
from fl_edge.pruning.units import find_blocks


@torch.no_grad()
def hidden_states(model: Any, tokens: Tensor) -> list[Tensor]:
    """Return (layers + 1) tensors (s, n, d): the input of each block, and the output of the last."""
    blocks: Any = find_blocks(model)[1]
    states: list[list[Tensor]] = []  # of each piece of the text
    hooks = [block.register_forward_pre_hook(lambda _, inputs: states[-1].append(inputs[0])) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _, __, output: states[-1].append(output)))
    try:
        for rows in rows_at_once(tokens):
            states.append([])
            device = next(model.parameters()).device
            getattr(model, model.base_model_prefix)(input_ids=rows.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(pieces) for pieces in zip(*states, strict=True)]


def block_influence(model: nn.Module, tokens: Tensor) -> list[float]:
    """Return, for each block, 1 - the mean cosine of its input and output at a token."""
    states = hidden_states(model, tokens)
    return [
        1 - float(functional.cosine_similarity(before.double(), after.double(), dim=-1).mean())
        for before, after in pairwise(states)
    ]


def angular_distance(model: nn.Module, tokens: Tensor, count: int) -> list[float]:
    """Return, for each block that so many blocks can start at, the angle / pi over them at a sequence's last token.

    Gromov and others, "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887; an option
    of the source.
    """
    last = [state[:, -1].double() for state in hidden_states(model, tokens)]
    pairs = zip(last, last[count:], strict=False)
    return [
        float((functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1).arccos() / torch.pi).mean()) for a, b in pairs
    ]


def without_layers(model: nn.Module, gone: Collection[int]) -> nn.Module:
    """Return a copy without these blocks; the others move up."""
    copied, full = copy.deepcopy(model), full_plan(model)
    layers = (LayerPlan((), ()) if index in gone else layer for index, layer in enumerate(full.layers))
    prune(copied, replace(full, layers=tuple(layers)))
    return copied


@dataclass(frozen=True)
class LayerDrop:
    """Whole layers by block influence, and the rest of the budget by Wanda-sp, as whole layers seldom add up to it.

    As many whole layers go as fit into the budget. What is left of it is pruned by Wanda-sp in the layer that would
    have been next. No layer is protected, as in the paper.

    Attributes
    ----------
    choice
        ``influence``: all at once by block influence; ``again``: one by one, measured anew after each (*ours*);
        ``stretch``: neighbours with the smallest angular distance over all of them.
    spread
        Wanda-sp takes the rest from all remaining layers, not from one. *Ours*: no longer a layer drop alone.
    heads
        Of Wanda-sp.
    """

    choice: Literal["influence", "again", "stretch"] = "influence"
    spread: bool = False
    heads: Rounding = "nearest"

    def __call__(self, model: nn.Module, tokens: Tensor, ratio: float) -> nn.Module:
        """Return a pruned copy with fewer layers."""
        total = len(find_blocks(model)[1])
        count = int(ratio * total + 1e-9)
        left = without_layers(model, self._choose(model, tokens, count)) if count else copy.deepcopy(model)
        rest = 1 - (1 - ratio) * prunable_weights(model) / prunable_weights(left)
        if rest * prunable_weights(left) > 0.001 * prunable_weights(model):
            influence = block_influence(left, tokens)
            layers = None if self.spread else (min(range(len(influence)), key=influence.__getitem__),)
            left = WandaSp(heads=self.heads, layers=layers)(left, tokens, rest)
        check_size(model, left, ratio)
        return left

    def _choose(self, model: nn.Module, tokens: Tensor, count: int) -> list[int]:
        if self.choice == "stretch":
            distances = angular_distance(model, tokens, count)
            start = min(range(len(distances)), key=distances.__getitem__)
            return list(range(start, start + count))
        if self.choice == "influence":
            influence = block_influence(model, tokens)
            return sorted(range(len(influence)), key=influence.__getitem__)[:count]
        kept, left = list(range(len(find_blocks(model)[1]))), model
        for _ in range(count):
            influence = block_influence(left, tokens)
            least = min(range(len(influence)), key=influence.__getitem__)
            kept.pop(least)
            left = without_layers(left, [least])
        return [index for index in range(len(find_blocks(model)[1])) if index not in kept]
