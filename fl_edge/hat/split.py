"""The three-way split of a causal language model: input and output submodel on the device, the middle in the cloud.

Input submodel: embedding and the first decoder layers. Middle submodel: all other decoder layers. Output submodel: LM
head. This cut is HAT's; that the final norm stands with the head is *ours*, so hidden states travel as the last layer
gives them. Each part reads only its own tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fl_edge.errors import ConfigError
from fl_edge.hat.caches import new_cache
from fl_edge.hat.trees import tree_attention
from fl_edge.models.folder import ModelFolder

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_GROWING = ("dynamic", "longrope")  # their tables depend on the longest request so far, which parts and requests share
_SHARE = 16
_SAMPLE = 64  # rows of a tensor, at least where it has as many


def default_shallow(layers: int) -> int:
    """Return how many decoder layers a device keeps: a sixteenth, rounded up.

    The paper has 2 of 32 and 3 of 40; the rule through both is *ours*.
    """
    return math.ceil(layers / _SHARE)


class DeviceModel(nn.Module):
    """Input and output submodel: frozen, in evaluation mode, without an autograd graph.

    Attributes
    ----------
    body
        The model's own base class with the first layers and no norm.
    norm, lm_head
        The output submodel.
    config
        The model's configuration, cut to the layers that are here.
    shallow
        Layers that are here.
    identity
        What an adapter must fit: family, layers in all, shallow ones, hidden width, vocabulary, and a digest of
        samples of the weights that holds for copies of them in other types.
    bytes_read
        Bytes of tensors that loading has read.
    """

    def __init__(self, body: Any, norm: nn.Module, lm_head: nn.Linear, identity: dict[str, Any], read: int) -> None:
        super().__init__()
        self.body, self.norm, self.lm_head = body, norm, lm_head
        self.config = body.config
        self.shallow: int = self.config.num_hidden_layers
        self.identity, self.bytes_read = identity, read
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.lm_head.weight.dtype

    def new_cache(self) -> DynamicCache:
        """Return an empty cache of the input submodel; see :mod:`fl_edge.hat.caches`."""
        return new_cache()

    @torch.no_grad()
    def embed_and_run(
        self, tokens: Tensor, cache: DynamicCache | None = None, parents: Sequence[int] | None = None
    ) -> Tensor:
        """Run the input submodel.

        Parameters
        ----------
        tokens
            (b, n) int64, at the positions after those in the cache.
        cache
            What was before, of the same b sequences; the tokens are added to it. None: nothing was, nothing is kept.
        parents
            Of a draft tree, as in an :class:`~fl_edge.hat.messages.Upload`: of its newest rows, which these tokens are,
            and of those that are in the cache already. None: each token follows the one before it.

        Returns
        -------
        Tensor
            (b, n, d): hidden states after the last shallow layer.
        """
        tree: dict[str, Any] = {}
        if parents is not None:
            count = tokens.shape[1]
            before = (0 if cache is None else cache.get_seq_length()) - (len(parents) - count)
            tree = tree_attention(self.config, parents, count, before, self.device, self.dtype)
        found = self.body(input_ids=tokens, cache=cache, use_cache=cache is not None, **tree)
        states: Tensor = found.last_hidden_state
        return states

    @torch.no_grad()
    def head(self, rows: Tensor) -> Tensor:
        """Return the full model's logits (..., v) of hidden states (..., d) as the middle submodel gives them."""
        logits: Tensor = self.lm_head(self.norm(rows))
        return logits

    @torch.no_grad()
    def draft_head(self, features: Tensor) -> Tensor:
        """Return logits (..., v) of an adapter's features (..., d), which need no norm."""
        logits: Tensor = self.lm_head(features)
        return logits


class MiddleModel(nn.Module):
    """Middle submodel: frozen, in evaluation mode, without an autograd graph.

    Attributes
    ----------
    body
        The model's own base class with the deep layers, numbered from 0, and neither embedding nor norm. Its attention
        is that of ``config``; another one is set with ``body.set_attn_implementation``.
    config
        The model's configuration, cut to the layers that are here.
    shallow
        Layers that are not here.
    bytes_read
        Bytes of tensors that loading has read.
    """

    def __init__(self, body: Any, shallow: int, read: int) -> None:
        super().__init__()
        self.body, self.config = body, body.config
        self.shallow, self.bytes_read = shallow, read
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    @torch.no_grad()
    def forward(
        self, states: Tensor, cache: DynamicCache | None = None, positions: Tensor | None = None, **attention: Any
    ) -> Tensor:
        """Run the deep layers.

        Parameters
        ----------
        states
            (b, n, d): hidden states after the last shallow layer.
        cache
            What was before, of the same b sequences; the rows are added to it. None: nothing was, nothing is kept.
        positions
            (b, n) or (1, n) int64; None: those after the ones in the cache.
        attention
            Handed to the model: a mask, or what an attention of one's own takes.

        Returns
        -------
        Tensor
            (b, n, d): hidden states after the last layer, before the final norm.
        """
        found = self.body(
            inputs_embeds=states,
            cache=cache,
            position_ids=positions,
            use_cache=cache is not None,
            **attention,
        )
        rows: Tensor = found.last_hidden_state
        return rows


