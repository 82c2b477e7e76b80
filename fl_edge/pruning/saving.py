"""Pruned models on disk: safetensors, configuration, plan and LoRA adapter in one folder that loads with one call.

The folder is an ordinary Hugging Face one plus ``plan.json``, which is removed first and written last: without it a
folder is not a pruned model, so a save that was cut short never looks whole. Where the configuration can express the
plan (layers alike, no bias that the architecture lacks), plain ``from_pretrained`` loads the folder as well; elsewhere
the configuration has other widths than the tensors, so that plain ``from_pretrained`` stops at one of them instead of
loading something else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fl_edge.errors import ConfigError, RunFolderError
from fl_edge.files import write_whole
from fl_edge.pruning.configuration import written
from fl_edge.pruning.plan import PruningPlan
from fl_edge.pruning.slicing import prune
from fl_edge.pruning.units import of_adapter, plain

PLAN, WEIGHTS, INDEX, ADAPTER = "plan.json", "model.safetensors", "model.safetensors.index.json", "adapter"
CONFIG, GENERATION = "config.json", "generation_config.json"


def save_pruned(model: nn.Module, plan: PruningPlan, folder: Path, tokenizer: Any = None) -> None:
    """Write a pruned model so that :func:`~fl_edge.pruning.load_pruned` gives it back to the bit.

    A bias that pruning has added to an output map, where the architecture has none, is kept.

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
    base: Any = plain(model)
    if any(getattr(module, "merged", False) for module in base.modules()):
        raise ConfigError("the adapter is merged into the weights; call unmerge_adapter() before saving")
    if base is model and any(of_adapter(name) for name, _ in model.named_parameters()):
        raise ConfigError("the model holds adapters without being a PeftModel; detach them, or save a PeftModel")
    weights = _weights(base)
    config = written(base, plan, {name: tuple(tensor.shape) for name, tensor in weights.items()}, base.dtype)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_model(folder)
        write_tensors(folder / WEIGHTS, weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if base is not model:
            _write_adapter(model, folder / ADAPTER)
        if getattr(base, "generation_config", None) is not None:
            write_whole(folder / GENERATION, base.generation_config.to_json_string())
        write_whole(folder / CONFIG, config.to_json_string())
        write_plan(folder, plan, {WEIGHTS: sha256_of(folder / WEIGHTS)})


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a full disk or a read-only folder raises into one line.

    Raises
    ------
    RunFolderError
        The folder cannot be written.
    """
    try:
        yield
    except Exception as error:  # on a full disk safetensors raises a class of its own, tokenizers a bare Exception
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise RunFolderError(f"cannot write {folder}: {getattr(error, 'strerror', None) or line_of(error)}") from None


def remove_model(folder: Path) -> None:
    """Remove the model in a folder, the plan first; tokenizers and whatever else lies there stay."""
    try:
        shards = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no shards, or nothing that says which
        shards = set()
    inside = (name for name in shards if isinstance(name, str) and name == Path(name).name)
    for name in (PLAN, CONFIG, GENERATION, INDEX, WEIGHTS, *inside):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        save_file(dict(tensors), partial, metadata={"format": "pt"})
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_plan(folder: Path, plan: PruningPlan, sha256: Mapping[str, str]) -> None:
    """Write the plan and the digests of the files of weights: with it the folder is a pruned model."""
    record = {"plan": plan.to_record(), "weights_sha256": dict(sha256)}
    write_whole(folder / PLAN, json.dumps(record, indent=1) + "\n")


def sha256_of(file: Path) -> str:
    """Return the digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def line_of(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _write_adapter(model: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict  # noqa: PLC0415 - takes seconds to import

    folder.mkdir()
    name = model.active_adapter
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    write_tensors(folder / "adapter_model.safetensors", {key: value.contiguous() for key, value in tensors.items()})
    model.peft_config[name].save_pretrained(folder)


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
