"""Tiny checkpoints on disk, calibration tokens, and COMP in memory as a reference for what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.config import CompConfig
from fl_edge.comp.course import Progress, prune_layers
from fl_edge.comp.local import TextSource
from fl_edge.comp.outline import Sizes, draw_outline
from fl_edge.comp.run import Result, prune_checkpoint
from fl_edge.comp.state import run_key
from fl_edge.comp.workbench import Workbench
from fl_edge.pruning import prune
from fl_edge.pruning.units import find_blocks
from fl_edge.seeding import torch_rng
from tests.tiny_transformers import VOCABULARY, make_model

CPU = torch.device("cpu")
LAYERS = 6
# Tests do not move with the defaults.
PINNED: dict[str, Any] = {
    "ratio": 0.4,
    "layer_share": 0.5,
    "layer_rule": "similarity",
    "iterative_layers": False,
    "repair": False,
    "protect_first": 2,
    "protect_last": 1,
    "allocation": "importance",
    "alpha": 1.0,
    "max_layer_ratio": 0.8,
    "prune_attention": True,
    "score": "conditioning",
    "restore": "mask",
    "target": "dense",
    "bias": False,
    "damping": 1e-3,
    "steps": 10,
    "max_variance": 100.0,
    "block": 2048,
}
WIDE = 96  # channels, so that units are small against one percent


def checkpoint_of(folder: Path, family: str = "llama", **changes: Any) -> Path:
    width = {"ffn_dim" if family == "opt" else "intermediate_size": WIDE}
    model = make_model(family, "causal", **{"num_hidden_layers": LAYERS, **width, **changes})
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def draw_tokens(sequences: int = 8, length: int = 16) -> Tensor:
    return torch.randint(2, VOCABULARY, (sequences, length), generator=torch_rng(1, "calibration", sequences, length))


def config(**changes: Any) -> CompConfig:
    return CompConfig(**{**PINNED, **changes})


def source_of(tokens: Tensor, settings: CompConfig) -> Callable[[Workbench], TextSource]:
    return lambda bench: TextSource(bench, tokens, settings.target)


def run(model: Path, out: Path, settings: CompConfig, tokens: Tensor, **more: Any) -> Result:
    key = run_key(model, settings, tokens)
    return prune_checkpoint(model, out, settings, source_of(tokens, settings), key=key, device=CPU, **more)


def in_memory(folder: Path, settings: CompConfig, tokens: Tensor) -> Any:
    """The same steps, with their tensors put into transformers' own whole model, sliced in memory."""
    bench = Workbench(Checkpoint(folder, CPU))
    sizes, source, progress = Sizes(bench), TextSource(bench, tokens, settings.target), Progress()
    outline = draw_outline(settings, sizes, bench, source)
    source.begin()
    steps = prune_layers(settings, outline, sizes, bench, source, progress)
    written = [tensors for _, tensors in steps if tensors]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prune(model, replace(bench.full, layers=tuple(progress.layers)))
    for block, tensors in zip(find_blocks(model)[1], written, strict=True):
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, nn.Parameter(tensor))
    return model


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, but for the record, which says how long it took."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "comp.json"
    }
