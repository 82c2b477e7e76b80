"""LoRA on the linear maps that can be pruned: put on, read, taken off. The layers are peft's.

The scale s = alpha / r is the same for every rank (alpha = s r), or factors of devices with unequal ranks could not be
averaged or cut to size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl_edge.errors import ReplyError
from fl_edge.fedspine.factors import Factors
from fl_edge.pruning import Member

ADAPTER = "default"  # peft's name of the one adapter there is


@dataclass(frozen=True)
class AdaptedMap:
    """A linear map with its LoRA factors."""

    member: Member
    layer: Any  # peft's LoraLayer

    @property
    def weight(self) -> Tensor:
        """W, (d_out, d_in), frozen."""
        weight: Tensor = self.layer.base_layer.weight
        return weight

    @property
    def a(self) -> nn.Parameter:
        """A, (r, d_in)."""
        weight: nn.Parameter = self.layer.lora_A[ADAPTER].weight
        return weight

    @property
    def b(self) -> nn.Parameter:
        """B, (d_out, r)."""
        weight: nn.Parameter = self.layer.lora_B[ADAPTER].weight
        return weight

    @property
    def scale(self) -> float:
        """Return s, the factor of B A."""
        return float(self.layer.scaling[ADAPTER])


def map_shapes(model: nn.Module, members: Sequence[Member]) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of each linear map as it is in a model without LoRA, by path."""
    weights = {member.path: model.get_parameter(f"{member.path}.weight") for member in members}
    return {path: (weight.shape[0], weight.shape[1]) for path, weight in weights.items()}


def attach(
    model: nn.Module, members: Sequence[Member], adapter: Mapping[str, Factors], *, scale: float, dropout: float
) -> list[AdaptedMap]:
    """Put LoRA with given factors on the maps; everything else in the model is frozen.

    Parameters
    ----------
    adapter
        Path of each map -> its factors, all of one rank and of the shapes of the (pruned) model.

    Raises
    ------
    ReplyError
        Factors of another shape than the model's maps.
    """
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - takes seconds to import

    rank = next(iter(adapter.values())).rank
    for path, (d_out, d_in) in map_shapes(model, members).items():
        given = adapter[path]
        if given.a.shape != (rank, d_in) or given.b.shape != (d_out, rank):
            raise ReplyError(
                f"the factors of {path} are {tuple(given.b.shape)} x {tuple(given.a.shape)}; the model takes "
                f"({d_out}, {rank}) x ({rank}, {d_in})"
            )
    config = LoraConfig(
        r=rank, lora_alpha=scale * rank, lora_dropout=dropout,  # type: ignore[arg-type] # any number does
        target_modules=[member.path for member in members], init_lora_weights=False,
    )  # fmt: skip
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    maps = [AdaptedMap(member, model.get_submodule(member.path)) for member in members]
    with torch.no_grad():
        for each in maps:
            each.a.copy_(adapter[each.member.path].a)
            each.b.copy_(adapter[each.member.path].b)
    return maps


def detach(model: nn.Module, members: Sequence[Member]) -> None:
    """Take LoRA off again; the frozen maps are as they were."""
    for member in members:
        layer: Any = model.get_submodule(member.path)
        model.set_submodule(member.path, layer.base_layer)
    del model.peft_config  # or peft would take the next adapter for a second one


def factors_of(maps: Sequence[AdaptedMap]) -> dict[str, Factors]:
    """Return copies of the factors, by path."""
    return {each.member.path: Factors(each.a.detach().clone(), each.b.detach().clone()) for each in maps}


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the task head's parameters: what a classifier has beyond its pretrained base.

    A language model has none; its output layer belongs to the base. BERT's pooler belongs to the head: many pretrained
    checkpoints come without one.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    base = f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if not name.startswith(base) or ".pooler." in name]


def head_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the task head's parameters, by name."""
    return {name: model.get_parameter(name).detach().clone() for name in head_names(model)}


def load_head(model: nn.Module, head: Mapping[str, Tensor], *, trainable: bool) -> list[nn.Parameter]:
    """Write a head into the model, and return its parameters.

    Raises
    ------
    ReplyError
        Names or shapes of another head.
    """
    names = head_names(model)
    if names != list(head) and set(names) != set(head):
        raise ReplyError(f"the head has {', '.join(head) or 'no parameters'}; that of the model has {', '.join(names)}")
    parameters = [model.get_parameter(name) for name in names]
    with torch.no_grad():
        for name, parameter in zip(names, parameters, strict=True):
            if parameter.shape != head[name].shape:
                raise ReplyError(f"{name} is {tuple(head[name].shape)}; the model has {tuple(parameter.shape)}")
            parameter.copy_(head[name])
            parameter.requires_grad_(trainable)
    return parameters
