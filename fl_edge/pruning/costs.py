"""What a model costs under a plan: parameters and multiply-adds, for benchmarks and virtual clocks. All formulas ours.

A multiply-add (MAC) counts once. Linear maps are counted; norms, activations and softmax are not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fl_edge.errors import ConfigError
from fl_edge.pruning.plan import PruningPlan
from fl_edge.pruning.units import base_linear, find_blocks, members, of_adapter, plain, spans, unit_params


@dataclass(frozen=True)
class Costs:
    """What a model costs under a plan, adapters left out.

    Attributes
    ----------
    prunable
        Parameters of the units that stay.
    fixed
        Other parameters of the layers that stay: norms, biases of output maps.
    outside
        Parameters outside the blocks: embeddings, pooler, head of the task; tied ones once.
    block_macs
        Multiply-adds a token in the blocks' linear maps.
    attention_macs
        Multiply-adds a token and a position that it looks at: scores, and values weighted by them.
    outside_macs
        Multiply-adds of the linear maps outside the blocks, each applied once: at every token in a language model, once
        a sequence in a classifier.
    """

    prunable: int
    fixed: int
    outside: int
    block_macs: int
    attention_macs: int
    outside_macs: int

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.prunable + self.fixed + self.outside

    def macs(self, length: int) -> int:
        """Return the blocks' multiply-adds a token in a sequence of ``length`` tokens that all look at each other."""
        return self.block_macs + length * self.attention_macs


def count_costs(model: nn.Module, plan: PruningPlan) -> Costs:
    """Return what a model costs under a plan. The model itself may be pruned or not, or have no memory at all (meta).

    A model without some layers must have lost those that the plan removes, or the plan is one of its own layers.

    Raises
    ------
    ConfigError
        An unknown architecture, a model without blocks, or a plan of another number of layers.
    """
    base, (path, _), plan = plain(model), find_blocks(model), _by_position(model, plan)
    width = spans(plain(model).config)
    prunable = sum(
        len(layer.heads) * head + len(layer.channels) * channel
        for layer, (head, channel) in zip(plan.layers, unit_params(model), strict=True)
    )
    reached = [0] * len(plan.layers)  # parameters of a layer's members as they are in this model
    block_macs = 0
    for member in members(model):
        linear = base_linear(base.get_submodule(member.path), member.path)
        kept = len(plan.kept(member.layer, member.unit)) * member.width
        block_macs += kept * linear.weight.shape[1 - member.axis]
        reached[member.layer] += linear.weight.numel() + (
            linear.bias.numel() if member.axis == 0 and linear.bias is not None else 0
        )
    own = {name: parameter.numel() for name, parameter in base.named_parameters() if not of_adapter(name)}
    tied: Mapping[str, str] = base.all_tied_weights_keys  # type: ignore[assignment]
    for name in [name for name, source in tied.items() if name in own and source in own]:
        del own[name]  # one parameter, except on the meta device
    inside = [
        sum(size for name, size in own.items() if name.startswith(f"{path}.{layer}."))
        for layer in range(len(plan.layers))
    ]
    outside_macs = sum(
        module.weight.numel()
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(f"{path}.") and not of_adapter(name)
    )
    return Costs(
        prunable=prunable,
        fixed=sum(inside[layer] - reached[layer] for layer in plan.layers_kept),
        outside=sum(own.values()) - sum(inside),
        block_macs=block_macs,
        attention_macs=sum(2 * len(layer.heads) * width["query_rows"] for layer in plan.layers),
        outside_macs=outside_macs,
    )


def count_lora(model: nn.Module, plan: PruningPlan, rank: int, targets: Collection[str]) -> int:
    """Return the parameters of a LoRA adapter under a plan, which are also its multiply-adds a token.

    Parameters
    ----------
    model, plan
        As for :func:`count_costs`.
    rank
        Of every pair of factors.
    targets
        Ends of the paths of the members that have one, as in peft's ``target_modules``: ``("query", "value")``. Maps
        that are no members (poolers, heads of tasks) are not counted.
    """
    base, plan, total = plain(model), _by_position(model, plan), 0
    for member in members(model):
        if member.layer in plan.layers_kept and f".{member.path}".endswith(tuple(f".{target}" for target in targets)):
            other = base_linear(base.get_submodule(member.path), member.path).weight.shape[1 - member.axis]
            total += rank * (other + len(plan.kept(member.layer, member.unit)) * member.width)
    return total


def sparsity(plan: PruningPlan, sizes: Sequence[tuple[int, int]]) -> float:
    """Return the share of the originally prunable parameters that a plan removes, in [0, 1).

    What else goes with a removed layer (norms, biases) was not prunable and is not counted.

    Parameters
    ----------
    plan
        What stays.
    sizes
        Parameters of one head and of one channel in each layer, removed ones included, as
        :func:`~fl_edge.pruning.unit_params` gives them for the unpruned model.

    Raises
    ------
    ConfigError
        Sizes of another number of layers.
    """
    if len(sizes) != len(plan.layers):
        raise ConfigError(f"there are sizes of {len(sizes)} layers for a plan of {len(plan.layers)}")
    kept = total = 0
    for layer, (head, channel) in enumerate(sizes):
        kept += len(plan.layers[layer].heads) * head + len(plan.layers[layer].channels) * channel
        total += plan.heads[layer] * head + plan.channels[layer] * channel
    return 1 - kept / total


def _by_position(model: nn.Module, plan: PruningPlan) -> PruningPlan:
    """Return the plan in the numbering of the layers that the model has."""
    there = len(find_blocks(model)[1])
    if there != len(plan.layers):
        plan = plan.restricted(plan.layers_kept)
    if there != len(plan.layers):
        raise ConfigError(f"the model has {there} layers, of which the plan keeps {len(plan.layers)}")
    return plan
