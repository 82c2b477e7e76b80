"""Checkpoints of random weights in the shapes of known models: nothing to download, memory and time are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fl_edge.files import write_whole
from fl_edge.seeding import numpy_rng, torch_rng

SCALE = 0.02
# All numbers are windows of so many: a prime, so that no two rows of a matrix begin at the same one.
_POOL = 2**22 - 3


def _decoder(kind: str, layers: int, width: int, channels: int, heads: int, groups: int, words: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": channels, "vocab_size": words}
    tied = kind == "qwen2"
    return {
        "model_type": kind,
        **sizes,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": _decoder("llama", 3, 32, 56, 4, 2, 128),
    "tinyllama-1.1b": _decoder("llama", 22, 2048, 5632, 32, 4, 32000),
    "llama-2-7b": _decoder("llama", 32, 4096, 11008, 32, 32, 32000),
}


def make_checkpoint(
    folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, layers: int | None = None
) -> None:
    """Write a checkpoint of random weights, one shard a layer and one for the rest, with never more than one in memory.

    Norms are ones; everything else is normal of standard deviation 0.02. Normal numbers are drawn once, and every
    matrix reads them from an offset of its own, round and round: matrices are of full rank and differ, but are no
    independent draws.

    Parameters
    ----------
    folder
        Made where needed. ``config.json`` and the index come last.
    shape
        A key of :data:`SHAPES`.
    layers
        How many, instead of the shape's.
    """
    import transformers
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    settings = dict(SHAPES[shape]) | ({} if layers is None else {"num_hidden_layers": layers})
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), dtype=dtype, **settings)
    build: Any = transformers.AutoModelForCausalLM.from_config
    with init_empty_weights(include_buffers=False):
        model = build(config)
    config.architectures = [type(model).__name__]
    tied = model.all_tied_weights_keys
    sizes = {name: tuple(found.shape) for name, found in model.state_dict().items() if name not in tied}
    shards = list(_split(sizes))
    pool = (torch.randn(_POOL, generator=torch_rng(seed, "weights", shape)) * SCALE).to(dtype)
    rng = numpy_rng(seed, "offsets", shape)
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: _draw(name, sizes[name], pool, rng) for name in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = pool.itemsize * sum(torch.Size(size).numel() for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    write_whole(folder / "config.json", config.to_json_string())


def _split(sizes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Group names by layer, what belongs to none first."""
    groups: dict[str, list[str]] = {"": []}
    for name in sizes:
        before, _, after = name.partition(".layers.")
        groups.setdefault(f"{before}.{after.split('.')[0]}" if after else "", []).append(name)
    yield from groups.values()


def _draw(name: str, size: tuple[int, ...], pool: Tensor, rng: np.random.Generator) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(size, dtype=pool.dtype)
    drawn = torch.empty(size, dtype=pool.dtype)
    flat, filled, start = drawn.view(-1), 0, int(rng.integers(len(pool)))
    while filled < len(flat):
        piece = pool[start : start + len(flat) - filled]
        flat[filled : filled + len(piece)] = piece
        filled, start = filled + len(piece), 0
    return drawn
