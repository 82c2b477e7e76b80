"""Pictures of a FedSpine run, drawn from its round reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_edge.fedspine.report import DeviceRound, RoundReport
from fl_edge.plotting import BLUE, GREY, ORANGE, count_rounds, marks, new_figure, png, set_title, shortened

_ROW = 0.16  # inches, of a device that gets its name beside it

Floats = NDArray[np.float64]


def draw(reports: Sequence[RoundReport]) -> dict[str, bytes]:
    """Return PNG pictures by file name: accuracy over time, the bandits' choices, and where the time went.

    Devices are ordered by their mean busy time, the fastest on top; those that never finished a round come last.

    Parameters
    ----------
    reports
        At least one round, in order.
    """
    fleet = _fleet(reports)
    return {
        "accuracy.png": _accuracy(reports),
        "choices.png": _choices(reports, fleet),
        "times.png": _times(reports, fleet),
    }


def _fleet(reports: Sequence[RoundReport]) -> list[str]:
    busy: dict[str, list[float]] = {}
    for report in reports:
        for device in report.devices:
            busy.setdefault(device.device, []).append(device.busy_s)
        for absent in report.absent:
            busy.setdefault(absent.device, [])
    return sorted(busy, key=lambda name: (not busy[name], fmean(busy[name] or [0.0]), len(name), name))


def _accuracy(reports: Sequence[RoundReport]) -> bytes:
    clocks: list[tuple[str, list[Any]]] = [("round", [report.server_round for report in reports])]
    if all(report.virtual_s is not None for report in reports):
        clocks.append(("virtual time (s)", [report.virtual_s for report in reports]))
    figure = new_figure(6.4 * len(clocks), 6.0)
    axes = figure.subplots(2, len(clocks), squeeze=False, sharex="col", sharey="row")
    for column, (label, times) in enumerate(clocks):
        above, below = axes[:, column]
        _line(above, times, [report.test_accuracy for report in reports], color=BLUE, label="test accuracy")
        gone = [[device.sparsity for device in report.devices] for report in reports]
        _range(above, times, gone, ORANGE, "sparsity, mean and range")
        above.set_ylim(-0.02, 1.02)
        _line(below, times, [report.test_loss for report in reports], color=BLUE, label="test")
        own = [[device.loss_after for device in report.devices] for report in reports]
        _line(below, times, [fmean(some) if some else None for some in own], color=GREY, lw=1, label="devices, mean")
        below.set_xlabel(label)
        for axis, title in ((above, "Accuracy and sparsity"), (below, "Loss")):
            axis.grid(alpha=0.3)
            set_title(axis, title)
        if label == "round":
            count_rounds(below)
    return png(figure)


def _choices(reports: Sequence[RoundReport], fleet: Sequence[str]) -> bytes:
    height = _height(fleet, 3.6, 15.0)
    figure = new_figure(16.0, height)
    axes = figure.subplots(1, 3, sharey=True)
    _map(axes[0], reports, fleet, _table(reports, fleet, lambda device: device.ratio), "Pruning ratio")
    ranks = sorted({device.rank for report in reports for device in report.devices})
    places = _table(reports, fleet, lambda device: ranks.index(device.rank))
    _map(axes[1], reports, fleet, places, "LoRA rank", levels=[str(rank) for rank in ranks])
    _map(axes[2], reports, fleet, _table(reports, fleet, lambda device: device.reward), "Reward", cmap="plasma")
    _name_devices(axes[0], fleet, height)
    return png(figure)


def _times(reports: Sequence[RoundReport], fleet: Sequence[str]) -> bytes:
    height = _height(fleet, 6.0, 9.0)
    figure = new_figure(12.8, height)
    left, right = figure.subfigures(1, 2)
    axis = left.subplots()
    busy = _table(reports, fleet, lambda device: device.busy_s)
    slowest = [max((device.busy_s for device in report.devices), default=None) for report in reports]
    share = busy / np.array([one or 1.0 for one in slowest])
    _map(axis, reports, fleet, share, "Busy time over that of the round's slowest device", top=1.0)
    _name_devices(axis, fleet, height)
    waiting, cells = right.subplots(2, 1, sharex=True)
    rounds = [report.server_round for report in reports]
    _line(waiting, rounds, slowest, color=GREY, lw=1, label="slowest device's busy time")
    _line(waiting, rounds, [report.waiting_s for report in reports], color=BLUE, label="waiting, mean")
    waiting.set(ylabel="seconds")
    set_title(waiting, "Waiting")
    leaves = [[device.cells for device in report.devices] for report in reports]
    _range(cells, rounds, leaves, BLUE, "mean and range")
    set_title(cells, "Leaves of a bandit's tree")
    count_rounds(cells)
    for each in (waiting, cells):
        each.grid(alpha=0.3)
        each.set_ylim(bottom=0)
    return png(figure)


def _table(reports: Sequence[RoundReport], fleet: Sequence[str], value: Callable[[DeviceRound], float]) -> Floats:
    """Return a number for each device and round, (devices, rounds); NaN where the device is absent."""
    row = {name: index for index, name in enumerate(fleet)}
    table = np.full((len(fleet), len(reports)), np.nan)
    for column, report in enumerate(reports):
        for device in report.devices:
            table[row[device.device], column] = value(device)
    return table


def _map(
    axis: Any,
    reports: Sequence[RoundReport],
    fleet: Sequence[str],
    table: Floats,
    title: str,
    *,
    cmap: str = "viridis",
    top: float | None = None,
    levels: Sequence[str] = (),
) -> None:
    """Draw a heat map; with levels, of places in them."""
    import matplotlib as mpl  # noqa: PLC0415 - see new_figure

    extent = (reports[0].server_round - 0.5, reports[-1].server_round + 0.5, max(len(fleet), 1) - 0.5, -0.5)
    shown = table if table.size else np.full((1, len(reports)), np.nan)
    low, high = (-0.5, len(levels) - 0.5) if levels else (0.0, top or np.nanmax(shown, initial=0.0) or 1.0)
    colours = mpl.colormaps[cmap].resampled(len(levels)) if levels else cmap
    image = axis.imshow(shown, aspect="auto", interpolation="nearest", extent=extent, cmap=colours, vmin=low, vmax=high)
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02, aspect=6 * axis.get_window_extent().height / axis.figure.dpi)
    if levels:
        bar.set_ticks(range(len(levels)), labels=levels)
    axis.set_title(title, loc="left", fontsize=11)
    count_rounds(axis)


def _name_devices(axis: Any, fleet: Sequence[str], height: float) -> None:
    every = max(1, math.ceil(_ROW * len(fleet) / height))
    axis.set_yticks(range(0, len(fleet), every), [shortened(name) for name in fleet[::every]], fontsize=7)
    axis.set_ylabel("device, fastest on top; white: absent")


def _line(axis: Any, times: Sequence[float], values: Sequence[float | None], **style: Any) -> None:
    """Draw what is known."""
    known = [(time, value) for time, value in zip(times, values, strict=True) if value is not None]
    if known:
        axis.plot(*zip(*known, strict=True), **style, **marks(known))


def _range(axis: Any, times: Sequence[float], values: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """Draw mean, smallest and largest of the devices' values over time."""
    known = [(time, min(some), fmean(some), max(some)) for time, some in zip(times, values, strict=True) if some]
    if known:
        at, low, mean, high = zip(*known, strict=True)
        axis.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
        axis.plot(at, mean, color=colour, label=label, **marks(known))


def _height(fleet: Sequence[str], least: float, most: float) -> float:
    return min(max(least, _ROW * len(fleet) + 1.2), most)
