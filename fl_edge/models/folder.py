"""The folder of a causal language model: configuration, the model without memory, and its tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fl_edge.errors import DataError
from fl_edge.models.shards import Shards
from fl_edge.models.skeleton import CONFIG, build_skeleton, read_config
from fl_edge.pruning.units import find_blocks

_ROWS = 4096  # of two tensors that are compared at once


class ModelFolder:
    """A folder of Hugging Face, opened: nothing but buffers is in memory until it is asked for.

    The folder is never written to, nothing is unpickled, and no code of the folder runs.

    Parameters
    ----------
    folder
        ``config.json`` with ``model.safetensors`` or its shards and index.
    device
        Where tensors shall be.
    dtype
        What the model computes in; by default the type that most numbers in the files have.

    Attributes
    ----------
    path, device, dtype
        As given, or found.
    config
        The model's configuration.
    shards
        Its files.
    skeleton
        The model: parameters on the meta device, buffers on ``device``, evaluation mode.
    blocks, block_path
        Its decoder layers, and the name of their list in the model.
    stored
        Parameter of the model -> its name in the files, which may be that of the parameter it is tied to.

    Raises
    ------
    ConfigError
        An architecture that is unknown or is no causal decoder.
    DataError
        A folder without a model, a damaged, missing or quantised file, or files that do not fit the configuration.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.path, self.device = folder, device
        self.config = read_config(folder)
        self.shards = Shards(folder)
        self.dtype = dtype or self.shards.dtype
        self.skeleton: Any = build_skeleton(self.config, folder, device, self.dtype)
        if any(self._differ(*pair) for pair in self.skeleton.all_tied_weights_keys.items()):  # then they are not tied
            self.config.tie_word_embeddings = False
            self.skeleton = build_skeleton(self.config, folder, device, self.dtype)
        self.block_path, self.blocks = find_blocks(self.skeleton)
        self.stored: Mapping[str, str] = self._match()

    def tensor(self, name: str, rows: Tensor | slice | None = None) -> Tensor:
        """Return a parameter of the model, or of it the given rows; see :meth:`Shards.read`."""
        return self.shards.read(self.stored[name], self.device, self.dtype, rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter, without reading it."""
        return self.shards.tensors[self.stored[name]].shape

    def names(self, module: nn.Module) -> frozenset[str]:
        """Return what the parameters of a module of the skeleton are called in the model."""
        path = next(path for path, found in self.skeleton.named_modules() if found is module)
        return frozenset(f"{path}.{name}" for name in module.state_dict())

    def fill(self, module: nn.Module, path: str) -> None:
        """Read the parameters of a module, which stands at ``path`` in the model, into it."""
        module.load_state_dict({name: self.tensor(f"{path}.{name}") for name in module.state_dict()}, assign=True)

    def _match(self) -> dict[str, str]:
        tied: dict[str, str] = dict(self.skeleton.all_tied_weights_keys)
        partner = tied | {source: target for target, source in tied.items()}
        matched = {}
        for name, tensor in self.skeleton.state_dict().items():
            found = next((key for key in (name, partner.get(name)) if key in self.shards.tensors), None)
            if found is None:
                raise DataError(f"{self.path} has no tensor {name}, which its {CONFIG} asks for")
            stored = self.shards.tensors[found]
            if stored.shape != tuple(tensor.shape):
                wanted = f"its {CONFIG} asks for {tuple(tensor.shape)}"
                raise DataError(f"{stored.file} has {stored.shape} for {found}, {wanted}")
            _ = stored.dtype  # raises where it is not one to compute with
            matched[name] = found
        return matched

    def _differ(self, name: str, other: str) -> bool:
        """Return whether the files hold two tensors, and not the same twice."""
        if not self.shards.tensors.keys() >= {name, other}:
            return False
        count = self.shards.tensors[name].shape[0]
        pieces = (slice(first, min(first + _ROWS, count)) for first in range(0, count, _ROWS))
        read = partial(self.shards.read, device=self.device, dtype=self.dtype)
        return not all(torch.equal(read(name, rows=rows), read(other, rows=rows)) for rows in pieces)
