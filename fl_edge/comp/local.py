"""COMP on one text, on one machine."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fl_edge.comp.decision import Decision
from fl_edge.comp.similarity import Similarity
from fl_edge.comp.statistics import Statistics
from fl_edge.comp.survey import Loss, similarities, skipped_losses
from fl_edge.comp.walker import Walker
from fl_edge.comp.workbench import Workbench
from fl_edge.pruning import Unit


class TextSource:
    """What one text says; the source of a course, or a device's part of one.

    Parameters
    ----------
    bench
        Whose layers are measured.
    tokens
        (s, n) int64: sequences of full length.
    target
        See :class:`~fl_edge.comp.config.CompConfig`.
    """

    def __init__(self, bench: Workbench, tokens: Tensor, target: str) -> None:
        self._bench, self._tokens, self._target = bench, tokens, target
        self.walker = Walker(bench, tokens)

    def similarities(self, removed: tuple[int, ...]) -> Mapping[int, Similarity]:
        """Return the similarity of every layer's input and output in the model without some layers."""
        return similarities(self._bench.checkpoint, self._tokens, removed)

    def losses(self, removed: tuple[int, ...], candidates: tuple[int, ...]) -> Mapping[int, Loss]:
        """Return what :func:`fl_edge.comp.survey.skipped_losses` does."""
        return skipped_losses(self._bench.checkpoint, self._tokens, removed, candidates)

    def begin(self) -> None:
        """Stand in front of the first layer."""
        self.walker.begin()

    def skip(self, layer: int, growth: float) -> None:
        """Pass a layer that is removed; it is loaded."""
        self.walker.skip(layer, growth)

    def statistics(self, layer: int, unit: Unit) -> Statistics:
        """Return the statistics of the map that units flow into; the layer is loaded."""
        return self.walker.measure(layer, unit, self._target)

    def both(self, layer: int) -> Mapping[Unit, Statistics]:
        """Return both maps' statistics in the dense model, their own outputs wanted, and pass the loaded layer."""
        return self.walker.both(layer)

    def decided(self, layer: int, unit: Unit, decision: Decision) -> None:  # noqa: ARG002 - the layer has taken it in
        """Learn of a decision, which the loaded layer has taken in; after that on channels, pass the layer."""
        if unit == "channels":
            self.walker.advance(layer)

    def snapshot(self) -> dict[str, Tensor]:
        """Return what is needed to go on in front of the next layer."""
        return {"dense": self.walker.dense, "pruned": self.walker.pruned}

    def restore(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        """Stand where a snapshot was taken."""
        place = self._bench.checkpoint.device
        self.walker.dense, self.walker.pruned = tensors["dense"].to(place), tensors["pruned"].to(place)
        self.walker.scale = scale
