"""Pictures of a pruning on many devices, drawn from its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fl_edge.comp.report import DeviceRow
from fl_edge.plotting import BLUE, GREY, ORANGE, new_figure, png, set_title, shortened
from fl_edge.pruning import PruningPlan


def draw(devices: Sequence[DeviceRow]) -> dict[str, bytes]:
    """Return PNG pictures by file name: perplexity and size by device, and what is kept of each layer.

    Parameters
    ----------
    devices
        At least one.
    """
    return {"devices.png": _devices(devices), "layers.png": _layers(devices)}


def _devices(devices: Sequence[DeviceRow]) -> bytes:
    figure = new_figure(max(6.4, 0.9 * len(devices) + 2), 7.2)
    above, below = figure.subplots(2, 1, sharex=True)
    figures = [row.outcome.figures for row in devices]
    pairs: list[tuple[Any, str, list[tuple[float, float]]]] = [
        (above, "Perplexity", [each.perplexity for each in figures]),
        (below, "Parameters, million", [(a / 1e6, b / 1e6) for a, b in (each.parameters for each in figures)]),
    ]
    places = range(len(devices))
    for axis, title, values in pairs:
        axis.bar([place - 0.2 for place in places], [pair[0] for pair in values], 0.4, color=GREY, label="before")
        axis.bar([place + 0.2 for place in places], [pair[1] for pair in values], 0.4, color=BLUE, label="after")
        axis.grid(alpha=0.3, axis="y")
        set_title(axis, title)
    names = [f"{shortened(row.device)}\n{row.ratio:g}" for row in devices]
    below.set_xticks(places, names, fontsize=8)
    below.set_xlabel("device and its ratio")
    return png(figure)


def _layers(devices: Sequence[DeviceRow]) -> bytes:
    """Draw each plan once, whichever devices have it."""
    plans: dict[str, tuple[PruningPlan, list[str]]] = {}
    for row in devices:
        plans.setdefault(row.outcome.plan.digest(), (row.outcome.plan, []))[1].append(row.device)
    figure = new_figure(8.0, 1.6 * len(plans) + 1.2)
    axes = figure.subplots(len(plans), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (plan, names) in zip(axes, plans.values(), strict=True):
        for unit, colour, shift in (("heads", ORANGE, -0.2), ("channels", BLUE, 0.2)):
            kept = [len(getattr(layer, unit)) / getattr(plan, unit)[place] for place, layer in enumerate(plan.layers)]
            axis.bar([place + shift for place in range(len(kept))], kept, 0.4, color=colour, label=f"{unit} kept")
        axis.set_ylim(0, 1.05)
        axis.grid(alpha=0.3, axis="y")
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        set_title(axis, ", ".join(map(shortened, names[:2])) + more)
    axes[-1].locator_params(axis="x", integer=True)
    axes[-1].set_xlabel("layer")
    return png(figure)
