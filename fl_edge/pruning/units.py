"""The prunable units of a model, and the one description of how far each of them reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fl_edge.errors import ConfigError
from fl_edge.pruning.architectures import FAMILIES, UNIT_OF, Family, Span
from fl_edge.pruning.plan import UNITS, LayerPlan, PruningPlan, Unit


@dataclass(frozen=True)
class Member:
    """A linear map that the units of a layer reach into.

    Rows (axis 0, with the bias) or columns (axis 1) ``u * width`` to ``(u + 1) * width`` belong to unit u of the
    unpruned model.
    """

    layer: int
    unit: Unit
    path: str  # in the plain model, see :func:`plain`
    axis: Literal[0, 1]
    width: int


def plain(model: nn.Module) -> nn.Module:
    """Return the model under peft's wrapper; a model that wears none is returned as it is."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def of_adapter(name: str) -> bool:
    """Whether a parameter or module of this name is an adapter's, not the plain model's."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def find_family(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises
    ------
    ConfigError
        An architecture that is not in :data:`~fl_edge.pruning.architectures.FAMILIES`.
    """
    shown: str = getattr(getattr(plain(model), "config", None), "model_type", None) or type(plain(model)).__name__
    if shown not in FAMILIES:
        raise ConfigError(f"cannot prune the architecture {shown!r}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[shown]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return path and list of the model's blocks, for a bare model and for one with a task's head.

    Raises
    ------
    ConfigError
        An unknown architecture, or no block at all.
    """
    base, path = plain(model), find_family(model).blocks
    prefix = getattr(base, "base_model_prefix", "")
    if prefix and hasattr(base, prefix):
        path = f"{prefix}.{path}"
    blocks = base.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ConfigError(f"{type(base).__name__} has no prunable unit: {path} is empty")
    return path, blocks


def spans(config: Any) -> Mapping[Span, int]:
    """Return how much of each span belongs to one unit, from a model's configuration."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries = heads // (getattr(config, "num_key_value_heads", None) or heads)
    return {"group": 1, "queries": queries, "query_rows": queries * width, "key_rows": width, "channel": 1}


def members(model: nn.Module) -> list[Member]:
    """Return every linear map that prunable units reach into, layer by layer.

    This is the one description that importance, slicing, sizes and the gathering of LoRA factors follow. It is the
    same for a model before and after slicing, bare or with a task's head, plain or wrapped by peft. Layers are counted
    as the model has them: where it has lost some, ``plan.restricted(present.layers_kept)`` counts like that too.

    Raises
    ------
    ConfigError
        An unknown architecture, or a model without blocks.
    """
    family, (path, blocks), width = find_family(model), find_blocks(model), spans(plain(model).config)
    sides: tuple[tuple[Literal[0, 1], Mapping[str, Span]], ...] = ((0, family.rows), (1, family.columns))
    return [
        Member(layer, UNIT_OF[span], f"{path}.{layer}.{name}", axis, width[span])
        for layer in range(len(blocks))
        for axis, maps in sides
        for name, span in maps.items()
    ]


def full_plan(model: nn.Module) -> PruningPlan:
    """Return the plan that keeps everything the layers had before any pruning, as the configuration says.

    Layers that were removed before are unknown to the model: the plan has those that are there, numbered from 0.

    Raises
    ------
    ConfigError
        An unknown architecture, or a model without blocks.
    """
    family, (_, blocks) = find_family(model), find_blocks(model)
    config: Any = plain(model).config
    heads: int = config.num_attention_heads // spans(config)["queries"]
    channels: int = getattr(config, family.channels_key)
    count = len(blocks)
    layer = LayerPlan(tuple(range(heads)), tuple(range(channels)))
    return PruningPlan(config.model_type, (heads,) * count, (channels,) * count, (layer,) * count)


def kept_indices(member: Member, plan: PruningPlan, present: PruningPlan | None = None) -> Tensor:
    """Return the rows or columns of a member that stay.

    Parameters
    ----------
    member
        One of :func:`members`.
    plan
        What stays.
    present
        What is there now, and what the result counts in: a plan that covers ``plan``, by default the unpruned model.
        Both number layers as the member does, see :func:`members`.

    Returns
    -------
    Tensor
        (kept units * width,) int64 on the CPU, ascending; none where the plan removes the layer.
    """
    units = torch.tensor(plan.kept(member.layer, member.unit), dtype=torch.int64)
    if present is not None:
        there = torch.tensor(present.kept(member.layer, member.unit), dtype=torch.int64)
        units = torch.searchsorted(there, units)
    return (units[:, None] * member.width + torch.arange(member.width)).flatten()


def base_linear(module: nn.Module, path: str) -> nn.Linear:
    """Return the linear map itself, also where peft has put a layer around it.

    Raises
    ------
    ConfigError
        Something else than ``nn.Linear`` stands there, for example a quantised layer.
    """
    inner = getattr(module, "base_layer", module)
    if not isinstance(inner, nn.Linear) or inner.weight.ndim != 2 or not inner.weight.is_floating_point():
        raise ConfigError(f"cannot prune {path}: it is a {type(inner).__name__}, only nn.Linear can be sliced")
    return inner


def unit_params(model: nn.Module) -> list[tuple[int, int]]:
    """Return, for each layer, the parameters of one head unit and of one channel unit, LoRA left out.

    The same before and after slicing: what a unit has does not depend on how many others are there. Layers are those
    that the model has, as in :func:`members`.
    """
    base = plain(model)
    counts = [dict.fromkeys(UNITS, 0) for _ in find_blocks(model)[1]]
    for member in members(model):
        linear = base_linear(base.get_submodule(member.path), member.path)
        other = linear.weight.shape[1 - member.axis] + (member.axis == 0 and linear.bias is not None)
        counts[member.layer][member.unit] += member.width * other
    return [(count["heads"], count["channels"]) for count in counts]
