"""Checkpoints: weights as safetensors and a plain record as its metadata, one file a round, written whole.

Flower cannot resume a run, so a strategy keeps all that its next round depends on. One file holds both weights and
record, so the two can never be of different rounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fl_edge.errors import RunFolderError
from fl_edge.files import write_whole

_KEPT = 2  # the newest, and the one before it in case the newest cannot be read


@dataclass(frozen=True)
class Checkpoint:
    """What was kept of one round."""

    server_round: int
    weights: dict[str, Tensor]
    record: dict[str, Any]


def save_checkpoint(folder: Path, server_round: int, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a round into a folder and remove all but the newest two.

    Raises
    ------
    RunFolderError
        The folder cannot be written; the checkpoints before are still there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot make {folder}: {error.strerror}") from None
    file = folder / f"round-{server_round:06d}.safetensors"
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    write_whole(file, save(tensors, metadata={"record": json.dumps(record), "round": str(server_round)}))
    for old in sorted(folder.glob("round-*.safetensors"))[:-_KEPT]:
        old.unlink(missing_ok=True)
    return file


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that can be read, or nothing when there is none.

    Raises
    ------
    RunFolderError
        There are checkpoints and none can be read.
    """
    files = sorted(folder.glob("round-*.safetensors"), reverse=True)
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as stored:
                metadata = stored.metadata()
                weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
            return Checkpoint(int(metadata["round"]), weights, json.loads(metadata["record"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            continue
    if files:
        raise RunFolderError(f"no checkpoint in {folder} can be read; the newest is {files[0].name}")
    return None
