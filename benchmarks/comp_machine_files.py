"""Checkpoints of random weights for :mod:`benchmarks.comp_machine`, in folders that go when the process ends."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.comp_shapes import SHAPES, make_checkpoint
from fl_edge.pruning import read_plan

_folders: list[tempfile.TemporaryDirectory[str]] = []
_SPARE = 2.1  # times the model: it, what is pruned of it, and where the run stands


def room() -> Path:
    """Return where large files go: TMPDIR where it is set, since /tmp may lie in memory, else beside the results."""
    folder = Path(os.environ.get("TMPDIR") or Path(__file__).resolve().parent / "results" / "partial")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def size_of(shape: str, layers: int) -> int:
    """Return the parameters of a shape with so many layers, norms and biases left out."""
    s = SHAPES[shape]
    width, groups = s["hidden_size"], s["num_key_value_heads"] / s["num_attention_heads"]
    layer = width * (2 * width * (1 + groups) + 3 * s["intermediate_size"])
    return int(layers * layer + width * s["vocab_size"] * (1 if s["tie_word_embeddings"] else 2))


@functools.cache
def checkpoint(shape: str, layers: int) -> Path:
    """Return a checkpoint in bfloat16, made once a process.

    Raises
    ------
    SystemExit
        The disk has no space for it and for what is pruned of it.
    """
    needed, free = _SPARE * 2 * size_of(shape, layers), shutil.disk_usage(room()).free
    if free < needed:
        raise SystemExit(f"{room()} needs {needed / 1e9:.0f} GB and has {free / 1e9:.0f} GB free; set TMPDIR elsewhere")
    folder = _new()
    make_checkpoint(folder, shape, torch.bfloat16, layers=layers)
    return folder


@contextmanager
def place_for_output() -> Iterator[Path]:
    """Yield a folder that is not there yet, and remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix="fl_edge-comp-", dir=room()) as folder:
        yield Path(folder) / "pruned"


def check_output(folder: Path) -> int:
    """Return how many layers a pruned folder has, after a look at its plan and at one layer's tensors.

    Raises
    ------
    RuntimeError
        They do not agree, or some number is not finite.
    """
    plan = read_plan(folder)
    kept = plan.layers_kept
    position = len(kept) // 2
    layer = plan.layers[kept[position]]
    name = f"model.layers.{position}.mlp.down_proj.weight"
    places = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    with safe_open(folder / places[name], "pt") as file:
        weight = file.get_tensor(name)
    if weight.shape[1] != len(layer.channels) or not bool(torch.isfinite(weight).all()):
        raise RuntimeError(f"{folder}: layer {position} is not as the plan says: {tuple(weight.shape)}")
    return len(kept)


def _new() -> Path:
    _folders.append(tempfile.TemporaryDirectory(prefix="fl_edge-comp-", dir=room()))
    return Path(_folders[-1].name)
