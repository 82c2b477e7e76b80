"""Tiny transformers of every family that can be pruned, with weights large enough for mistakes to show."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from fl_edge.pruning import LayerPlan, PruningPlan, full_plan
from fl_edge.seeding import torch_rng

VOCABULARY, PAD, LAYERS = 64, 1, 2
ENCODERS, DECODERS = ("bert", "distilbert", "roberta"), ("llama", "mistral", "opt", "qwen2", "qwen3")
FAMILIES = (*ENCODERS, *DECODERS)
GROUPED = tuple(family for family in DECODERS if family != "opt")  # queries in groups; fewer heads can be configured
TASKS = {
    "bare": "AutoModel",
    "classification": "AutoModelForSequenceClassification",
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
}


def make_config(family: str, **changes: Any) -> Any:
    if family == "distilbert":
        sizes = {"dim": 32, "n_layers": changes.pop("num_hidden_layers", LAYERS), "n_heads": 4, "hidden_dim": 24}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 24}
    if family == "opt":
        sizes |= {"ffn_dim": sizes.pop("intermediate_size"), "tie_word_embeddings": False}
    if family in GROUPED:
        sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    if family == "qwen3":
        sizes |= {"head_dim": 6}
    if family in ("llama", "qwen3"):
        sizes |= {"attention_bias": True}
    general = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "max_position_embeddings": 40, "num_labels": 3}
    return transformers.AutoConfig.for_model(family, **{**general, **sizes, **changes})


def make_model(
    family: str, task: str = "classification", attention: str = "sdpa", seed: int = 0, **changes: Any
) -> Any:
    """A model in evaluation mode whose every parameter, biases included, is drawn anew."""
    config = make_config(family, **changes)
    if task == "causal" and family == "bert":
        config.is_decoder = True
    model = getattr(transformers, TASKS[task]).from_config(config, attn_implementation=attention)
    fill(model, seed)
    return model.eval()


def fill(model: nn.Module, seed: int) -> None:
    generator = torch_rng(seed, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def draw_plan(model: nn.Module, rng: np.random.Generator, ratio: float | None = None, of: Any = None) -> PruningPlan:
    """A plan that differs by layer; each unit goes with the given probability, by default one drawn for each layer."""
    within = of or full_plan(model)

    def some(units: tuple[int, ...]) -> tuple[int, ...]:
        share = rng.uniform(0, 0.8) if ratio is None else ratio
        stay = rng.random(len(units)) >= share
        stay[rng.integers(len(units))] = True
        return tuple(unit for unit, kept in zip(units, stay, strict=True) if kept)

    layers = tuple(
        layer if layer.removed else LayerPlan(some(layer.heads), some(layer.channels)) for layer in within.layers
    )
    return replace(within, layers=layers)


def without_layers(plan: PruningPlan, gone: Collection[int]) -> PruningPlan:
    layers = (LayerPlan((), ()) if index in gone else layer for index, layer in enumerate(plan.layers))
    return replace(plan, layers=tuple(layers))


def same_everywhere(model: nn.Module, heads: tuple[int, ...], channels: tuple[int, ...]) -> PruningPlan:
    full = full_plan(model)
    return PruningPlan(full.model_type, full.heads, full.channels, (LayerPlan(heads, channels),) * len(full.layers))


def draw_batch(rng: np.random.Generator, batch: int = 3, length: int = 9, left: bool = False) -> dict[str, Tensor]:
    """Token ids with padding on one side, and their mask; the first sequence has no padding."""
    ids = torch.from_numpy(rng.integers(2, VOCABULARY, (batch, length)))
    sizes = torch.from_numpy(rng.integers(2, length + 1, batch))
    sizes[0] = length
    positions = torch.arange(length)
    mask = positions >= length - sizes[:, None] if left else positions < sizes[:, None]
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def mask_units(model: Any, plan: PruningPlan) -> None:
    """The reference: nothing is sliced, but the output maps no longer see what removed units produce."""
    config, kind = model.config, model.config.model_type
    heads = config.num_attention_heads
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads // plan.heads[0]
    outputs = {
        "opt": ("self_attn.out_proj", "fc2"),
        "bert": ("attention.output.dense", "output.dense"),
        "roberta": ("attention.output.dense", "output.dense"),
        "distilbert": ("attention.out_lin", "ffn.lin2"),
    }.get(kind, ("self_attn.o_proj", "mlp.down_proj"))
    for layer, kept in enumerate(plan.layers):
        for name, units, each in zip(outputs, (kept.heads, kept.channels), (width, 1), strict=True):
            (found,) = [module for path, module in model.named_modules() if f".{path}".endswith(f".{layer}.{name}")]
            gone = torch.ones(found.weight.shape[1], dtype=torch.bool).view(-1, each)
            gone[list(units)] = False
            found.weight.data[:, gone.flatten()] = 0


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch)[0]
    return found[batch["attention_mask"].bool()] if found.ndim == 3 else found
