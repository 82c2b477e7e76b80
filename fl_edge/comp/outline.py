"""What is settled before the first layer is pruned: which layers go, and what each of the others has to lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from fl_edge.comp.allocation import choose_layers, layer_ratios, layers_to_remove
from fl_edge.comp.config import CompConfig
from fl_edge.comp.decision import Decision
from fl_edge.comp.similarity import Similarity
from fl_edge.comp.statistics import Statistics
from fl_edge.comp.survey import NONE, Loss
from fl_edge.comp.workbench import Workbench
from fl_edge.pruning import Unit, unit_params
from fl_edge.pruning.plan import UNITS

_OF_LAYERS = ("importance", "growth", "ratios")


class Source(Protocol):
    """Who measures. Every answer is a sum over tokens."""

    def similarities(self, removed: tuple[int, ...]) -> Mapping[int, Similarity]:
        """Return the similarity of every layer's input and output in the model without some layers."""

    def losses(self, removed: tuple[int, ...], candidates: tuple[int, ...]) -> Mapping[int, Loss]:
        """Return what :func:`fl_edge.comp.survey.skipped_losses` does."""

    def begin(self) -> None:
        """Stand in front of the first layer."""

    def skip(self, layer: int, growth: float) -> None:
        """Pass a layer that is removed; it is loaded."""

    def statistics(self, layer: int, unit: Unit) -> Statistics:
        """Return the statistics of the map that units flow into; the layer is loaded."""

    def decided(self, layer: int, unit: Unit, decision: Decision) -> None:
        """Learn of a decision, which the loaded layer has taken in; after that on channels, pass the layer."""

    def snapshot(self) -> dict[str, Tensor]:
        """Return what is needed to go on in front of the next layer."""

    def restore(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        """Stand where a snapshot was taken; ``scale`` is that of the course's progress there."""


@dataclass
class Outline:
    """What is known before the first layer is pruned.

    Attributes
    ----------
    removed
        Layers that go, the first to go first.
    importance
        Of the layers that stay, in the model without the removed ones where that was measured.
    growth
        For each removed layer, by what factor what follows is to be scaled down.
    ratios
        For each layer that stays.
    budget
        Parameters to remove from the layers that stay.
    """

    removed: tuple[int, ...]
    importance: dict[int, float]
    growth: dict[int, float]
    ratios: dict[int, float]
    budget: float

    def to_record(self) -> dict[str, Any]:
        """Return plain values; JSON turns the layers' numbers into text, which :meth:`from_record` knows."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Outline:
        """Return the outline of a record made by :meth:`to_record`."""
        of_layers = {key: {int(layer): each for layer, each in record[key].items()} for key in _OF_LAYERS}
        return cls(removed=tuple(record["removed"]), budget=record["budget"], **of_layers)


class Sizes:
    """Parameters of units and layers of an unpruned model."""

    def __init__(self, bench: Workbench) -> None:
        self.full = bench.full
        self.units = [dict(zip(UNITS, each, strict=True)) for each in unit_params(bench.checkpoint.skeleton)]

    def layer(self, layer: int, units: tuple[Unit, ...] = UNITS) -> int:
        """Return the parameters of a layer that can be pruned."""
        return sum(self.full.total(layer, unit) * self.units[layer][unit] for unit in units)

    @property
    def total(self) -> int:
        """Parameters of all layers that can be pruned."""
        return sum(self.layer(layer) for layer in range(len(self.full.layers)))


class Importance:
    """Importance of layers as the configuration wants it measured; each measurement is made once.

    Attributes
    ----------
    candidates
        Layers that may go.
    """

    def __init__(self, config: CompConfig, count: int, source: Source) -> None:
        self._config, self._count, self._source = config, count, source
        self._known: dict[tuple[int, ...], dict[int, float]] = {}
        self._grown: dict[int, float] = {}
        self.candidates = tuple(range(config.protect_first, count - config.protect_last))

    def __call__(self, removed: tuple[int, ...]) -> dict[int, float]:
        """Return the importance of the layers that are left when some are gone."""
        if removed not in self._known:
            self._known[removed] = self._measured(removed)
        return self._known[removed]

    def growth(self, removed: tuple[int, ...]) -> dict[int, float]:
        """Return by what factor what follows removed layers is to be scaled down."""
        if not self._config.repair:
            return dict.fromkeys(removed, 1.0)
        if not self._grown.keys() >= set(removed):
            self._similar(())
        return {layer: self._grown[layer] for layer in removed}

    def _measured(self, removed: tuple[int, ...]) -> dict[int, float]:
        if self._config.layer_rule == "loss":
            left = tuple(layer for layer in range(self._count) if layer not in removed)
            losses = self._source.losses(removed, left)
            return {layer: losses[layer].mean - losses[NONE].mean for layer in left}
        return {layer: each.importance(self._config.similarity) for layer, each in self._similar(removed).items()}

    def _similar(self, removed: tuple[int, ...]) -> Mapping[int, Similarity]:
        found = self._source.similarities(removed)
        self._grown.update((layer, each.growth) for layer, each in found.items())
        return found


def draw_outline(config: CompConfig, sizes: Sizes, source: Source) -> Outline:
    """Measure the layers, choose those that go, and share the rest of the budget out.

    Raises
    ------
    ConfigError
        A ratio that no plan can meet.
    """
    count = len(sizes.full.layers)
    measure = Importance(config, count, source)
    goal = layers_to_remove(config.ratio, config.layer_share, count)
    removed = choose_layers(goal, measure.candidates, measure, config.iterative_layers)
    importance = measure(removed)
    kept = [layer for layer in range(count) if layer not in removed]
    units: tuple[Unit, ...] = UNITS if config.prune_attention else ("channels",)
    budget = config.ratio * sizes.total - sum(map(sizes.layer, removed))
    ratios = layer_ratios(
        [importance[layer] for layer in kept],
        [sizes.layer(layer, units) for layer in kept],
        budget,
        config.alpha,
        config.max_layer_ratio,
    )
    return Outline(
        removed,
        {layer: importance[layer] for layer in kept},
        measure.growth(removed),
        dict(zip(kept, ratios, strict=True)),
        budget,
    )
