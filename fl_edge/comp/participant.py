"""A device's part in a pruning that somebody else decides: it follows the steps, and measures its own text on the way.

What it needs to go on is its hidden states in front of a layer and the number of steps it has followed. Both can be
made again from the text and the steps, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fl_edge.comp.history import Step
from fl_edge.comp.statistics import Statistics
from fl_edge.comp.walker import Walker
from fl_edge.comp.workbench import Workbench
from fl_edge.errors import ReplyError
from fl_edge.pruning import Unit
from fl_edge.pruning.plan import UNITS

Keep = Callable[[int, dict[str, Tensor]], None]


class Participant:
    """Follows the steps of a pruning, with a text of its own or without.

    Parameters
    ----------
    bench
        Of the device's own copy of the model.
    tokens
        (s, n) int64: sequences of full length; None for a device that follows without measuring.
    target
        See :class:`~fl_edge.comp.config.CompConfig`.
    keep
        Called with each layer that was pruned: its place among those that stay, and its tensors by their names in it.

    Attributes
    ----------
    steps
        How many have been followed.
    layer
        The first that has not been passed.
    place
        How many layers before it stay.
    scale
        By how much the pruned model's hidden states are smaller than the dense one's.
    """

    def __init__(self, bench: Workbench, tokens: Tensor | None, target: str, keep: Keep) -> None:
        self._bench, self._target, self._keep = bench, target, keep
        self._walker = None if tokens is None else _Walker(bench, tokens)
        self._open = self._cut = False  # the layer at hand is loaded; its heads have been decided on
        self.steps = self.layer = self.place = 0
        self.scale = 1.0

    @property
    def measures(self) -> bool:
        """Whether it takes a text along."""
        return self._walker is not None

    @property
    def between(self) -> bool:
        """Whether it stands in front of a layer that has not been touched."""
        return not self._open

    def begin(self) -> None:
        """Stand in front of the first layer."""
        if self._walker is not None:
            self._walker.begin()

    def follow(self, step: Step) -> None:
        """Take a step.

        Raises
        ------
        ReplyError
            It is not the next one.
        """
        due = (UNITS[1],) if self._cut else (None, UNITS[0])
        if step.layer != self.layer or step.unit not in due:
            raise ReplyError(
                f"it was told of the {step.unit or 'end'} of layer {step.layer}, which is not the next step"
            )
        if step.unit is None or step.decision is None:
            self._skip(step.layer, step.growth)
        else:
            self._enter(step.layer)
            self._bench.apply(step.layer, step.unit, step.decision)
            self._cut = not step.passes
            if step.passes:
                self._pass(step.layer)
        self.steps += 1

    def statistics(self, layer: int, unit: Unit) -> tuple[Statistics, Tensor]:
        """Return the statistics of the map that a layer's units flow into, and its weight as it is.

        Raises
        ------
        ReplyError
            Another layer or unit is next.
        """
        if self._walker is None or layer != self.layer or unit != UNITS[self._cut]:
            raise ReplyError(f"it was asked for the {unit} of layer {layer}, which are not what is next")
        self._enter(layer)
        return self._walker.measure(layer, unit, self._target), self._bench.consumer(layer, unit).weight

    def snapshot(self) -> dict[str, Tensor]:
        """Return what it takes to go on from here, in front of a layer; nothing where it only follows."""
        if self._walker is None:
            return {}
        return {"dense": self._walker.dense, "pruned": self._walker.pruned}

    def restore(self, tensors: Mapping[str, Tensor], steps: int, layer: int, place: int, scale: float) -> None:
        """Stand where a snapshot was taken."""
        self.steps, self.layer, self.place, self.scale = steps, layer, place, scale
        if self._walker is not None:
            device = self._bench.checkpoint.device
            self._walker.dense, self._walker.pruned = tensors["dense"].to(device), tensors["pruned"].to(device)
            self._walker.scale = scale

    def _enter(self, layer: int) -> None:
        """Load a layer, and take the dense hidden states through it while it is whole."""
        if self._open:
            return
        self._bench.open(layer, self.scale)
        self._open = True
        if self._walker is not None:
            self._walker.enter(layer, self._target)

    def _skip(self, layer: int, growth: float) -> None:
        self._bench.checkpoint.load(layer)
        if self._walker is not None:
            self._walker.skip(layer, growth)
        self._bench.checkpoint.release(layer)
        self.scale *= growth
        self.layer += 1

    def _pass(self, layer: int) -> None:
        if self._walker is not None:
            self._walker.advance(layer)
        _, tensors = self._bench.close(layer)
        self._open = False
        self._keep(self.place, tensors)
        self.layer += 1
        self.place += 1


class _Walker(Walker):
    """One that may be asked for a layer's heads again: the dense states pass a layer once, whoever asks first."""

    _entered = -1

    def enter(self, layer: int, target: str) -> None:
        self._advance_dense(layer, target)

    def _advance_dense(self, layer: int, target: str) -> None:
        if layer != self._entered:
            super()._advance_dense(layer, target)
            self._entered = layer
