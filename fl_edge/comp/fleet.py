"""Settings of COMP on many devices, and what can be said of them before any device is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from fl_edge.comp.config import CompConfig
from fl_edge.comp.outline import Sizes, Source, draw_outline
from fl_edge.comp.similarity import Similarity
from fl_edge.comp.survey import NONE, Loss
from fl_edge.comp.workbench import Workbench
from fl_edge.config import setting


@dataclass
class FleetConfig(CompConfig):
    """Who decides, and how large each device's model becomes."""

    mode: str = setting(
        "local", "each device prunes its own copy on its own text (local), all on the sums of all texts to one ratio "
        "(federated), or every size at once on sums of the dense model (nested)",
        choices=("local", "federated", "nested"),
    )  # fmt: skip
    ratios: str = setting("0.2 0.3 0.4", "of local and nested models, dealt to the devices in turn")
    wire: str = setting("float32", "type in which sums travel", choices=("float32", "float64"))
    fewest: int = setting(1, "devices that must answer; with fewer, the run ends", low=1)
    message_mib: int = setting(32, "sums and decisions that go into one message, MiB, where they are of several", low=1)

    @property
    def each_ratio(self) -> tuple[float, ...]:
        """The ratios as numbers; in the federated mode the one of the method."""
        return (self.ratio,) if self.mode == "federated" else tuple(float(each) for each in self.ratios.split())

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        try:
            ratios = [float(each) for each in self.ratios.split()]
        except ValueError:
            ratios = []
        if not ratios or not all(0 <= each <= 0.95 and math.isfinite(each) for each in ratios):
            return f"ratios={self.ratios} must be numbers from 0 to 0.95, separated by spaces"
        return None

    def method(self, ratio: float) -> CompConfig:
        """Return the settings of one pruning."""
        chosen = {name: getattr(self, name) for name in CompConfig.__dataclass_fields__}
        return replace(CompConfig(**chosen), ratio=ratio)


def check_ratio(config: CompConfig, bench: Workbench) -> None:
    """Refuse a ratio that no plan can meet, whatever the texts say.

    Raises
    ------
    ConfigError
        More layers than may go, or more of the others than may.
    """
    config = replace(config, allocation="importance")  # how the budget is shared does not change what can be met
    sizes = Sizes(bench)
    draw_outline(config, sizes, bench, cast("Source", _Unmeasured(len(sizes.full.layers))))


class _Unmeasured:
    """Says that all layers matter alike."""

    def __init__(self, layers: int) -> None:
        self._layers = range(layers)

    def similarities(self, removed: tuple[int, ...]) -> Mapping[int, Similarity]:
        return {layer: Similarity(1, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0) for layer in self._layers if layer not in removed}

    def losses(self, removed: tuple[int, ...], candidates: tuple[int, ...]) -> Mapping[int, Loss]:
        return {layer: Loss(1, 1.0) for layer in candidates if layer not in removed} | {NONE: Loss(1, 0.0)}
