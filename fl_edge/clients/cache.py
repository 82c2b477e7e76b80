"""Weights that a client keeps between two messages: on disk, known by their hash.

Flower may hand every message to a fresh process, and its `Context.state` is made for small records. A client therefore
keeps its weights in a file and the file's hash in `Context.state`. What is read back is what was written, or an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.files import default_folder

_DAYS_KEPT = 7  # what a killed run left behind is removed after so many days


class WeightCache:
    """One file of weights for each (run, node), replaced whole at every save.

    Parameters
    ----------
    folder
        Where the files lie; :func:`default_folder` if not given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or default_folder()) / "weights"

    def _file(self, run_id: int, node_id: int) -> Path:
        return self.folder / str(run_id) / f"{node_id}.safetensors"

    def save(self, run_id: int, node_id: int, weights: dict[str, Tensor]) -> str:
        """Write the weights and return their hash.

        Raises
        ------
        ReplyError
            The disk is full, or the folder cannot be written.
        """
        data = save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()})
        file = self._file(run_id, node_id)
        partial = file.with_suffix(f".{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial.write_bytes(data)
            partial.replace(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise ReplyError(f"cannot keep weights in {self.folder}: {error.strerror}; set FL_EDGE_CACHE") from None
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    def load(self, run_id: int, node_id: int, digest: str) -> dict[str, Tensor]:
        """Read the weights back.

        Raises
        ------
        ReplyError
            The file is gone or holds other weights than those of this hash.
        """
        try:
            data = self._file(run_id, node_id).read_bytes()
        except OSError:
            raise ReplyError(f"the weights of node {node_id} are no longer in {self.folder}") from None
        if hashlib.blake2b(data, digest_size=16).hexdigest() != digest:
            raise ReplyError(f"the weights of node {node_id} in {self.folder} are not those it kept")
        try:
            return load(data)
        except SafetensorError as error:
            raise ReplyError(f"the weights of node {node_id} in {self.folder} cannot be read: {error}") from None

    def drop(self, run_id: int, node_id: int) -> None:
        """Remove the weights of a node, and whatever runs that ended long ago left behind."""
        file = self._file(run_id, node_id)
        file.unlink(missing_ok=True)
        if not self.folder.is_dir():
            return
        for run in self.folder.iterdir():
            try:
                old = time.time() - run.stat().st_mtime > _DAYS_KEPT * 86400
                if old and run != file.parent:
                    shutil.rmtree(run, ignore_errors=True)
            except OSError:
                continue  # another client removed it first
