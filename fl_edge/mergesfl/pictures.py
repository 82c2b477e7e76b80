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
    tested = [report.test_accuracy for report in reports]
    figure, axis = _figure(1)
    if None not in tested:
        axis[0].plot(times, tested, color=_BLUE, marker="o", markersize=3, label="test")
    axis[0].plot(times, [r.train_accuracy for r in reports], color=_GREY, linewidth=1, label="merged batches")
    axis[0].set(xlabel="virtual time (s)" if virtual else "round", ylabel="accuracy", ylim=(0, 1), title="Accuracy")
    axis[0].grid(alpha=0.3)
    axis[0].legend(loc="lower right")
    return _png(figure)


def _devices(reports: Sequence[RoundReport]) -> bytes:
    names = sorted({name for report in reports for name in report.devices}, key=lambda name: (len(name), name))
    row = {name: index for index, name in enumerate(names)}
    sizes = np.full((len(names), len(reports)), np.nan)
    seconds = sizes.copy()
    for column, report in enumerate(reports):
        for name, size, second in zip(report.devices, report.batch_sizes, report.iteration_s, strict=True):
            sizes[row[name], column], seconds[row[name], column] = size, second
    figure, axes = _figure(2, height=max(3.6, 0.22 * len(names) + 1.4))
    extent = (reports[0].server_round - 0.5, reports[-1].server_round + 0.5, len(names) - 0.5, -0.5)
    for axis, values, title in (
        (axes[0], sizes, "Batch size (samples)"),
        (axes[1], seconds, "Iteration time (s)"),
    ):
        image = axis.imshow(values, aspect="auto", interpolation="nearest", extent=extent, cmap="viridis")
        axis.set(xlabel="round", title=f"{title}; white: not in the cohort")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        figure.colorbar(image, ax=axis)
    return _png(figure)


def _labels(reports: Sequence[RoundReport], classes: Sequence[str]) -> bytes:
    mixes = np.array([report.label_mix for report in reports])  # (rounds, classes)
    reference, places = np.array(reports[-1].reference), np.arange(mixes.shape[1])
    figure, axes = _figure(2)
    spread = np.abs(np.stack([mixes.min(0), mixes.max(0)]) - mixes.mean(0))
    axes[0].bar(places, mixes.mean(0), yerr=spread, color=_BLUE, capsize=2, ecolor=_GREY, label="merged batch")
    axes[0].step(places, reference, where="mid", color=_ORANGE, label="reference")
    axes[0].set(xlabel="class", ylabel="share", title="Label mix, mean and range over the rounds")
    if len(classes) == len(places) <= 40:
        axes[0].set_xticks(places, classes, rotation=90 if max(map(len, classes)) > 2 else 0)
    axes[0].legend()
    axes[1].plot([r.server_round for r in reports], [r.kl for r in reports], color=_BLUE, marker="o", markersize=3)
    axes[1].set(xlabel="round", ylabel="KL divergence", title="Merged label mix against the reference")
    axes[1].set_ylim(bottom=0)
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    axes[1].grid(alpha=0.3)
    return _png(figure)


def _figure(columns: int, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import, and only wanted at the end of a run

    figure = Figure(figsize=(6.4 * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
