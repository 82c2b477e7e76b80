"""COMP's second step: layer after layer, first to last, heads before channels, whoever measures.

A budget in parameters runs along: what a layer could not give, because units are whole or the guard stopped it, the
layers after it owe.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fl_edge.comp.config import CompConfig
from fl_edge.comp.decision import Decision, decide
from fl_edge.comp.outline import Outline, Sizes, Source
from fl_edge.comp.workbench import Workbench
from fl_edge.errors import DataError
from fl_edge.pruning import LayerPlan, Unit
from fl_edge.pruning.plan import UNITS

log = logging.getLogger("flwr.fl_edge")

_TOLERANCE = 0.01  # of the parameters that are to remain


@dataclass
class LayerReport:
    """What was done to one layer; errors are relative and on the calibration text, None where nothing was removed."""

    layer: int
    removed: bool
    heads: int = 0
    channels: int = 0
    guarded: bool = False
    variance: dict[str, float] = field(default_factory=dict)
    untuned: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, float] = field(default_factory=dict)

    def note(self, unit: Unit, decision: Decision) -> None:
        """Take in what was decided on the layer's heads or channels."""
        if unit == "heads":
            self.heads = len(decision.kept)
        else:
            self.channels = len(decision.kept)
        self.guarded |= decision.guarded
        self.variance[unit], self.untuned[unit], self.tuned[unit] = decision.variance, decision.untuned, decision.tuned


@dataclass
class Progress:
    """Where a course stands; plain values, so that it goes into a file and back.

    Attributes
    ----------
    owed
        Parameters that earlier layers should have lost and did not; negative where they lost more.
    scale
        By how much the pruned model's hidden states are smaller than the dense one's.
    layers
        What the layers so far keep.
    reports
        One a layer.
    """

    owed: float = 0.0
    scale: float = 1.0
    layers: list[LayerPlan] = field(default_factory=list)
    reports: list[LayerReport] = field(default_factory=list)

    def to_record(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Progress:
        """Return the progress of a record made by :meth:`to_record`."""
        return cls(
            record["owed"],
            record["scale"],
            [LayerPlan(tuple(layer["heads"]), tuple(layer["channels"])) for layer in record["layers"]],
            [LayerReport(**report) for report in record["reports"]],
        )


def prune_layers(
    config: CompConfig, outline: Outline, sizes: Sizes, bench: Workbench, source: Source, progress: Progress
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Prune the layers that stay, from where the progress stands, and bring the progress forward.

    Yields
    ------
    tuple
        After each layer: its number, and its new tensors by their names in the layer; none where the layer is removed.

    Raises
    ------
    DataError
        A guard that stopped so many layers that the ratio is missed, or statistics that are not finite.
    """
    for layer in range(len(progress.layers), len(sizes.full.layers)):
        if layer in outline.removed:
            bench.checkpoint.load(layer)
            source.skip(layer, outline.growth[layer])
            bench.checkpoint.release(layer)
            progress.scale *= outline.growth[layer]
            progress.layers.append(LayerPlan((), ()))
            progress.reports.append(LayerReport(layer, removed=True))
            yield layer, {}
            continue
        bench.open(layer, progress.scale)
        report = LayerReport(layer, removed=False)
        due = outline.ratios[layer] * sizes.layer(layer) + progress.owed
        for unit in UNITS:
            quota = quota_of(outline, sizes, layer, unit, due)
            due -= _prune_unit(config, quota, bench, source, layer, unit, report) * sizes.units[layer][unit]
        progress.owed = due
        kept, tensors = bench.close(layer)
        progress.layers.append(kept)
        progress.reports.append(report)
        yield layer, tensors
    check_met(config, sizes, progress)


def quota_of(outline: Outline, sizes: Sizes, layer: int, unit: Unit, due: float) -> int:
    """Return how many units go: heads as settled, channels so that the budget comes out."""
    if unit == "heads":
        return outline.heads[layer]
    return max(0, min(round(due / sizes.units[layer][unit]), sizes.full.total(layer, unit) - 1))


def _prune_unit(
    config: CompConfig, quota: int, bench: Workbench, source: Source, layer: int, unit: Unit, report: LayerReport
) -> int:
    """Decide on the heads or channels of a layer; return how many went."""
    statistics = source.statistics(layer, unit)
    linear, width = bench.consumer(layer, unit), bench.member(layer, unit).width
    decision = decide(statistics, linear.weight, linear.bias, quota, width, config)
    bench.apply(layer, unit, decision)
    source.decided(layer, unit, decision)
    report.note(unit, decision)
    if decision.guarded:
        log.warning(
            "layer %d: the guard kept %d of %d %s that were to go, since the mask would vary by more than %g "
            "on %d calibration tokens; later layers lose more",
            *(layer, quota - len(decision.order), quota, unit, config.max_variance, statistics.tokens),
        )
    return len(decision.order)


def check_met(config: CompConfig, sizes: Sizes, progress: Progress) -> None:
    """Raise DataError where a course that has ended missed the ratio."""
    remaining = (1 - config.ratio) * sizes.total
    if abs(progress.owed) <= _TOLERANCE * remaining:
        return
    guarded = [report.layer for report in progress.reports if report.guarded]
    reached = config.ratio - progress.owed / sizes.total
    why = (
        f"the guard on the mask's variance stopped layers {', '.join(map(str, guarded))}; give more calibration text, "
        "or raise max_variance"
        if guarded
        else "the layers have too few units to come nearer"
    )
    raise DataError(f"only {reached:.3f} of the ratio {config.ratio} could be removed: {why}")
