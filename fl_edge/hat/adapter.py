"""The adapter, which stands in for the middle submodel on the device: what drafts are made with.

One pre-norm self-attention block with a residual, no feed-forward part, and one output norm. Source: the paper's number
of trained weights is exactly that of Kangaroo's adapter, which is this block; grouped queries are *ours*. It attends to
everything before, also where layers of the model look through a window (*ours*).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from fl_edge.hat.caches import new_cache
from fl_edge.hat.fitted import fill_fitted, read_fitted, save_fitted
from fl_edge.hat.split import DeviceModel
from fl_edge.hat.trees import tree_attention

_WHAT = "an adapter"


class Adapter(nn.Module):
    """Shallow hidden states in, features for the LM head out; nothing else comes after but the head.

    Attention, norms, positions, heads and key/value heads are the base model's own.

    Parameters
    ----------
    config
        Of the base model, whole or cut.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        build: Any = transformers.AutoModel.from_config
        with torch.device("meta"):  # for its classes
            model = build(_single(config), attn_implementation="sdpa")
        self.config, layer = model.config, model.layers[0]
        width, epsilon = self.config.hidden_size, self.config.rms_norm_eps
        self.input_norm: nn.Module = type(layer.input_layernorm)(width, eps=epsilon)
        self.attention: nn.Module = type(layer.self_attn)(self.config, layer_idx=0)
        self.output_norm: nn.Module = type(model.norm)(width, eps=epsilon)
        # in a tuple, where a change of the adapter's type does not round its frequencies
        self._rotary = (type(model.rotary_emb)(self.config),)

    def new_cache(self) -> DynamicCache:
        """Return an empty cache of the adapter; see :mod:`fl_edge.hat.caches`."""
        return new_cache()

    def forward(
        self, states: Tensor, cache: DynamicCache | None = None, parents: Sequence[int] | None = None
    ) -> Tensor:
        """Return the features, which play the role of the normed last hidden states.

        Parameters
        ----------
        states
            (b, n, d): hidden states after the last shallow layer, at the positions after those in the cache.
        cache
            What was before, of the same b sequences; the states are added to it, and no autograd graph is built. None:
            nothing was, nothing is kept.
        parents
            Of a draft tree, as in :meth:`fl_edge.hat.split.DeviceModel.embed_and_run`.

        Returns
        -------
        Tensor
            (b, n, d).
        """
        from transformers.masking_utils import create_causal_mask  # noqa: PLC0415 - slow, and many only import this module

        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):
            first, count = 0 if cache is None else cache.get_seq_length(), states.shape[1]
            if parents is None:
                positions = torch.arange(first, first + count, device=states.device)[None]
                mask = create_causal_mask(self.config, states, None, cache, positions)
            else:
                before = first - (len(parents) - count)
                tree = tree_attention(self.config, parents, count, before, states.device, states.dtype)
                positions, mask = tree["position_ids"], tree["attention_mask"]
                mask = mask["full_attention"] if isinstance(mask, dict) else mask
            (rotary,) = self._rotary
            leaving, _ = self.attention(
                hidden_states=self.input_norm(states),
                position_embeddings=rotary.to(states.device)(states, positions),
                attention_mask=mask,
                cache=cache,
            )
            features: Tensor = self.output_norm(states + leaving)
            return features


def new_adapter(device: DeviceModel, generator: torch.Generator) -> Adapter:
    """Return an adapter to be trained, in float32, where the device model is.

    Its output norm begins as the model's final norm, whose place it takes; the rest is drawn as the model's weights
    were. *Ours*: on the small Llama it agreed no worse after 300 steps than all drawn, at three learning rates, and the
    attention of the last shallow layer as a start was no gain.

    Parameters
    ----------
    device
        The model that it is for.
    generator
        On the CPU.
    """
    adapter = Adapter(device.config)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, adapter.config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    adapter.output_norm.load_state_dict(device.norm.state_dict())
    return adapter.to(device.device)


def save_adapter(adapter: Adapter, device: DeviceModel, file: Path) -> None:
    """Write an adapter and what it fits, as safetensors with that as metadata, whole or not at all.

    Raises
    ------
    RunFolderError
        The file cannot be written.
    """
    save_fitted(adapter, device, file)


def load_adapter(file: Path, device: DeviceModel) -> Adapter:
    """Return an adapter to draft with: frozen, where the device model is and of its type.

    Raises
    ------
    DataError
        No adapter there, a damaged one, or one for another model or another cut of it.
    """
    adapter, tensors = Adapter(device.config), read_fitted(file, device, _WHAT)
    fill_fitted(adapter, tensors, device, file, _WHAT)
    return adapter


def _single(config: Any) -> Any:
    """Copy a configuration, with one layer and no window."""
    single = copy.deepcopy(config)
    single.num_hidden_layers, single.sliding_window = 1, None
    if getattr(single, "layer_types", None):
        single.layer_types = ["full_attention"]
    return single
