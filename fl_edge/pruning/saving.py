"""Pruned models on disk: safetensors, configuration, plan and LoRA adapter in one folder that loads with one call.

The folder is an ordinary Hugging Face one plus ``plan.json``, which is removed first and written last: without it a
folder is not a pruned model, so a save that was cut short never looks whole. Where the configuration can express the
plan (every layer alike), plain ``from_pretrained`` loads the folder as well; elsewhere the configuration keeps the
unpruned sizes, so that plain ``from_pretrained`` stops at the first tensor instead of loading something else.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fl_edge.errors import ConfigError, DataError, FlEdgeError, RunFolderError
from fl_edge.files import write_whole
from fl_edge.pruning.architectures import FAMILIES
from fl_edge.pruning.plan import PruningPlan
from fl_edge.pruning.slicing import prune
from fl_edge.pruning.units import of_adapter, plain, spans

PLAN, WEIGHTS, ADAPTER = "plan.json", "model.safetensors", "adapter"
CONFIG, GENERATION = "config.json", "generation_config.json"


def save_pruned(model: nn.Module, plan: PruningPlan, folder: Path, tokenizer: Any = None) -> None:
    """Write a pruned model so that :func:`load_pruned` gives it back to the bit.

    Parameters
    ----------
    model
        Sliced by ``plan``. Of a peft model the base goes into the folder and the active adapter, in peft's own format,
        into ``folder/adapter``.
    plan
        What the model keeps.
    folder
        Made where needed; a model that stands there is replaced.
    tokenizer
        Saved beside the model where given.

    Raises
    ------
    ConfigError
        A model that is not as the plan says, whose adapter is merged into the weights, or that holds adapters without
        being a peft model, which would be lost.
    RunFolderError
        The folder cannot be written; what is there then is not taken for a pruned model.
    """
    prune(model, plan, present=plan)  # slices nothing, and refuses a plan that is not this model's
    base = plain(model)
    if any(getattr(module, "merged", False) for module in base.modules()):
        raise ConfigError("the adapter is merged into the weights; call unmerge_adapter() before saving")
    if base is model and any(of_adapter(name) for name, _ in model.named_parameters()):
        raise ConfigError("the model holds adapters without being a PeftModel; detach them, or save a PeftModel")
    weights = _weights(base)
    config = _config(base, plan)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (PLAN, CONFIG, GENERATION):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        _write_tensors(folder / WEIGHTS, weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if base is not model:
            _write_adapter(model, folder / ADAPTER)
        if getattr(base, "generation_config", None) is not None:
            write_whole(folder / GENERATION, base.generation_config.to_json_string())  # type: ignore[union-attr, operator]
        write_whole(folder / CONFIG, config.to_json_string())
        record = {"plan": plan.to_record(), "weights_sha256": _sha256(folder / WEIGHTS)}
    except Exception as error:  # on a full disk safetensors raises a class of its own, tokenizers a bare Exception
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise RunFolderError(f"cannot write {folder}: {getattr(error, 'strerror', None) or _line(error)}") from None
    write_whole(folder / PLAN, json.dumps(record, indent=1) + "\n")


def read_plan(folder: Path) -> PruningPlan:
    """Return the plan of a folder written by :func:`save_pruned`.

    Raises
    ------
    DataError
        No plan there, or a damaged one.
    """
    return _read(folder)[0]


def load_pruned(folder: Path) -> nn.Module:
    """Return the model of a folder written by :func:`save_pruned`, on the CPU, in evaluation mode.

    The class is the one that was saved; a LoRA adapter in ``folder/adapter`` is attached by peft. Only the pruned
    sizes are ever allocated. The configuration in memory has the unpruned ones, so that the model can be pruned on.

    Raises
    ------
    DataError
        A folder without a complete model, a damaged file, or files that do not belong together.
    """
    plan, sha256 = _read(folder)
    try:
        if _sha256(folder / WEIGHTS) != sha256:
            raise DataError(f"{folder / WEIGHTS} is damaged or not the file that {PLAN} belongs to")
        model = _skeleton(folder, plan)
        _fill(model, folder / WEIGHTS)
        return _attach(model, folder / ADAPTER).eval()
    except ConfigError as error:
        raise DataError(f"{folder} does not fit its {PLAN}: {error}") from None
    except FlEdgeError:
        raise
    except OSError as error:
        raise DataError(f"cannot read the pruned model in {folder}: {_line(error)}") from None


def _read(folder: Path) -> tuple[PruningPlan, str]:
    file = folder / PLAN
    try:
        record = json.loads(file.read_bytes())
        return PruningPlan.from_record(record["plan"]), str(record["weights_sha256"])
    except FileNotFoundError:
        raise DataError(f"{folder} holds no pruned model, or its saving was cut short: no {PLAN}") from None
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise DataError(f"{file} is damaged: {_line(error)}") from None


def _skeleton(folder: Path, plan: PruningPlan) -> nn.Module:
    """Build the saved class in unpruned sizes without memory, and slice it."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise DataError(f"{folder / CONFIG} is damaged: {_line(error)}") from None
    if config.model_type != plan.model_type:
        raise DataError(f"{folder / CONFIG} is of a {config.model_type!r} model, {PLAN} of a {plan.model_type!r} one")
    model = _empty(_architecture(config, folder), _resized(config, plan.heads[0], plan.channels[0]))
    prune(model, plan)
    return model


