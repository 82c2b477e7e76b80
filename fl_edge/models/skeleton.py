"""A causal language model without memory, built from its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from fl_edge.errors import ConfigError, DataError
from fl_edge.pruning.architectures import FAMILIES
from fl_edge.pruning.units import find_blocks

CONFIG = "config.json"
# What transformers raises for settings that make no model, by where it first notices.
_NONSENSE = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError, StrictDataclassError)


def read_config(folder: Path) -> Any:
    """Return the configuration of the model in a folder.

    Raises
    ------
    ConfigError
        An architecture that is unknown or has no causal decoder.
    DataError
        No configuration, a damaged one, or one of a quantised model.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise DataError(f"{folder} is not the folder of a model: it has no {CONFIG}")
    try:
        record = json.loads(file.read_bytes())
        kind, quantised = record["model_type"], record.get("quantization_config")
        known = kind in FAMILIES
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is damaged: {_line(error)}") from None
    if not known:
        raise ConfigError(f"{file} has the architecture {kind!r}; known are {', '.join(sorted(FAMILIES))}")
    if quantised is not None:
        raise DataError(f"{file} is of a quantised model; give the one that it was made from")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, *_NONSENSE) as error:
        raise DataError(f"{file} is damaged: {_line(error)}") from None
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{file}: {kind!r} has no causal decoder")
    return config


def build_skeleton(config: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Build a causal model without memory: frozen, in evaluation mode, and with buffers, which no file holds, for real.

    Raises
    ------
    ConfigError
        A model whose blocks see what follows, such as an encoder.
    DataError
        A configuration that makes no model.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]  # noqa: PLC0415 - heavy

    build: Any = transformers.AutoModelForCausalLM.from_config
    try:
        with init_empty_weights(include_buffers=False):
            model = build(config, dtype=dtype, attn_implementation="sdpa")
        _, blocks = find_blocks(model)
    except (ConfigError, *_NONSENSE) as error:
        raise DataError(f"{folder / CONFIG} makes no model: {_line(error)}") from None
    if not any(getattr(module, "is_causal", False) for module in blocks.modules()):
        raise ConfigError(f"{folder / CONFIG}: {config.model_type!r} is an encoder here, not a causal decoder")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model.eval().requires_grad_(False)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
