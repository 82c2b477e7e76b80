"""Physical slicing: removed units leave the tensors, so that memory and time go down with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fl_edge.errors import ConfigError
from fl_edge.pruning.architectures import UNIT_OF
from fl_edge.pruning.configuration import with_layers
from fl_edge.pruning.plan import PruningPlan
from fl_edge.pruning.units import (
    Member,
    base_linear,
    find_blocks,
    find_family,
    full_plan,
    kept_indices,
    members,
    of_adapter,
    plain,
    spans,
)


def prune(model: nn.Module, plan: PruningPlan, present: PruningPlan | None = None) -> None:
    """Slice a model in place, so that it computes what it would with the removed units' outputs set to zero.

    Query, key, value and first feed-forward maps lose rows and biases, output maps lose columns and keep their bias;
    the factors of LoRA adapters follow (rows of B, columns of A), for every adapter there is. Layers may differ.
    Parameters are replaced by contiguous ones of the same dtype, device and ``requires_grad``, without a gradient:
    make the optimiser after pruning. The configuration keeps the unpruned widths. Works on the meta device too.

    Layers that the plan removes are deleted, norms and all: what came into one goes on unchanged. Those that stay move
    up, and the model gets a configuration of its own that says so, so that key/value caches, masks and positions are
    those of a model that never had more layers. Plans keep the numbering of the unpruned model.

    Parameters
    ----------
    model
        A Hugging Face model of a known family, or a peft model around one.
    plan
        What stays.
    present
        What the model has now, and which of the unpruned model's layers those are; by default nothing is pruned yet.

    Raises
    ------
    ConfigError
        An unknown architecture; a plan of another model; a plan that keeps what ``present`` no longer has; a model
        that is not as ``present`` says; an adapter that is not plain LoRA; a layer to remove from a model with
        adapters, which are attached after that. Nothing has been changed then.
    """
    full = full_plan(model)
    present = full if present is None else present
    there = present.layers_kept
    if not full.covers(present.restricted(there)):
        raise ConfigError(f"the present plan is one of another model: {_shape(present)}, this one has {_shape(full)}")
    if not present.unpruned().covers(plan):
        raise ConfigError(f"the plan is one of another model: {_shape(plan)}, this one has {_shape(present)}")
    if not present.covers(plan):
        raise ConfigError(f"the plan keeps {_first_extra(plan, present)}, which has been removed from the model before")
    plan, present = plan.restricted(there), present.restricted(there)  # from here on layers as the model has them
    stay, base = plan.layers_kept, plain(model)
    if stay != present.layers_kept and any(of_adapter(name) for name, _ in model.named_modules()):
        raise ConfigError("cannot remove layers of a model with adapters; remove them first, then attach adapters")
    cuts = [_check(base, member, plan, present) for member in members(model)]
    for cut in (cut for cut in cuts if cut is not None):
        for linear in cut.linears:
            _slice(linear, cut.keep, cut.axis)
        if cut.wrapper is not None:
            cut.wrapper.in_features, cut.wrapper.out_features = cut.linears[0].in_features, cut.linears[0].out_features
    family, width, (path, blocks) = find_family(model), spans(base.config), find_blocks(model)
    for index in stay:
        for attribute, span in family.attributes.items():
            owner, _, name = attribute.rpartition(".")
            setattr(blocks[index].get_submodule(owner), name, len(plan.kept(index, UNIT_OF[span])) * width[span])
    if len(stay) < len(blocks):
        _keep_layers(base, base.get_submodule(path.rpartition(".")[0]), blocks, stay)


def _keep_layers(base: Any, stack: Any, blocks: nn.ModuleList, stay: Sequence[int]) -> None:
    """Delete all other blocks, and let everything that knows a layer's number or their count follow."""
    for index in sorted(set(range(len(blocks))) - set(stay), reverse=True):
        del blocks[index]
    old, new = base.config, with_layers(base.config, stay)
    for module in base.modules():
        if getattr(module, "config", None) is old:  # other models may share it
            module.config = new
    for index, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):  # its place in the key/value cache
                module.layer_idx = index  # type: ignore[assignment]
    if hasattr(stack, "n_layers"):  # DistilBERT
        stack.n_layers = len(blocks)
    if hasattr(stack, "has_sliding_layers"):  # Qwen: whether a second mask is made
        stack.has_sliding_layers = "sliding_attention" in new.layer_types


@dataclass(frozen=True)
class _Cut:
    """What there is to slice at one member."""

    linears: list[nn.Linear]  # the map itself, then the adapters' factors
    axis: int
    keep: Tensor
    wrapper: Any  # peft's layer around the map, which counts rows and columns too; None without adapters


def _check(base: nn.Module, member: Member, plan: PruningPlan, present: PruningPlan) -> _Cut | None:
    """Return what there is to slice at a member, or None where all or nothing of it stays; nothing is changed yet."""
    module = base.get_submodule(member.path)
    linear = base_linear(module, member.path)
    there = len(present.kept(member.layer, member.unit)) * member.width
    side = "rows" if member.axis == 0 else "columns"
    if linear.weight.shape[member.axis] != there:
        raise ConfigError(
            f"{member.path} has {linear.weight.shape[member.axis]} {side}, but {there} by the plan of what is present"
        )
    keep = kept_indices(member, plan, present)
    if len(keep) in (0, there):
        return None
    return _Cut([linear, *_factors(module, member)], member.axis, keep, module if module is not linear else None)


def _factors(module: nn.Module, member: Member) -> Iterator[nn.Linear]:
    """Yield the LoRA factors at a member that have to be cut along with it, of every adapter."""
    if isinstance(module, nn.Linear):
        return
    by_adapter = getattr(module, "lora_B" if member.axis == 0 else "lora_A", None)
    if not isinstance(by_adapter, nn.ModuleDict) or getattr(module, "lora_variant", None):
        raise ConfigError(f"cannot prune {member.path}: its adapter is not plain LoRA (no DoRA or other variant)")
    for factor in by_adapter.values():
        yield base_linear(factor, member.path)


def _slice(linear: nn.Linear, keep: Tensor, axis: int) -> None:
    keep = keep.to(linear.weight.device)
    linear.weight = _kept(linear.weight, keep, axis)
    if axis == 0 and linear.bias is not None:
        linear.bias = _kept(linear.bias, keep, 0)
    linear.out_features, linear.in_features = linear.weight.shape


def _kept(parameter: Tensor, keep: Tensor, axis: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(axis, keep), requires_grad=parameter.requires_grad)


def _shape(plan: PruningPlan) -> str:
    gone = len(plan.layers) - len(plan.layers_kept)
    heads, channels = sorted(set(plan.heads)), sorted(set(plan.channels))
    layers = f"{len(plan.layers)} layers" + (f" ({gone} removed)" if gone else "")
    return f"{plan.model_type}, {layers}, heads {heads}, channels {channels}"


def _first_extra(plan: PruningPlan, present: PruningPlan) -> str:
    for layer, (wanted, there) in enumerate(zip(plan.layers, present.layers, strict=True)):
        if there.removed and not wanted.removed:
            return f"layer {layer}"
        if extra := sorted(set(wanted.heads) - set(there.heads)):
            return f"head {extra[0]} of layer {layer}"
        if extra := sorted(set(wanted.channels) - set(there.channels)):
            return f"channel {extra[0]} of layer {layer}"
    raise AssertionError("only called for plans that are not nested")
