"""What happened, layer by layer and device by device, for people (lines) and for programs (records)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from fl_edge.comp.course import LayerReport
from fl_edge.comp.outcome import Figures, Outcome
from fl_edge.pruning import PruningPlan


@dataclass(frozen=True)
class LayerRow:
    """One layer that was decided on with the sums of many devices.

    Attributes
    ----------
    ratio
        Of the model that it is a layer of.
    layers
        How many there are.
    devices
        Whose sums counted.
    up_bytes, down_bytes
        Of the messages' tensors since the layer before.
    real_s
        Seconds since then, for the first since the beginning.
    """

    ratio: float
    report: LayerReport
    layers: int
    devices: int
    up_bytes: int
    down_bytes: int
    real_s: float

    def to_record(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {"kind": "layer", **asdict(self)}

    def line(self) -> str:
        """Return one line of text; what is left is as long as this layer was, for each that is to come."""
        report, left_s = self.report, self.real_s * (self.layers - self.report.layer - 1)
        kept = "removed" if report.removed else f"{report.heads} heads, {report.channels} channels"
        errors = [f"{unit} {value:.3g}" for unit, value in report.tuned.items() if report.untuned.get(unit)]
        error = f"  error {', '.join(errors)}" if errors else ""
        guard = "  guarded" if report.guarded else ""
        return (
            f"layer {report.layer + 1:>{len(str(self.layers))}}/{self.layers}  {kept:<24}  devices {self.devices}  "
            f"{self.up_bytes / 1e6:7.2f} MB up  {self.down_bytes / 1e6:6.2f} MB down{error}{guard}  "
            f"left {_time(left_s)}"
        )


@dataclass(frozen=True)
class DeviceRow:
    """One device whose model is pruned."""

    device: str
    ratio: float
    outcome: Outcome

    def to_record(self) -> dict[str, Any]:
        """Return plain values that JSON can hold; the plan as its record."""
        said = {**asdict(self.outcome), "plan": self.outcome.plan.to_record()}
        return {"kind": "device", "device": self.device, "ratio": self.ratio, **said}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> DeviceRow:
        """Undo :meth:`to_record`."""
        pairs: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record["figures"].items()}
        plan = PruningPlan.from_record(record["plan"])
        outcome = Outcome(plan, record["folder"], record["seconds"], record["bytes_read"], Figures(**pairs))
        return cls(record["device"], record["ratio"], outcome)

    def line(self) -> str:
        """Return one line of text."""
        figures = self.outcome.figures
        before, after = figures.perplexity
        return (
            f"{self.device:<12} ratio {self.ratio:.2f}  "
            f"{figures.parameters[0] / 1e6:.2f} -> {figures.parameters[1] / 1e6:.2f} M  "
            f"perplexity {before:.2f} -> {after:.2f}  {self.outcome.seconds:.1f} s"
        )


@dataclass
class CompReport:
    """A whole run.

    Attributes
    ----------
    lost
        Device -> why it does not count from some point on.
    up_bytes, down_bytes
        Tensors in all messages.
    """

    mode: str
    devices: list[DeviceRow] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    up_bytes: int = 0
    down_bytes: int = 0

    def summary(self) -> dict[str, Any]:
        """Return the figures of the run: what result.json holds."""
        rows = [row.to_record() for row in self.devices]
        for row in rows:
            del row["plan"], row["kind"]
        return {
            "mode": self.mode,
            "devices": rows,
            "lost": self.lost,
            "perplexity_before": _mean([row.outcome.figures.perplexity[0] for row in self.devices]),
            "perplexity_after": _mean([row.outcome.figures.perplexity[1] for row in self.devices]),
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
        }


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
