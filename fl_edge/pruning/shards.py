"""A pruned model written piece by piece, for one that is never in memory as a whole, and taken up again after a kill.

Each shard is a safetensors file that stands there whole or not at all. A journal beside them, ``.shards.json``, says
which are there; what makes a model of them (index, configuration, plan) comes last, so that half of a model is never
taken for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fl_edge.errors import ConfigError, DataError, RunFolderError
from fl_edge.files import write_whole
from fl_edge.pruning.configuration import written
from fl_edge.pruning.loading import first_unlike, give_biases
from fl_edge.pruning.pieces import Layout, write_pieces
from fl_edge.pruning.plan import PruningPlan
from fl_edge.pruning.saving import (
    CONFIG,
    GENERATION,
    INDEX,
    PLAN,
    line_of,
    remove_model,
    sha256_of,
    write_plan,
    write_tensors,
    writing,
)
from fl_edge.pruning.slicing import prune

JOURNAL = ".shards.json"
BESIDE = (  # what a Hugging Face folder may hold beside weights and configuration that a pruned model needs unchanged
    GENERATION,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class _Shard:
    """What the journal says of a file."""

    sha256: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype and shape


class ShardWriter:
    """Writes a pruned model into a folder, shard by shard; only the shard at hand is ever in memory.

    Parameters
    ----------
    folder
        Made where needed. Shards that an earlier process left unfinished are taken over; a finished pruned model is
        replaced from the first :meth:`write` on.

    Raises
    ------
    RunFolderError
        The folder cannot be made, or it holds a model that is not a pruned one, which is never overwritten.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        finished = (folder / PLAN).exists()
        journal = None if finished else _read_journal(folder / JOURNAL)
        if journal is None and not finished and (folder / CONFIG).exists():
            raise RunFolderError(f"{folder} holds a model that is not a pruned one; choose another folder")
        self._begun, self._shards = journal is not None, journal or {}
        self._whole: set[str] = set()  # shards whose digest this process has made or checked

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard whole or not at all; one of the same name is replaced.

        Parameters
        ----------
        name
            Of the shard: letters, digits, dots, dashes and underscores. Its file is ``model-NAME.safetensors``.
        tensors
            By their names in the pruned model, where layers are numbered from 0. No two may share memory.

        Raises
        ------
        ConfigError
            A name of other characters.
        RunFolderError
            The disk is full or read-only; the shards that stood there are still whole.
        """
        held = {key: value.detach().contiguous() for key, value in tensors.items()}
        layout = {key: (value.dtype, tuple(value.shape)) for key, value in held.items()}
        self._write(name, layout, lambda file: write_tensors(file, held))

    def write_pieces(self, name: str, layout: Layout, pieces: Callable[[str], Iterable[Tensor]]) -> None:
        """Write a shard as :meth:`write` does, from pieces of its tensors, which are never in memory as a whole.

        Parameters
        ----------
        layout
            Dtype and shape of each tensor, by names as for :meth:`write`.
        pieces
            Gives the numbers of a tensor in order, in pieces of any size.
        """
        self._write(name, layout, lambda file: write_pieces(file, layout, pieces))

    def _write(self, name: str, layout: Layout, put: Callable[[Path], None]) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ConfigError(f"a shard cannot be named {name!r}; allowed are letters, digits and . _ -")
        self._whole.discard(name)
        with writing(self.folder):
            if not self._begun:
                remove_model(self.folder)
                self._begun = True
            for file in (PLAN, CONFIG):  # of a finish that was cut short
                (self.folder / file).unlink(missing_ok=True)
            put(self._file(name))
            shard = _Shard(
                sha256_of(self._file(name)),
                {key: (_short(dtype), tuple(shape)) for key, (dtype, shape) in layout.items()},
            )
            shards = {**self._shards, name: shard}
            write_whole(self.folder / JOURNAL, json.dumps({key: asdict(each) for key, each in shards.items()}))
        self._shards = shards
        self._whole.add(name)

    @property
    def parameters(self) -> int:
        """Numbers in all the shards so far."""
        return sum(prod(shape) for shard in self._shards.values() for _, shape in shard.tensors.values())

    def discard(self) -> None:
        """Remove the shards of a model that will not be finished."""
        with writing(self.folder):
            for name in self._shards:
                self._file(name).unlink(missing_ok=True)
            (self.folder / JOURNAL).unlink(missing_ok=True)
        self._begun, self._shards = False, {}
        self._whole.clear()

    def has(self, name: str) -> bool:
        """Whether a shard of this name stands there whole, also one from an earlier process that was killed."""
        if name in self._shards and name not in self._whole:
            try:
                if sha256_of(self._file(name)) == self._shards[name].sha256:
                    self._whole.add(name)
            except OSError:  # gone, or unreadable
                return False
        return name in self._whole

    def read(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a shard, on the CPU.

        Raises
        ------
        DataError
            No whole shard of this name.
        """
        if not self.has(name):
            raise DataError(f"{self._file(name)} is not a whole shard of this model")
        try:
            return load_file(self._file(name))
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot read {self._file(name)}: {line_of(error)}") from None

    def finish(self, model: Any, plan: PruningPlan, source: Path | None = None) -> None:
        """Make a model of the shards, which loads with :func:`~fl_edge.pruning.load_pruned`.

        Where every layer is alike and no bias was added, plain ``from_pretrained`` loads it as well, as after
        :func:`~fl_edge.pruning.save_pruned`.

        Parameters
        ----------
        model
            A skeleton on the meta device, sliced by ``plan``: it gives class and configuration, and the shapes that
            must have been written. Output maps get the biases there that were written for them.
        plan
            What the model keeps.
        source
            Folder of the unpruned model; its tokenizer and generation settings are copied.

        Raises
        ------
        ConfigError
            A skeleton that is not as the plan says, or shards that are not exactly its tensors.
        DataError
            A shard that is no longer whole, or a source that cannot be read.
        RunFolderError
            The folder cannot be written; it is not taken for a model then, and the shards stay.
        """
        prune(model, plan, present=plan)  # slices nothing, and refuses a plan that is not this model's
        for name in self._shards:
            if not self.has(name):
                raise DataError(f"{self._file(name)} is damaged or gone; write it again")
        tensors = self._tensors()
        shapes = {name: shape for name, (_, _, shape) in tensors.items()}
        give_biases(model, shapes)
        if found := first_unlike(model, shapes):
            raise ConfigError(f"the shards in {self.folder} are not the model: {found[1]}")
        first = next(name for name, _ in model.named_parameters() if name in tensors)
        config = written(model, plan, shapes, tensors[first][1])
        index = {
            "metadata": {"total_size": sum(dtype.itemsize * prod(shape) for _, dtype, shape in tensors.values())},
            "weight_map": {name: file for name, (file, _, _) in sorted(tensors.items())},
        }
        beside = _beside(source)
        with writing(self.folder):
            for name, content in beside.items():
                write_whole(self.folder / name, content)
            write_whole(self.folder / INDEX, json.dumps(index, indent=1) + "\n")
            write_whole(self.folder / CONFIG, config.to_json_string())
            write_plan(self.folder, plan, {self._file(name).name: each.sha256 for name, each in self._shards.items()})
            (self.folder / JOURNAL).unlink()
        self._begun, self._shards = False, {}
        self._whole.clear()

    def _file(self, name: str) -> Path:
        return self.folder / f"model-{name}.safetensors"

    def _tensors(self) -> dict[str, tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return file, dtype and shape of every tensor that was written."""
        found: dict[str, tuple[str, torch.dtype, tuple[int, ...]]] = {}
        for name, shard in self._shards.items():
            file = self._file(name).name
            for key, (dtype, shape) in shard.tensors.items():
                if key in found:
                    raise ConfigError(f"{key} stands in two shards of {self.folder}: {found[key][0]} and {file}")
                found[key] = file, getattr(torch, dtype), shape
        return found


def _read_journal(file: Path) -> dict[str, _Shard] | None:
    """Return what a journal says of each shard, or None without one that can be read."""
    try:
        return {
            name: _Shard(
                str(shard["sha256"]),
                {
                    key: (_short(getattr(torch, dtype)), tuple(shape))
                    for key, (dtype, shape) in shard["tensors"].items()
                },
            )
            for name, shard in json.loads(file.read_bytes()).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _beside(source: Path | None) -> dict[str, bytes]:
    try:
        found = [] if source is None else [source / name for name in BESIDE]
        return {file.name: file.read_bytes() for file in found if file.is_file()}
    except OSError as error:
        raise DataError(f"cannot read what lies beside the model in {source}: {line_of(error)}") from None
