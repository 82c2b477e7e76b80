"""COMP on the texts of many devices, none of which leaves its device: the sums that devices send are added.

The solution is that of all texts together, to rounding. Nothing here knows how a question reaches a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fl_edge.comp.decision import Decision
from fl_edge.comp.history import History, Step
from fl_edge.comp.similarity import Similarity
from fl_edge.comp.statistics import Statistics
from fl_edge.comp.sums import Sums
from fl_edge.comp.survey import Loss
from fl_edge.comp.workbench import Workbench
from fl_edge.pruning import Unit
from fl_edge.pruning.plan import UNITS


@dataclass(frozen=True)
class Similar:
    """Ask for the :class:`Similarity` of every layer that stays, by layer."""

    removed: tuple[int, ...]


@dataclass(frozen=True)
class Skipped:
    """Ask for the :class:`Loss` with each candidate left out, by layer, as ``survey.skipped_losses`` has it."""

    removed: tuple[int, ...]
    candidates: tuple[int, ...]


@dataclass(frozen=True)
class Measure:
    """Ask for the :class:`Sums` of the map that a layer's units flow into, by (layer, unit), after so many steps."""

    layer: int
    unit: Unit
    steps: int


@dataclass(frozen=True)
class Dense:
    """Ask for the :class:`Sums` of both maps of some layers of the unpruned model, by (layer, unit)."""

    layers: tuple[int, ...]


Question = Similar | Skipped | Measure | Dense
Answer = Mapping[Any, Any]  # sums by what they are of
Ask = Callable[[Question], Sequence[Answer]]


def pool(answers: Sequence[Answer]) -> dict[Any, Any]:
    """Add the sums of devices, in the order given."""
    return {key: reduce(lambda a, b: a + b, (answer[key] for answer in answers)) for key in answers[0]}


class PooledSource:
    """Source of a course over the layers whose sums come from many devices.

    Parameters
    ----------
    bench
        Of the one who decides; what is sent back is completed with the weights of the layer that is loaded there.
    ask
        Puts a question to all devices and returns at least one answer, always in the same order of devices.
    history
        Where the decisions go, for the devices to follow.
    most_bytes
        Of an answer about several layers of the dense model, counted in float32; one layer may be more. A small model
        goes into one exchange, since no layer waits for another there; a large one takes an exchange a layer.
    """

    def __init__(self, bench: Workbench, ask: Ask, history: History, most_bytes: int) -> None:
        self._bench, self._ask, self._history, self._most_bytes = bench, ask, history, most_bytes
        self._ahead: dict[tuple[int, Unit], Sums] = {}

    def similarities(self, removed: tuple[int, ...]) -> Mapping[int, Similarity]:
        """Return the similarity of every layer's input and output in the model without some layers."""
        return self._pooled(Similar(removed))

    def losses(self, removed: tuple[int, ...], candidates: tuple[int, ...]) -> Mapping[int, Loss]:
        """Return what :func:`fl_edge.comp.survey.skipped_losses` does."""
        return self._pooled(Skipped(removed, candidates))

    def begin(self) -> None:
        """Stand in front of the first layer."""
        self._history.truncate(0)

    def skip(self, layer: int, growth: float) -> None:
        """Pass a layer that is removed."""
        self._history.append(Step(layer, None, growth))

    def both(self, layer: int) -> Mapping[Unit, Statistics]:
        """Return both maps' statistics in the dense model, their own outputs wanted; the layer is loaded."""
        if (layer, UNITS[0]) not in self._ahead:
            self._ahead = self._pooled(Dense(self._next(layer)))
        found = {}
        for unit in UNITS:
            linear = self._bench.consumer(layer, unit)
            found[unit] = self._ahead.pop((layer, unit)).expand(linear.weight, linear.bias)
        return found

    def statistics(self, layer: int, unit: Unit) -> Statistics:
        """Return the statistics of the map that units flow into; the layer is loaded."""
        sums = self._pooled(Measure(layer, unit, len(self._history)))[layer, unit]
        linear = self._bench.consumer(layer, unit)
        found: Statistics = sums.expand(linear.weight, linear.bias)
        return found

    def decided(self, layer: int, unit: Unit, decision: Decision) -> None:
        """Learn of a decision, which devices are told with the next question."""
        self._history.append(Step.of(layer, unit, decision, self._bench.checkpoint.dtype))

    def snapshot(self) -> dict[str, Tensor]:
        """Return what is needed to go on in front of the next layer: how much has been decided."""
        return {"steps": torch.tensor([float(len(self._history))])}

    def restore(self, tensors: Mapping[str, Tensor], scale: float) -> None:  # noqa: ARG002 - devices keep it
        """Stand where a snapshot was taken; devices follow from wherever they are."""
        self._history.truncate(int(tensors["steps"]))

    def _next(self, layer: int) -> tuple[int, ...]:
        widths = [self._bench.consumer(layer, unit).in_features for unit in UNITS]
        one = 4 * sum(width * (width + 1) // 2 + width for width in widths)
        last = min(layer + max(self._most_bytes // one, 1), self._bench.checkpoint.num_layers)
        return tuple(range(layer, last))

    def _pooled(self, question: Question) -> dict[Any, Any]:
        return pool(self._ask(question))
