"""One run of COMP, one order of what goes, every size class: a smaller class keeps a subset of what a larger one keeps.

Statistics are those of the dense model, so that they depend on no class and one pass over the text serves all. *Ours*;
that the nested order of one run gives all sizes is only named as a possibility in notes on COMP as a federated task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from fl_edge.comp.allocation import Key, choose_layers, layers_to_remove
from fl_edge.comp.config import CompConfig
from fl_edge.comp.course import LayerReport, Progress, quota_of
from fl_edge.comp.decision import Decision, decide
from fl_edge.comp.outline import Budget, Importance, Outline, Sizes, Source
from fl_edge.comp.statistics import Statistics
from fl_edge.comp.workbench import Workbench
from fl_edge.config import check
from fl_edge.errors import ConfigError
from fl_edge.pruning import LayerPlan, Unit
from fl_edge.pruning.plan import UNITS

log = logging.getLogger("flwr.fl_edge")


@dataclass
class SizeClass:
    """One size class on its way: its settings, what was settled for it, and where it stands."""

    config: CompConfig
    outline: Outline
    progress: Progress

    @property
    def name(self) -> str:
        """Of its folder."""
        return class_name(self.config.ratio)


def class_name(ratio: float) -> str:
    """Return the name of a class's folder."""
    return f"{ratio:g}"


def class_configs(config: CompConfig, ratios: Sequence[float]) -> list[CompConfig]:
    """Return the settings of every class, the largest model first.

    Raises
    ------
    ConfigError
        No ratio, one that is named twice, or settings that cannot be.
    """
    found = [replace(config, ratio=ratio, target="own") for ratio in sorted(ratios)]
    if not found or any(class_name(a.ratio) == class_name(b.ratio) for a, b in pairwise(found)):
        raise ConfigError(f"the nested ratios must be different numbers, got {', '.join(map(str, ratios)) or 'none'}")
    for each in found:
        check(each)
    return found


def draw_outlines(configs: Sequence[CompConfig], sizes: Sizes, bench: Workbench, source: Source) -> list[Outline]:
    """Settle for each class which layers go and what the others lose; each class loses all that the one before does.

    The layers of a class that go are the first of one common order. Where with one layer more its other layers would
    have to lose less than in the class before, one layer fewer goes.

    Parameters
    ----------
    configs
        Of the classes, by rising ratio.

    Raises
    ------
    ConfigError
        A ratio that no plan can meet.
    """
    first, count = configs[0], len(sizes.full.layers)
    measure = Importance(first, count, source)
    goals = [layers_to_remove(config.ratio, config.layer_share, count) for config in configs]
    order = choose_layers(goals[-1], measure.candidates, measure, first.iterative_layers)
    importance, turns, growth = measure(()), measure.turns(()), measure.growth(order)
    shares = Budget(first, sizes, bench, source)
    outlines: list[Outline] = []
    for config, goal in zip(configs, goals, strict=True):
        least = _units_gone(outlines[-1], sizes) if outlines else {}
        fewest = len(outlines[-1].removed) if outlines else 0
        for number in range(goal, fewest - 1, -1):
            removed = order[:number]
            kept = {layer: value for layer, value in importance.items() if layer not in removed}
            budget = config.ratio * sizes.total - sum(map(sizes.layer, removed))
            if sum(n * sizes.units[layer][unit] for (layer, unit), n in least.items() if layer in kept) <= budget:
                break
        shared = shares.share_out(budget, kept, turns, least)
        outlines.append(Outline(removed, kept, {layer: growth[layer] for layer in removed}, *shared, budget))
    return outlines


