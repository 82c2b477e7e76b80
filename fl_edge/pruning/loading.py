"""Pruned models from disk: as they were saved, to the bit, or one line that says what is wrong with the folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from fl_edge.errors import ConfigError, DataError, FlEdgeError
from fl_edge.pruning.configuration import Shapes, empty, resized, shapes_of
from fl_edge.pruning.plan import PruningPlan
from fl_edge.pruning.saving import ADAPTER, CONFIG, GENERATION, PLAN, line_of, sha256_of
from fl_edge.pruning.slicing import prune
from fl_edge.pruning.units import base_linear, members


def read_plan(folder: Path) -> PruningPlan:
    """Return the plan of a folder written by :func:`~fl_edge.pruning.save_pruned`, or in shards.

    Raises
    ------
    DataError
        No plan there, or a damaged one.
    """
    return _read(folder)[0]


def load_pruned(folder: Path) -> nn.Module:
    """Return the model of a folder written by :func:`~fl_edge.pruning.save_pruned`, on the CPU, in evaluation mode.

    The class is the one that was saved; a LoRA adapter in ``folder/adapter`` is attached by peft. Only the pruned
    sizes are ever allocated, and of several files of weights one is read at a time. The configuration in memory has
    the unpruned widths and the layers that are there, so that the model can be pruned on, with :func:`read_plan` as
    what is present.

    Raises
    ------
    DataError
        A folder without a complete model, a damaged file, or files that do not belong together.
    """
    plan, digests = _read(folder)
    try:
        for name, sha256 in digests.items():
            if sha256_of(folder / name) != sha256:
                raise DataError(f"{folder / name} is damaged or not the file that {PLAN} belongs to")
        model = _skeleton(folder, plan)
        _fill(model, [folder / name for name in digests])
        return _attach(model, folder / ADAPTER).eval()
    except ConfigError as error:
        raise DataError(f"{folder} does not fit its {PLAN}: {error}") from None
    except FlEdgeError:
        raise
    except OSError as error:
        raise DataError(f"cannot read the pruned model in {folder}: {line_of(error)}") from None


def give_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Give the output maps of a model on the meta device the biases of these names that its architecture lacks."""
    wanted = set(names)
    for member in members(model):
        linear: Any = base_linear(model.get_submodule(member.path), member.path)
        if member.axis == 1 and linear.bias is None and f"{member.path}.bias" in wanted:
            linear.bias = nn.Parameter(linear.weight.new_empty(linear.out_features))


def first_unlike(model: Any, shapes: Shapes) -> tuple[str, str] | None:
    """Return the first tensor that is not exactly as in a model, and how, or None; tied ones may be missing."""
    expected = shapes_of(model)
    for name in sorted(shapes.keys() | (expected.keys() - model.all_tied_weights_keys.keys())):
        if shapes.get(name) != expected.get(name):
            return name, f"it has {shapes.get(name, 'nothing')} for {name}, the plan {expected.get(name, 'nothing')}"
    return None


def _read(folder: Path) -> tuple[PruningPlan, dict[str, str]]:
    """Return the plan, and the digests of the files of weights by their names."""
    file = folder / PLAN
    try:
        record = json.loads(file.read_bytes())
        digests = {str(name): str(sha256) for name, sha256 in record["weights_sha256"].items()}
        if not digests or any(name != Path(name).name for name in digests):
            raise DataError(f"{file} is damaged: weights_sha256 must name files beside it")
        return PruningPlan.from_record(record["plan"]), digests
    except FileNotFoundError:
        raise DataError(f"{folder} holds no pruned model, or its saving was cut short: no {PLAN}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DataError(f"{file} is damaged: {line_of(error)}") from None


def _skeleton(folder: Path, plan: PruningPlan) -> nn.Module:
    """Build the saved class in unpruned widths without memory, and slice it."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise DataError(f"{folder / CONFIG} is damaged: {line_of(error)}") from None
    if config.model_type != plan.model_type:
        raise DataError(f"{folder / CONFIG} is of a {config.model_type!r} model, {PLAN} of a {plan.model_type!r} one")
    model = empty(_architecture(config, folder), resized(config, plan.heads[0], plan.channels[0]))
    prune(model, plan.restricted(plan.layers_kept))  # the configuration has only the layers that are there
    return model


def _architecture(config: Any, folder: Path) -> type[nn.Module]:
    name = next(iter(config.architectures or ()), None)
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise DataError(f"{folder / CONFIG} names the architecture {name!r}, which transformers does not have")
    return found


def _fill(model: Any, files: list[Path]) -> None:
    shapes = {file: _shapes_in(file) for file in files}
    together = {name: shape for each in shapes.values() for name, shape in each.items()}
    give_biases(model, together)
    if found := first_unlike(model, together):
        file = next((file for file, each in shapes.items() if found[0] in each), files[-1])
        raise DataError(f"{file} does not fit {PLAN}: {found[1]}")
    for file in files:
        model.load_state_dict(load_file(file), strict=False, assign=True)
    model.tie_weights()


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{file} is damaged: {line_of(error)}") from None


def _attach(model: Any, adapter: Path) -> nn.Module:
    if (adapter.parent / GENERATION).exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(adapter.parent)
    if not adapter.is_dir():
        return model  # type: ignore[no-any-return]
    from peft import PeftModel  # noqa: PLC0415 - takes seconds to import

    try:
        with warnings.catch_warnings():
            # peft asks transformers by a name that transformers has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            return PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"the adapter in {adapter} is damaged or of another model: {line_of(error)}") from None
