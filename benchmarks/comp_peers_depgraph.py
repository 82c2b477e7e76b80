"""Torch-Pruning itself, 1.6.1, on decoders: its graph of dependencies, its importances, its pruner.

Fang and others, "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv 2301.12900; VainF/Torch-Pruning
``examples/LLMs/prune_llm.py``, whose settings these are (logits as output, no cache, a short input, whole heads), but
that the hidden width stays. What its interface makes of that:

- Heads go first, then channels, each by a pruner of its own, so that channels can fill up to the wanted size.
- Its search for groups does not end on grouped queries, nor on norms over the width of a head (VainF/Torch-Pruning
  issue 527, open). On such models attention is set aside while it works, and only channels are pruned.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.comp_models import rows_at_once
from benchmarks.comp_peers_cut import Rounding, check_size, prunable_weights, rounded
from fl_edge.pruning.units import find_blocks

INSTALL = "pip install torch-pruning==1.6.1"


@dataclass(frozen=True)
class DepGraph:
    """Torch-Pruning with one choice of settings.

    Attributes
    ----------
    importance
        ``magnitude``: its ``GroupMagnitudeImportance`` as in the example; ``taylor``: its ``GroupTaylorImportance`` on
        the calibration loss.
    across_layers
        Whether units compete with those of other layers (``global_pruning``).
    heads
        How the share of heads is rounded to whole ones; ``none`` prunes channels only.
    normalizer
        Of a layer's scores: by their mean, its default, or not at all, which only matters across layers.
    """

    importance: Literal["magnitude", "taylor"]
    across_layers: bool = False
    heads: Rounding = "floor"
    normalizer: Literal["mean"] | None = "mean"

    def __call__(self, model: nn.Module, tokens: Tensor, ratio: float) -> nn.Module:
        """Return a pruned copy."""
        pruned: Any = copy.deepcopy(model)
        pruned.requires_grad_(True)  # it traces by autograd
        if self.importance == "taylor":
            _backward(pruned, tokens)
        target = round((1 - ratio) * prunable_weights(model))
        if not _only_channels(pruned):
            self._prune_heads(pruned, ratio)
        surplus = prunable_weights(pruned) - target
        with _attention_aside(pruned) if _only_channels(pruned) else nullcontext():
            self._prune_channels(pruned, surplus)
        pruned.zero_grad(set_to_none=True)
        check_size(model, pruned, ratio)
        return pruned  # type: ignore[no-any-return]

    def _prune_heads(self, model: Any, ratio: float) -> None:
        maps, each_has = [block.self_attn for block in _blocks(model)], model.config.num_attention_heads
        total = each_has * (len(maps) if self.across_layers else 1)
        if gone := rounded(ratio * total, self.heads):
            heads = {each: each_has for block in maps for each in (block.q_proj, block.k_proj, block.v_proj)}
            self._step(
                model,
                dict.fromkeys(heads, 0.5),  # of a head's width, which stays; but what has no share is passed over
                num_heads=heads,
                prune_num_heads=True,
                prune_head_dims=False,
                head_pruning_ratio=_share(gone, total),
            )

    def _prune_channels(self, model: Any, surplus: int) -> None:
        mlps = [block.mlp for block in _blocks(model)]
        widths = [each.down_proj.in_features for each in mlps]
        gone = surplus / (3 * mlps[0].down_proj.out_features)
        ratios: dict[Any, float] = {}
        if self.across_layers:
            ratios[tuple(each.gate_proj for each in mlps)] = _share(round(gone), sum(widths))
        else:
            marks = [round(gone * index / len(mlps)) for index in range(len(mlps) + 1)]
            for each, width, (before, after) in zip(mlps, widths, pairwise(marks), strict=True):
                ratios[each.gate_proj] = _share(after - before, width)
        self._step(model, ratios)
        for each in mlps:
            each.intermediate_size = each.down_proj.in_features

    def _step(self, model: Any, ratios: Mapping[Any, float], **heads: Any) -> None:
        import torch_pruning as tp

        ids = torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device)
        importance = (
            tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean", normalizer=self.normalizer)
            if self.importance == "magnitude"
            else tp.importance.GroupTaylorImportance(normalizer=self.normalizer)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the norms' weights follow the hidden width
            pruner = tp.pruner.BasePruner(
                model,
                example_inputs={"input_ids": ids, "use_cache": False},  # with a cache the search does not end
                importance=importance,
                global_pruning=self.across_layers,
                output_transform=lambda output: output.logits,
                pruning_ratio=0.0,  # of what is not named, the hidden width
                pruning_ratio_dict=dict(ratios),
                ignored_layers=[model.lm_head],
                in_channel_groups={},  # the defaults of these are shared by all pruners
                out_channel_groups={},
                **heads,
            )
        for group in pruner.step(interactive=True):
            group.prune()


def _share(gone: int, total: int) -> float:
    """Return a share by which the pruner, which rounds to one side or the other, removes exactly so many."""
    return max(0.0, gone - 0.5) / total


def _blocks(model: nn.Module) -> list[Any]:
    return list(find_blocks(model)[1])


def _backward(model: Any, tokens: Tensor) -> None:
    device = next(model.parameters()).device
    for rows in rows_at_once(tokens):
        ids = rows.to(device)
        (model(input_ids=ids, labels=ids, use_cache=False).loss * (len(rows) / len(tokens))).backward()


def _only_channels(model: Any) -> bool:
    grouped = model.config.num_attention_heads != model.config.num_key_value_heads
    return grouped or hasattr(_blocks(model)[0].self_attn, "q_norm")


class _NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


@contextmanager
def _attention_aside(model: nn.Module) -> Iterator[None]:
    blocks = _blocks(model)
    maps = [block.self_attn for block in blocks]
    for block in blocks:
        block.self_attn = _NoAttention()
    try:
        yield
    finally:
        for block, attention in zip(blocks, maps, strict=True):
            block.self_attn = attention
