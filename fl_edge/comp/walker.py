"""A text on its way through the dense model and through the pruned one, layer by layer.

Hidden states of the whole text are kept (twice), weights of one layer. What is measured on the way are sums over tokens
(:class:`~fl_edge.comp.statistics.Statistics`), so that several texts, on one device or on many, add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fl_edge.comp.statistics import Statistics
from fl_edge.comp.survey import chunks
from fl_edge.comp.watching import watched
from fl_edge.comp.workbench import Workbench
from fl_edge.pruning import Unit
from fl_edge.pruning.plan import UNITS


class Walker:
    """One text's hidden states in front of the layer at hand.

    Parameters
    ----------
    bench
        Whose layer is loaded when something is measured.
    tokens
        (s, n) int64: sequences of full length.

    Attributes
    ----------
    dense, pruned
        (s, n, d) what enters the layer in the dense and in the pruned model; the latter is to be multiplied by
        ``scale`` to compare.
    """

    def __init__(self, bench: Workbench, tokens: Tensor) -> None:
        self.bench, self.tokens = bench, tokens
        self.scale = 1.0
        self.dense = self.pruned = torch.empty(0)
        self._wanted: dict[Unit, Tensor] = {}

    def begin(self) -> None:
        """Stand in front of the first layer."""
        self.dense = self.bench.checkpoint.embed(self.tokens)
        self.pruned = self.dense.clone()
        self.scale = 1.0

    def measure(self, layer: int, unit: Unit, target: str) -> Statistics:
        """Return the statistics of the map that a loaded layer's units flow into.

        To be asked for the heads, while the layer is whole, then, when they have been decided on, for the channels.

        Parameters
        ----------
        target
            ``own``: the map's output on the same input. ``dense``: its output in the dense model. ``stream``: what
            takes the pruned hidden states to the dense ones, errors of earlier layers included.
        """
        if unit == "heads":
            self._advance_dense(layer, target)
        total: Statistics | None = None
        for rows in chunks(self.tokens):
            entering = self.pruned[rows]
            with watched(self.bench.consumer(layer, unit), entering) as seen:
                leaving = self.bench.checkpoint.run(layer, entering)
            if target == "own":
                wanted = seen.outputs
            else:
                wanted = self._wanted[unit][rows] / self.scale
                if target == "stream":
                    wanted = wanted - (entering if unit == "heads" else leaving - seen.outputs)
            sums = Statistics.of if total is None else total.extended
            total = sums(seen.inputs.flatten(0, 1), wanted.flatten(0, 1))
        assert total is not None
        return total

    def both(self, layer: int) -> dict[Unit, Statistics]:
        """Return the statistics of both maps in the dense model, their own outputs wanted, and pass the layer."""
        total: dict[Unit, Statistics] = {}
        for rows in chunks(self.tokens):
            entering = self.dense[rows]
            consumers = (self.bench.consumer(layer, unit) for unit in UNITS)
            with watched(next(consumers), entering) as heads, watched(next(consumers), entering) as channels:
                self.dense[rows] = self.bench.checkpoint.run(layer, entering)
            for unit, seen in zip(UNITS, (heads, channels), strict=True):
                sums = total[unit].extended if unit in total else Statistics.of
                total[unit] = sums(seen.inputs.flatten(0, 1), seen.outputs.flatten(0, 1))
        return total

    def advance(self, layer: int) -> None:
        """Take the pruned states through the loaded layer, which has been decided on."""
        for rows in chunks(self.tokens):
            self.pruned[rows] = self.bench.checkpoint.run(layer, self.pruned[rows])
        self._wanted = {}

    def skip(self, layer: int, growth: float) -> None:
        """Take the dense states through a loaded layer that the pruned model does not have.

        Parameters
        ----------
        growth
            By what factor the layer lengthens the hidden states, where that is made up for, else 1.
        """
        self._advance_dense(layer, "own")
        self.scale *= growth

    def _advance_dense(self, layer: int, target: str) -> None:
        """Take the dense states through a loaded layer, which is whole; keep what will be wanted of the pruned one."""
        if target != "own":
            self._wanted = {unit: torch.empty_like(self.dense) for unit in UNITS}
        for rows in chunks(self.tokens):
            entering = self.dense[rows]
            consumers = (self.bench.consumer(layer, unit) for unit in UNITS)
            with (
                self.bench.undivided(layer),
                watched(next(consumers), entering) as heads,
                watched(next(consumers), entering) as channels,
            ):
                leaving = self.bench.checkpoint.run(layer, entering)
            if target == "dense":
                self._wanted["heads"][rows], self._wanted["channels"][rows] = heads.outputs, channels.outputs
            elif target == "stream":
                self._wanted["heads"][rows], self._wanted["channels"][rows] = entering + heads.outputs, leaving
            self.dense[rows] = leaving
