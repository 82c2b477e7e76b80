"""The folder that a pruned model is written into, layer by layer."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.errors import ConfigError, RunFolderError
from fl_edge.pruning import PruningPlan, ShardWriter, prune
from fl_edge.pruning.saving import writing
from fl_edge.pruning.units import find_blocks

_OUTSIDE = "outside"


class Output:
    """A pruned model being written.

    Parameters
    ----------
    checkpoint
        The unpruned model.
    folder
        Made where needed.

    Raises
    ------
    RunFolderError
        The folder cannot be made, or it holds a model that is not a pruned one.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self._checkpoint, self.folder = checkpoint, folder
        self._path, _ = find_blocks(checkpoint.skeleton)
        for left in folder.glob(".*.partial"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self._writer = ShardWriter(folder)

    def layer(self, position: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a layer; ``position`` counts those that stay, tensors have their names in the layer.

        Raises
        ------
        RunFolderError
            The disk is full or read-only.
        """
        named = {f"{self._path}.{position}.{name}": tensor for name, tensor in tensors.items()}
        self._writer.write(f"layer-{position:04d}", named)

    def outside(self) -> int:
        """Write what is outside the layers, piece by piece; return the parameters that the model then has.

        Raises
        ------
        RunFolderError
            The disk is full or read-only.
        """
        if not self._writer.has(_OUTSIDE):
            layout = {name: (self._checkpoint.dtype, shape) for name, shape in self._checkpoint.outside.items()}
            self._writer.write_pieces(_OUTSIDE, layout, self._checkpoint.pieces)
        return self._writer.parameters

    def finish(self, plan: PruningPlan) -> None:
        """Make a model of what was written; raises what :meth:`~fl_edge.pruning.ShardWriter.finish` does."""
        sliced = copy.deepcopy(self._checkpoint.skeleton)
        prune(sliced, plan)
        self._writer.finish(sliced, plan, self._checkpoint.folder)

    def discard(self) -> None:
        """Remove what was written."""
        self._writer.discard()


def apart(model: Path, out: Path) -> None:
    """Refuse to write into the folder of the model.

    Raises
    ------
    ConfigError
        ``out`` is that folder or lies in it.
    """
    if out.resolve().is_relative_to(model.resolve()):
        raise ConfigError(f"{out} is or lies in the folder of the model, which is never written to; choose another")


def space_for(folder: Path, needed: float) -> None:
    """Refuse to begin what the disk has no space for.

    Raises
    ------
    RunFolderError
        Fewer bytes are free than needed.
    """
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    with writing(folder):
        free = shutil.disk_usage(there).free
    if free < needed:
        raise RunFolderError(f"{folder} needs {_readable(needed)} and its disk has {_readable(free)} free")


def parameters(model: Any) -> int:
    """Return the parameters of a model, tied ones once, on the meta device too."""
    return sum(tensor.numel() for tensor in _untied(model))


def _untied(model: Any) -> Iterator[nn.Parameter]:
    for name, parameter in model.named_parameters():
        if name not in model.all_tied_weights_keys:
            yield parameter


def _readable(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
