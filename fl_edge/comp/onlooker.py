"""A text on its way through the dense model alone: what a pruning needs to know that looks at no pruned layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fl_edge.comp.sums import Sums
from fl_edge.comp.walker import Walker
from fl_edge.comp.workbench import Workbench
from fl_edge.pruning import Unit


class Onlooker:
    """One text's hidden states in front of a layer of the dense model.

    Parameters
    ----------
    bench
        Of the device's own copy of the model.
    tokens
        (s, n) int64: sequences of full length.

    Attributes
    ----------
    layer
        The one that is next.
    """

    def __init__(self, bench: Workbench, tokens: Tensor) -> None:
        self._bench, self._tokens = bench, tokens
        self._walker = Walker(bench, tokens)
        self.layer = -1

    def sums(self, layers: tuple[int, ...]) -> dict[tuple[int, Unit], Sums]:
        """Return the sums of both maps of some layers, ascending; the way there is gone again where it has to be."""
        found: dict[tuple[int, Unit], Sums] = {}
        if not 0 <= self.layer <= layers[0]:
            self._walker.dense, self.layer = self._bench.checkpoint.embed(self._tokens), 0
        while self.layer <= layers[-1]:
            layer = self.layer
            self._bench.open(layer)
            if layer in layers:
                for unit, statistics in self._walker.both(layer).items():
                    found[layer, unit] = Sums.of(statistics, self._bench.consumer(layer, unit).weight, "own")
            else:
                self._walker.skip(layer, 1.0)
            self._bench.checkpoint.release(layer)
            self.layer += 1
        return found

    def snapshot(self) -> dict[str, Tensor]:
        """Return what it takes to go on from here."""
        return {"hidden": self._walker.dense}

    def restore(self, tensors: Mapping[str, Tensor], layer: int) -> None:
        """Stand where a snapshot was taken."""
        self._walker.dense, self.layer = tensors["hidden"].to(self._bench.checkpoint.device), layer
