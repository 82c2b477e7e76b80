"""Pictures of a MergeSFL run, drawn from its round reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fl_edge.mergesfl.report import RoundReport
from fl_edge.plotting import BLUE, GREY, ORANGE, count_rounds, marks, new_figure, png, set_title, shortened


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
        axis.plot(*zip(*tested, strict=True), color=BLUE, label="test", **marks(tested))
    axis.plot(times, [r.train_accuracy for r in reports], color=GREY, lw=1, label="merged batches", **marks(reports))
    if virtual:
        axis.set_xlabel("virtual time (s)")
    else:
        count_rounds(axis)
    axis.set(ylabel="accuracy", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    set_title(axis, "Accuracy")
    return png(figure)


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
        axis.set_yticks(range(0, len(names), every), [shortened(name) for name in names[::every]], fontsize=7)
        count_rounds(axis)
        figure.colorbar(image, ax=axis)
    return png(figure)


def _labels(reports: Sequence[RoundReport], classes: Sequence[str]) -> bytes:
    mixes = np.array([report.label_mix for report in reports])  # (rounds, classes)
    edges = np.arange(mixes.shape[1] + 1) - 0.5
    figure, (mix, divergence) = _figure(2)
    spread = {"baseline": mixes.min(0), "fill": True, "color": BLUE, "alpha": 0.25}
    mix.stairs(mixes.max(0), edges, label="range", **spread)
    mix.stairs(mixes.mean(0), edges, baseline=None, color=BLUE, lw=1.5, label="mean")
    mix.stairs(np.array(reports[-1].reference), edges, baseline=None, color=ORANGE, lw=1.5, label="reference")
    mix.set(xlabel="class", ylabel="share", xlim=(edges[0], edges[-1]))
    mix.set_ylim(bottom=0)
    if len(classes) == mixes.shape[1] <= 40:
        names = [shortened(name) for name in classes]
        upright = max(map(len, names)) > 2
        mix.set_xticks(range(len(names)), names, rotation=90 if upright else 0, fontsize=7 if upright else 9)
    set_title(mix, "Labels of the merged batches")
    kl = [report.kl for report in reports]
    divergence.plot([r.server_round for r in reports], kl, color=BLUE, **marks(reports))
    divergence.set(ylabel="KL divergence", ylim=(0, 1.1 * max(kl) or 1))
    divergence.grid(alpha=0.3)
    count_rounds(divergence)
    divergence.set_title("Merged label mix against the reference", loc="left", fontsize=11)
    return png(figure)


def _figure(columns: int, height: float = 3.6) -> tuple[Any, Any]:
    figure = new_figure(6.4 * columns, height)
    return figure, figure.subplots(1, columns, squeeze=False)[0]
