"""Every size class at once on the texts of many devices; nothing but the decisions is kept, since devices write models.

Sums are of the dense model, so layers need not wait for each other. *Ours*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.classes import SizeClass, class_configs, draw_outlines, prune_classes
from fl_edge.comp.config import CompConfig
from fl_edge.comp.course import LayerReport, Progress, check_met
from fl_edge.comp.decision import Decision
from fl_edge.comp.history import History, Step
from fl_edge.comp.outline import Sizes
from fl_edge.comp.pooled import Ask, PooledSource
from fl_edge.comp.workbench import Workbench
from fl_edge.pruning import PruningPlan, Unit

OnLayer = Callable[[LayerReport, int], None]


def prune_pooled_classes(
    bench: Workbench,
    config: CompConfig,
    ratios: Sequence[float],
    ask: Ask,
    histories: Mapping[float, History],
    most_bytes: int,
    on_layer: OnLayer,
) -> dict[float, PruningPlan]:
    """Decide on every size class; return what each keeps.

    Parameters
    ----------
    bench
        See :func:`recording`.
    config
        Settings; ``target`` is ``own`` whatever it says.
    ratios
        Of the classes, all different.
    ask
        As for :class:`~fl_edge.comp.pooled.PooledSource`.
    histories
        Where the decisions of each class go, empty.
    most_bytes
        As for :class:`~fl_edge.comp.pooled.PooledSource`.
    on_layer
        Called after each layer with its report in the smallest class and the number of layers.

    Raises
    ------
    ConfigError
        Ratios that no plan can meet, or that are named twice.
    DataError
        A class that misses its ratio.
    """
    assert isinstance(bench, _Recording)
    configs, sizes = class_configs(config, ratios), Sizes(bench)
    source = _Source(bench, ask, History(Path()), most_bytes)
    outlines = draw_outlines(configs, sizes, bench, source)
    classes = [SizeClass(each, outline, Progress()) for each, outline in zip(configs, outlines, strict=True)]

    def write(each: SizeClass, tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        for layer, unit, decision in bench.applied:
            histories[each.config.ratio].append(Step.of(layer, unit, decision, bench.checkpoint.dtype))
        bench.applied.clear()

    for layer in range(bench.checkpoint.num_layers):
        for each in classes:
            if layer in each.outline.removed:
                histories[each.config.ratio].append(Step(layer, None, each.outline.growth[layer]))
        prune_classes(classes, sizes, bench, source, write)
        on_layer(classes[-1].progress.reports[-1], bench.checkpoint.num_layers)
    for each in classes:
        check_met(each.config, sizes, each.progress)
    return {each.config.ratio: replace(bench.full, layers=tuple(each.progress.layers)) for each in classes}


def recording(base: Path, device: torch.device) -> Workbench:
    """Return the workbench of a model on which :func:`prune_pooled_classes` can decide."""
    return _Recording(Checkpoint(base, device))


class _Recording(Workbench):
    """Remembers what was applied, for the devices to do the same."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.applied: list[tuple[int, Unit, Decision]] = []

    def apply(self, layer: int, unit: Unit, decision: Decision) -> None:
        super().apply(layer, unit, decision)
        self.applied.append((layer, unit, decision))


class _Source(PooledSource):
    """Measures the dense model only, so that nothing has to be followed on the way."""

    def skip(self, layer: int, growth: float) -> None:
        """Pass a layer that no class has."""
