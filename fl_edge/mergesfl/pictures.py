"""Pictures of a MergeSFL run, drawn from its round reports."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fl_edge.mergesfl.report import RoundReport

_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#718096"


def draw(reports: Sequence[RoundReport], classes: Sequence[str]) -> dict[str, bytes]:
    """Return PNG pictures by file name: accuracy over time, what each device did, and the merged label mix.

    Parameters
    ----------
    reports
        At least one round, in order.
    classes
        Names of the classes, for the label mix.
    """
    return {
        "accuracy.png": _accuracy(reports),
        "devices.png": _devices(reports),
        "labels.png": _labels(reports, classes),
    }


def _accuracy(reports: Sequence[RoundReport]) -> bytes:
    virtual = all(report.virtual_s is not None for report in reports)
    times = [report.virtual_s if virtual else report.server_round for report in reports]
    tested = [(time, r.test_accuracy) for time, r in zip(times, reports, strict=True) if r.test_accuracy is not None]
    figure, (axis,) = _figure(1)
    if tested:
        axis.plot(*zip(*tested, strict=True), color=_BLUE, label="test", **_marks(tested))
    axis.plot(times, [r.train_accuracy for r in reports], color=_GREY, lw=1, label="merged batches", **_marks(reports))
    if virtual:
        axis.set_xlabel("virtual time (s)")
    else:
        _count_rounds(axis)
    axis.set(ylabel="accuracy", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    _head(axis, "Accuracy")
    return _png(figure)


def _devices(reports: Sequence[RoundReport]) -> bytes:
    names = sorted({name for report in reports for name in report.devices}, key=lambda name: (len(name), name))
    row = {name: index for index, name in enumerate(names)}
    sizes = np.full((len(names), len(reports)), np.nan)
    seconds = sizes.copy()
    for column, report in enumerate(reports):
        for name, size, second in zip(report.devices, report.batch_sizes, report.iteration_s, strict=True):
            sizes[row[name], column], seconds[row[name], column] = size, second
    every = 1 + len(names) // 100  # device that gets its name beside its row
    figure, axes = _figure(2, height=max(3.6, 0.16 * len(names) / every + 1.2))
    extent = (reports[0].server_round - 0.5, reports[-1].server_round + 0.5, len(names) - 0.5, -0.5)
    for axis, values, title in ((axes[0], sizes, "Batch size (samples)"), (axes[1], seconds, "Iteration time (s)")):
        image = axis.imshow(values, aspect="auto", interpolation="nearest", extent=extent, cmap="viridis")
        axis.set_title(f"{title}; white: not in the cohort", loc="left", fontsize=11)
        axis.set_yticks(range(0, len(names), every), [_short(name) for name in names[::every]], fontsize=7)
        _count_rounds(axis)
        figure.colorbar(image, ax=axis)
    return _png(figure)


def _labels(reports: Sequence[RoundReport], classes: Sequence[str]) -> bytes:
    mixes = np.array([report.label_mix for report in reports])  # (rounds, classes)
    edges = np.arange(mixes.shape[1] + 1) - 0.5
    figure, (mix, divergence) = _figure(2)
    spread = {"baseline": mixes.min(0), "fill": True, "color": _BLUE, "alpha": 0.25}
    mix.stairs(mixes.max(0), edges, label="range", **spread)
    mix.stairs(mixes.mean(0), edges, baseline=None, color=_BLUE, lw=1.5, label="mean")
    mix.stairs(np.array(reports[-1].reference), edges, baseline=None, color=_ORANGE, lw=1.5, label="reference")
    mix.set(xlabel="class", ylabel="share", xlim=(edges[0], edges[-1]))
    mix.set_ylim(bottom=0)
    if len(classes) == mixes.shape[1] <= 40:
        names = [_short(name) for name in classes]
        upright = max(map(len, names)) > 2
        mix.set_xticks(range(len(names)), names, rotation=90 if upright else 0, fontsize=7 if upright else 9)
    _head(mix, "Labels of the merged batches")
    kl = [report.kl for report in reports]
    divergence.plot([r.server_round for r in reports], kl, color=_BLUE, **_marks(reports))
    divergence.set(ylabel="KL divergence", ylim=(0, 1.1 * max(kl) or 1))
    divergence.grid(alpha=0.3)
    _count_rounds(divergence)
    divergence.set_title("Merged label mix against the reference", loc="left", fontsize=11)
    return _png(figure)


def _marks(points: Sequence[Any]) -> dict[str, Any]:
    """Draw a point a round, as long as they can be told apart."""
    return {"marker": "o", "markersize": 3} if len(points) <= 60 else {}


def _count_rounds(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - see _figure

    axis.set_xlabel("round")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _head(axis: Any, title: str) -> None:
    """Title on the left, legend on its right: above the curves, never over them."""
    axis.set_title(title, loc="left", fontsize=11)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2, fontsize=9)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"…{name[-17:]}"


def _figure(columns: int, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import, and only wanted at the end of a run

    figure = Figure(figsize=(6.4 * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