def _architecture(config: Any, folder: Path) -> type[nn.Module]:
    name = next(iter(config.architectures or ()), None)
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise DataError(f"{folder / CONFIG} names the architecture {name!r}, which transformers does not have")
    return found


def _empty(architecture: type[nn.Module], config: Any) -> nn.Module:
    """Build a model whose parameters are on the meta device; its buffers are real, since no file holds them."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]  # noqa: PLC0415 - heavy

    with init_empty_weights(include_buffers=False):
        return architecture(config)


def _fill(model: Any, file: Path) -> None:
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise DataError(f"{file} is damaged: {_line(error)}") from None
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(weights.keys() | (expected.keys() - model.all_tied_weights_keys.keys())):
        there = tuple(weights[name].shape) if name in weights else "nothing"
        if name not in expected or there != tuple(expected[name]):
            wanted = tuple(expected[name]) if name in expected else "nothing"
            raise DataError(f"{file} does not fit {PLAN}: it has {there} for {name}, the plan {wanted}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()


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
        raise DataError(f"the adapter in {adapter} is damaged or of another model: {_line(error)}") from None


def _weights(base: nn.Module) -> dict[str, Tensor]:
    """Return the model's own tensors under their plain names: no adapters, and one of each tied set."""
    weights: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        if not of_adapter(name):
            parts = (part for part in name.split(".") if part not in ("base_layer", "original_module"))
            weights[".".join(parts)] = tensor
    tied: Mapping[str, str] = base.all_tied_weights_keys  # type: ignore[assignment]
    for name, source in tied.items():
        if name in weights and source in weights and weights[name].data_ptr() == weights[source].data_ptr():
            del weights[name]
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _config(base: nn.Module, plan: PruningPlan) -> Any:
    """Return the configuration to write: with the pruned sizes where it can say them, else with the unpruned ones."""
    unpruned: Any = copy.deepcopy(base.config)
    unpruned.architectures, unpruned.dtype = [type(base).__name__], base.dtype
    heads = {len(layer.heads) for layer in plan.layers}
    channels = {len(layer.channels) for layer in plan.layers}
    cut = heads != {plan.heads[0]}
    if len(heads) > 1 or len(channels) > 1 or (cut and not FAMILIES[plan.model_type].heads_keys):
        return unpruned
    resized = _resized(unpruned, heads.pop(), channels.pop())
    try:  # through text and back: a configuration's own rules are checked when it is read
        return type(resized).from_dict(json.loads(resized.to_json_string()))
    except (ValueError, StrictDataclassError):
        return unpruned


def _resized(config: Any, heads: int, channels: int) -> Any:
    """Return a configuration with other numbers of units, as far as it can say them; the width of a head stays."""
    family, width = FAMILIES[config.model_type], spans(config)
    resized = copy.deepcopy(config)
    setattr(resized, family.channels_key, channels)
    for key, each in family.heads_keys.items():
        setattr(resized, key, heads * width[each])
    if family.heads_keys:
        resized.head_dim = width["key_rows"]
    return resized


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        save_file(dict(tensors), partial, metadata={"format": "pt"})
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _write_adapter(model: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict  # noqa: PLC0415 - takes seconds to import

    folder.mkdir()
    name = model.active_adapter
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    _write_tensors(folder / "adapter_model.safetensors", {key: value.contiguous() for key, value in tensors.items()})
    model.peft_config[name].save_pretrained(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