def load_device(folder: Path, shallow: int, device: torch.device, dtype: torch.dtype | None = None) -> DeviceModel:
    """Read what a device holds: embedding, shallow layers, final norm and head; a head that is tied is not read again.

    Parameters
    ----------
    folder
        Of ``save_pretrained``, see :class:`~fl_edge.models.folder.ModelFolder`.
    shallow
        Decoder layers on the device; 0 for :func:`default_shallow`.
    device, dtype
        Where and in what it computes; by default in the type of the files.

    Raises
    ------
    ConfigError
        An architecture that cannot be split, or a cut that leaves no middle.
    DataError
        A folder without a model, or files that are damaged or do not fit its configuration.
    """
    opened, shallow = _open(folder, shallow, device, dtype)
    identity = _identity(opened, shallow)
    base, model = opened.skeleton.base_model_prefix, opened.skeleton
    body, norm = model.base_model, model.base_model.norm
    _keep(opened, range(shallow))
    opened.fill(body.embed_tokens, f"{base}.embed_tokens")
    opened.fill(norm, f"{base}.norm")
    if opened.stored["lm_head.weight"] == opened.stored[f"{base}.embed_tokens.weight"]:
        model.lm_head.weight = body.embed_tokens.weight
    else:
        opened.fill(model.lm_head, "lm_head")
    return DeviceModel(body, norm, model.lm_head, identity, opened.shards.bytes_read)


def load_middle(folder: Path, shallow: int, device: torch.device, dtype: torch.dtype | None = None) -> MiddleModel:
    """Read what the cloud holds: the layers after the shallow ones. Parameters and errors as :func:`load_device`."""
    opened, shallow = _open(folder, shallow, device, dtype)
    body = opened.skeleton.base_model
    _keep(opened, range(shallow, opened.config.num_hidden_layers))
    body.embed_tokens = None
    return MiddleModel(body, shallow, opened.shards.bytes_read)


def identify(folder: Path, shallow: int) -> dict[str, Any]:
    """Return what tells a device's part of one model and cut from others', see :class:`DeviceModel`."""
    return _identity(*_open(folder, shallow, torch.device("cpu"), None))


def _identity(opened: ModelFolder, shallow: int) -> dict[str, Any]:
    sampled = ["lm_head.weight", f"{opened.skeleton.base_model_prefix}.norm.weight"]
    sampled += [f"{opened.block_path}.{layer}.self_attn.o_proj.weight" for layer in range(shallow)]
    return {
        "family": opened.config.model_type,
        "layers": opened.config.num_hidden_layers,
        "shallow": shallow,
        "width": opened.config.hidden_size,
        "vocabulary": opened.config.vocab_size,
        "weights": _digest(opened, sampled),
    }


def _open(folder: Path, shallow: int, device: torch.device, dtype: torch.dtype | None) -> tuple[ModelFolder, int]:
    opened = ModelFolder(folder, device, dtype)
    config = opened.config
    if config.model_type not in FAMILIES:
        raise ConfigError(f"{folder} has the architecture {config.model_type!r}; HAT splits {', '.join(FAMILIES)}")
    rope = config.rope_parameters["rope_type"]
    if rope in _GROWING:
        raise ConfigError(f"{folder} has {rope!r} position embeddings, which change with the length of other requests")
    layers: int = config.num_hidden_layers
    chosen = shallow or default_shallow(layers)
    if not 1 <= chosen < layers:
        allowed = f"1 to {layers - 1}" if layers > 1 else "none, since there is no middle"
        raise ConfigError(
            f"shallow layers {chosen} are not allowed for {folder} with {layers} layers; allowed: {allowed}"
        )
    return opened, chosen


def _keep(opened: ModelFolder, kept: Sequence[int]) -> None:
    """Cut the skeleton's base model to some layers, and read those."""
    body, config = opened.skeleton.base_model, opened.config
    body.layers = nn.ModuleList(opened.blocks[layer] for layer in kept)
    body.norm = nn.Identity()
    for number, (layer, block) in enumerate(zip(kept, body.layers, strict=True)):
        opened.fill(block, f"{opened.block_path}.{layer}")
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # the place in a cache
                module.layer_idx = number
    # all modules of the skeleton hold this object, which nobody else has
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]


def _digest(opened: ModelFolder, names: Sequence[str]) -> str:
    """Hash rows of tensors, rounded to bfloat16, from the files: what a device computes in makes no difference."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        count = opened.shape(name)[0]
        rows = torch.arange(0, count, max(1, count // _SAMPLE))
        found = opened.shards.read(opened.stored[name], torch.device("cpu"), torch.float32, rows)
        digest.update(found.bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