def _units_gone(outline: Outline, sizes: Sizes) -> dict[Key, int]:
    """Return how many units of the layers that stay go at the least, as was settled for a class."""
    gone: dict[Key, int] = {}
    for layer, ratio in outline.ratios.items():
        each = sizes.units[layer]
        gone[layer, "heads"] = outline.heads[layer]
        left = ratio * sizes.layer(layer) - outline.heads[layer] * each["heads"]
        gone[layer, "channels"] = max(int(left // each["channels"]), 0)
    return gone


def prune_classes(
    classes: Sequence[SizeClass],
    sizes: Sizes,
    bench: Workbench,
    source: Source,
    write: Callable[[SizeClass, dict[str, Tensor]], None],
) -> None:
    """Prune the next layer in every class, and bring their progress forward.

    Parameters
    ----------
    write
        Takes a layer's new tensors by their names in it, before the class's progress counts the layer.

    Raises
    ------
    DataError
        Statistics that are not finite.
    """
    layer = len(classes[0].progress.layers)
    having = [each for each in classes if layer not in each.outline.removed]
    decisions: list[dict[Unit, Decision]] = []
    bench.open(layer)
    if having:
        decisions = _decide(having, layer, sizes, bench, source.both(layer))
    else:
        source.skip(layer, 1.0)
    bench.checkpoint.release(layer)
    for each in classes:
        progress = each.progress
        if each not in having:
            progress.scale *= each.outline.growth[layer]
            progress.layers.append(LayerPlan((), ()))
            progress.reports.append(LayerReport(layer, removed=True))
    for each, decided in zip(having, decisions, strict=True):
        bench.open(layer, each.progress.scale)
        for unit, decision in decided.items():
            bench.apply(layer, unit, _scaled(decision, each.progress.scale))
        kept, tensors = bench.close(layer)
        write(each, tensors)
        each.progress.layers.append(kept)


def _decide(
    classes: Sequence[SizeClass], layer: int, sizes: Sizes, bench: Workbench, both: Mapping[Unit, Statistics]
) -> list[dict[Unit, Decision]]:
    """Decide on a layer for the classes that have it: one elimination a unit gives the order for all."""
    decisions: list[dict[Unit, Decision]] = [{} for _ in classes]
    reports = [LayerReport(layer, removed=False) for _ in classes]
    dues = [each.progress.owed + each.outline.ratios[layer] * sizes.layer(layer) for each in classes]
    for unit in UNITS:
        quotas = _quotas([each.outline for each in classes], sizes, layer, unit, dues)
        linear, width = bench.consumer(layer, unit), bench.member(layer, unit).width
        about = (both[unit], linear.weight, linear.bias)
        order = decide(*about, quotas[-1], width, classes[-1].config).order
        for place, (each, quota) in enumerate(zip(classes, quotas, strict=True)):
            gone = order[:quota]
            decision = decide(*about, len(gone), width, each.config, gone)
            decisions[place][unit] = decision
            dues[place] -= len(gone) * sizes.units[layer][unit]
            reports[place].note(unit, replace(decision, guarded=len(gone) < quota))
        if len(order) < quotas[-1]:
            log.warning(
                "layer %d: the guard kept %d of %d %s that were to go in the smallest class",
                *(layer, quotas[-1] - len(order), quotas[-1], unit),
            )
    for each, due, report in zip(classes, dues, reports, strict=True):
        each.progress.owed = due
        each.progress.reports.append(report)
    return decisions


def _quotas(outlines: Sequence[Outline], sizes: Sizes, layer: int, unit: Unit, dues: Sequence[float]) -> list[int]:
    """Return how many units go in each class, no fewer than in the one before.

    A class takes no more heads than leave it as many channels to remove as the one before removes.
    """
    quotas: list[int] = []
    channels = 0
    for outline, due in zip(outlines, dues, strict=True):
        least = quotas[-1] if quotas else 0
        quota = max(quota_of(outline, sizes, layer, unit, due), least)
        if unit == "heads":
            left = due - channels * sizes.units[layer]["channels"]
            quota = min(quota, max(least, int(left // sizes.units[layer]["heads"]))) if quotas else quota
            rest = due - quota * sizes.units[layer]["heads"]
            channels = max(channels, quota_of(outline, sizes, layer, "channels", rest))
        quotas.append(quota)
    return quotas


def _scaled(decision: Decision, scale: float) -> Decision:
    """Return the decision for a map whose output is to be smaller; a mask stays."""
    weight, bias = (None if each is None else each / scale for each in (decision.weight, decision.bias))
    return replace(decision, weight=weight, bias=bias)
