"""Tiny causal models of the families that HAT splits, on disk, and the whole model to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from fl_edge.seeding import torch_rng
from tests.tiny_transformers import VOCABULARY, make_model

CPU = torch.device("cpu")
WINDOW = 5
_SLIDING: Mapping[str, Any] = {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 3}
# Family and changes of its configuration; all have grouped queries, and qwen3 heads of a width of their own.
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, windows": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows from layer 3": ("qwen2", _SLIDING),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3, windows from layer 3": ("qwen3", _SLIDING),
}
ONE_OF_EACH = ("llama", "mistral, windows", "qwen2", "qwen3")


def save_model(
    folder: Path,
    model: str = "llama",
    layers: int = 6,
    dtype: torch.dtype = torch.float64,
    sharded: bool = False,
    **more: Any,
) -> Path:
    """One of MODELS with drawn weights, hidden width 32, vocabulary 64, as save_pretrained writes it."""
    family, changes = MODELS[model]
    settings: dict[str, Any] = {"num_hidden_layers": layers, "max_position_embeddings": 256, **changes, **more}
    size = "40KB" if sharded else "1GB"
    make_model(family, "causal", **settings).to(dtype).save_pretrained(folder, max_shard_size=size)
    return folder


def load_whole(folder: Path) -> Any:
    """The unsplit model as transformers loads it, frozen, in the type of its files."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.eval().requires_grad_(False)


def draw_tokens(sequences: int = 1, length: int = 12, seed: int = 1) -> Tensor:
    """(sequences, length) int64."""
    return torch.randint(2, VOCABULARY, (sequences, length), generator=torch_rng(seed, "tokens", sequences, length))
