"""What is settled before the first layer is pruned: which layers go, and what each of the others has to lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from fl_edge.comp.allocation import Key, check_budget, choose_layers, layer_ratios, layers_to_remove, spread
from fl_edge.comp.config import CompConfig
from fl_edge.comp.curves import curve_until, loss_curve
from fl_edge.comp.decision import Decision
from fl_edge.comp.similarity import Similarity
from fl_edge.comp.statistics import Statistics
from fl_edge.comp.survey import NONE, Loss
from fl_edge.comp.workbench import Workbench
from fl_edge.pruning import Unit, unit_params
from fl_edge.pruning.plan import UNITS

_OF_LAYERS = ("importance", "growth", "ratios", "heads")


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

    def both(self, layer: int) -> Mapping[Unit, Statistics]:
        """Return both maps' statistics in the dense model, their own outputs wanted, and pass the loaded layer."""

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
        Part of its parameters that each layer that stays loses.
    heads
        How many heads each of them loses.
    budget
        Parameters to remove from the layers that stay.
    """

    removed: tuple[int, ...]
    importance: dict[int, float]
    growth: dict[int, float]
    ratios: dict[int, float]
    heads: dict[int, int]
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
        self._similarities: dict[tuple[int, ...], Mapping[int, Similarity]] = {}
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

    def turns(self, removed: tuple[int, ...]) -> dict[Key, float]:
        """Return by how much the halves of the layers that are left turn the hidden states."""
        if self._config.allocation != "curves":
            return {}
        similar = self._similarities.get(removed) or self._similar(removed)
        return {(layer, unit): each.turn(unit) for layer, each in similar.items() for unit in UNITS}

    def _measured(self, removed: tuple[int, ...]) -> dict[int, float]:
        if self._config.layer_rule == "loss":
            left = tuple(layer for layer in range(self._count) if layer not in removed)
            losses = self._source.losses(removed, left)
            return {layer: losses[layer].mean - losses[NONE].mean for layer in left}
        return {layer: each.importance(self._config.similarity) for layer, each in self._similar(removed).items()}

    def _similar(self, removed: tuple[int, ...]) -> Mapping[int, Similarity]:
        found = self._similarities[removed] = self._source.similarities(removed)
        self._grown.update((layer, each.growth) for layer, each in found.items())
        return found


class Budget:
    """Shares out what the layers that stay have to lose.

    Parameters
    ----------
    config
        Settings; ratio and shares of layers do not matter here.
    sizes
        Of the model.
    bench, source
        On which curves are measured, once, where the settings want them.
    """

    def __init__(self, config: CompConfig, sizes: Sizes, bench: Workbench, source: Source) -> None:
        self._config, self._sizes, self._bench, self._source = config, sizes, bench, source
        self._units: tuple[Unit, ...] = UNITS if config.prune_attention else ("channels",)
        self._curves: dict[Key, list[tuple[int, float]]] = {}

    def share_out(
        self, budget: float, importance: Mapping[int, float], turns: Mapping[Key, float], least: Mapping[Key, int]
    ) -> tuple[dict[int, float], dict[int, int]]:
        """Return what part of its parameters, and how many heads, each layer that stays loses.

        Parameters
        ----------
        budget
            Parameters to remove from the layers that stay.
        importance
            Of these layers.
        turns
            Of their halves.
        least
            Units that go in any case.

        Raises
        ------
        ConfigError
            A budget that the layers cannot meet.
        """
        most = sum(
            self._most(layer, unit) * self._sizes.units[layer][unit] for layer in importance for unit in self._units
        )
        check_budget(budget, most)  # before curves are measured, which takes a pass
        share = self._by_curves if self._config.allocation == "curves" else self._by_importance
        parts, heads = share(budget, importance, turns, least)
        return {layer: part / self._sizes.layer(layer) for layer, part in parts.items()}, heads

    def _by_importance(
        self, budget: float, importance: Mapping[int, float], _turns: Mapping[Key, float], least: Mapping[Key, int]
    ) -> tuple[dict[int, float], dict[int, int]]:
        wholes = {layer: self._sizes.layer(layer, self._units) for layer in importance}
        floors = {
            layer: sum(least.get((layer, unit), 0) * self._sizes.units[layer][unit] for unit in UNITS) / whole
            for layer, whole in wholes.items()
        }
        found = layer_ratios(
            list(importance.values()),
            list(wholes.values()),
            budget,
            self._config.alpha,
            self._config.max_layer_ratio,
            list(floors.values()),
        )
        ratios = dict(zip(importance, found, strict=True))
        totals = {layer: self._sizes.full.total(layer, "heads") for layer in ratios}
        heads = {layer: min(round(ratio * totals[layer]), totals[layer] - 1) for layer, ratio in ratios.items()}
        if "heads" not in self._units:
            heads = dict.fromkeys(heads, 0)
        return {layer: ratio * wholes[layer] for layer, ratio in ratios.items()}, heads

    def _by_curves(
        self, budget: float, importance: Mapping[int, float], turns: Mapping[Key, float], least: Mapping[Key, int]
    ) -> tuple[dict[int, float], dict[int, int]]:
        measured = self._measured()
        curves = {
            (layer, unit): [(count, lost * turns[layer, unit]) for count, lost in measured[layer, unit]]
            for layer in importance
            for unit in self._units
        }
        sizes = {(layer, unit): self._sizes.units[layer][unit] for layer, unit in curves}
        taken = spread(curves, sizes, budget, {key: least.get(key, 0) for key in curves})
        parts = dict.fromkeys(importance, 0.0)
        for (layer, unit), count in taken.items():
            parts[layer] += count * sizes[layer, unit]
        parts[min(parts)] += budget - sum(parts.values())  # less than a unit; layers pass it on
        return parts, {layer: taken.get((layer, "heads"), 0) for layer in importance}

    def _most(self, layer: int, unit: Unit) -> int:
        """Return how many units may go."""
        return int(self._config.max_layer_ratio * self._sizes.full.total(layer, unit))

    def _measured(self) -> dict[Key, list[tuple[int, float]]]:
        """Return the curves of all layers, as far as the settings let units go; one pass."""
        if not self._curves:
            self._source.begin()
            for layer in range(len(self._sizes.full.layers)):
                self._bench.open(layer)
                self._measure(layer)
                self._bench.checkpoint.release(layer)
        return self._curves

    def _measure(self, layer: int) -> None:
        """Measure the curves of a loaded layer; its statistics, larger than its weights, are gone before the next."""
        for unit, statistics in self._source.both(layer).items():
            linear, width = self._bench.consumer(layer, unit), self._bench.member(layer, unit).width
            curve = loss_curve(statistics, linear.weight, linear.bias, width, self._config)
            self._curves[layer, unit] = curve_until(curve, self._most(layer, unit))


def draw_outline(config: CompConfig, sizes: Sizes, bench: Workbench, source: Source) -> Outline:
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
    kept = {layer: value for layer, value in measure(removed).items() if layer not in removed}
    budget = config.ratio * sizes.total - sum(map(sizes.layer, removed))
    shares = Budget(config, sizes, bench, source).share_out(budget, kept, measure.turns(removed), {})
    return Outline(removed, kept, measure.growth(removed), *shares, budget)
