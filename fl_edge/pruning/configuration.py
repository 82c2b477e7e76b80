"""What a model's configuration says about a plan, and models without memory that are built from it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from fl_edge.pruning.architectures import FAMILIES
from fl_edge.pruning.plan import PruningPlan
from fl_edge.pruning.units import spans

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by their names in the model


def empty(architecture: type[nn.Module], config: Any) -> nn.Module:
    """Build a model whose parameters are on the meta device; its buffers are real, since no file holds them."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]  # noqa: PLC0415 - heavy

    with init_empty_weights(include_buffers=False):
        return architecture(config)


def with_layers(config: Any, layers: Sequence[int]) -> Any:
    """Return the configuration of the model that has only these layers."""
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None) is not None:
        shorter.layer_types = [config.layer_types[layer] for layer in layers]
    return shorter


def resized(config: Any, heads: int, channels: int) -> Any:
    """Return a configuration with other numbers of units, as far as it can say them; the width of a head stays."""
    family, width = FAMILIES[config.model_type], spans(config)
    changed = copy.deepcopy(config)
    setattr(changed, family.channels_key, channels)
    for key, each in family.heads_keys.items():
        setattr(changed, key, heads * width[each])
    if family.heads_keys:
        changed.head_dim = width["key_rows"]
    return changed


def written(base: nn.Module, plan: PruningPlan, shapes: Shapes, dtype: Any) -> Any:
    """Return the configuration to write beside the tensors of a pruned model.

    Where a configuration can say exactly these tensors (layers alike, no bias that the architecture lacks), it does,
    and plain ``from_pretrained`` loads the folder. Elsewhere plain ``from_pretrained`` must stop instead of loading
    something else: the configuration keeps the unpruned widths, and where the tensors have just these, so that only
    an added bias is at stake, it claims one channel too many. :func:`~fl_edge.pruning.load_pruned` takes widths from
    the plan.

    Parameters
    ----------
    base
        The sliced model, whose configuration has the unpruned widths and the layers that are there.
    plan
        What it keeps.
    shapes
        Of the tensors that are written.
    dtype
        Of the model as it is written.
    """
    unpruned: Any = copy.deepcopy(base.config)
    unpruned.architectures, unpruned.dtype = [type(base).__name__], dtype
    kept = [plan.layers[layer] for layer in plan.layers_kept]
    alike = resized(unpruned, len(kept[0].heads), len(kept[0].channels))
    try:  # through text and back: a configuration's own rules are checked when it is read
        alike = type(alike).from_dict(json.loads(alike.to_json_string()))
        there = shapes_of(empty(type(base), alike))
        if all(there.get(name) == shape for name, shape in shapes.items()):
            return alike
    except (ValueError, StrictDataclassError):
        pass
    there = shapes_of(empty(type(base), unpruned))
    stops = any(there.get(name, shape) != shape for name, shape in shapes.items())
    return unpruned if stops else resized(unpruned, plan.heads[0], plan.channels[0] + 1)


def shapes_of(model: nn.Module) -> Shapes:
    """Return the shapes of a model's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
