"""What has been decided so far, step by step: whoever follows it has the pruned model, to the bit.

A step holds what a decision changes in the weights and nothing else: which units stay, and the factors, or the weights,
of those that do. Steps lie on disk one by one, so that a long history of whole weights fills no memory, and so that a
run that was killed still has them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fl_edge.comp.decision import Decision
from fl_edge.errors import RunFolderError
from fl_edge.files import write_whole
from fl_edge.pruning.plan import UNITS, Unit

_TENSORS = ("mask", "weight", "bias")


@dataclass(frozen=True, eq=False)
class Step:
    """One change of the pruned model.

    Attributes
    ----------
    layer
        Which one it changes.
    unit
        What was decided on; None where the layer is removed.
    growth
        By what factor a removed layer lengthens the hidden states, where that is made up for, else 1.
    decision
        Which units stay and what becomes of the map that consumes them; None where the layer is removed.
    """

    layer: int
    unit: Unit | None
    growth: float = 1.0
    decision: Decision | None = None

    @property
    def passes(self) -> bool:
        """Whether it is the last one of its layer."""
        return self.unit != UNITS[0]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all but the layer, the unit and the growth; kept units as a bit mask, unit 0 the highest bit."""
        if self.decision is None:
            return {}
        found = {"kept": _bits(self.decision.kept)}
        given = ((name, getattr(self.decision, name)) for name in _TENSORS)
        return found | {name: tensor for name, tensor in given if tensor is not None}

    @classmethod
    def of(cls, layer: int, unit: Unit, decision: Decision, dtype: torch.dtype) -> Step:
        """Return the step of a decision; new weights in the type of the model, in which they end in any case."""
        weight = None if decision.weight is None else decision.weight.to(dtype)
        return cls(layer, unit, 1.0, _bare(decision.kept, decision.mask, weight, decision.bias))

    @classmethod
    def from_tensors(cls, layer: int, unit: Unit | None, growth: float, tensors: dict[str, Tensor]) -> Step:
        """Undo :meth:`to_tensors`."""
        if unit is None:
            return cls(layer, None, growth)
        return cls(layer, unit, growth, _bare(_units(tensors["kept"]), *(tensors.get(name) for name in _TENSORS)))


class History:
    """Steps on disk, in order.

    Parameters
    ----------
    folder
        Made at the first step. Steps that lie there already are taken over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        while self._file(self._count).is_file():
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def append(self, step: Step) -> None:
        """Add a step.

        Raises
        ------
        RunFolderError
            The disk is full or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot make {self.folder}: {error.strerror}") from None
        about = json.dumps({"layer": step.layer, "unit": step.unit, "growth": step.growth})
        tensors = {name: tensor.contiguous().cpu() for name, tensor in step.to_tensors().items()}
        write_whole(self._file(self._count), save(tensors, metadata={"step": about}))
        self._count += 1

    def truncate(self, count: int) -> None:
        """Forget all but the first steps.

        Raises
        ------
        RunFolderError
            There are fewer.
        """
        if count > self._count:
            raise RunFolderError(f"{self.folder} holds {self._count} decisions of {count}; the run cannot go on")
        while self._count > count:
            with contextlib.suppress(FileNotFoundError):
                self._file(self._count - 1).unlink()
            self._count -= 1

    def read(self, number: int) -> Step:
        """Return a step.

        Raises
        ------
        RunFolderError
            It is not there or damaged.
        """
        try:
            with safe_open(self._file(number), framework="pt") as stored:
                about = json.loads(stored.metadata()["step"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
            return Step.from_tensors(about["layer"], about["unit"], about["growth"], tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"cannot read decision {number} in {self.folder}: {error}") from None

    def since(self, first: int, end: int, most_bytes: int) -> Iterator[Step]:
        """Yield steps from one on, up to ``end`` or until they hold so many bytes; whole layers, at least one."""
        held = 0
        for number in range(first, end):
            step = self.read(number)
            held += sum(tensor.nbytes for tensor in step.to_tensors().values())
            if held > most_bytes and number > first and step.unit != UNITS[1]:
                return
            yield step

    def _file(self, number: int) -> Path:
        return self.folder / f"step-{number:06d}.safetensors"


def _bare(kept: tuple[int, ...], mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Decision:
    return Decision(kept, mask, weight, bias, (), guarded=False, variance=0.0, untuned=0.0, tuned=0.0)


def _bits(kept: tuple[int, ...]) -> Tensor:
    """Return kept units as bits, eight a byte."""
    flags = torch.zeros(8 * (kept[-1] // 8 + 1), dtype=torch.uint8)
    flags[list(kept)] = 1
    return (flags.view(-1, 8) << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _units(bits: Tensor) -> tuple[int, ...]:
    flags = (bits[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    return tuple(flags.flatten().nonzero().flatten().tolist())
