"""Pictures of a federated search: confusion matrices, how adaptation ranks anew, accuracy by class."""

from __future__ import annotations

from typing import Any

from fl_edge.imbnas.ranking import kendall
from fl_edge.imbnas.report import FIXED, FOUND, UNADAPTED, ImbNasReport
from fl_edge.imbnas.search import best_so_far
from fl_edge.imbnas.tally import Tally
from fl_edge.plotting import BLUE, GREY, ORANGE, new_figure, png, set_title, shortened

_COLOURS = {FOUND: BLUE, UNADAPTED: ORANGE, FIXED: GREY}


def draw(report: ImbNasReport) -> dict[str, bytes]:
    """Return PNG pictures by file name: ``ranking.png``; of tested networks ``confusion.png``, ``classes.png``."""
    pictures = {"ranking.png": _ranking(report)}
    if report.confusions:
        pictures |= {"confusion.png": _confusion(report), "classes.png": _classes(report)}
    return pictures


def _ranking(report: ImbNasReport) -> bytes:
    """Draw the scores with adaptation over those without, and what the searches had found when."""
    figure = new_figure(11.0, 4.2)
    left, right = figure.subplots(1, 2)
    pairs = report.pairs()
    if pairs:
        before, after = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
        left.scatter(before, after, s=14, color=GREY, alpha=0.6)
        for name, architecture in report.contenders.items():
            for found, x, y in pairs:
                if found == architecture:
                    left.scatter([x], [y], s=60, color=_COLOURS[name], label=name)
        tau = kendall(before, after)
        left.set_title(f"{len(pairs)} architectures, Kendall's tau {tau:.2f}", loc="left", fontsize=11)
        if left.get_legend_handles_labels()[0]:
            left.legend(fontsize=8, loc="lower right")
    left.set(xlabel="score without adaptation (P0)", ylabel="score adapted to the tail")
    left.grid(alpha=0.3)
    for (name, history), colour in zip(report.histories.items(), (BLUE, ORANGE), strict=False):
        best = best_so_far(history)
        right.step(range(1, len(best) + 1), best, where="post", color=colour, label=name)
    right.set(xlabel="architectures scored", ylabel="score on validation images")
    right.grid(alpha=0.3)
    set_title(right, "Best so far, each by its own score")
    return png(figure)


def _confusion(report: ImbNasReport) -> bytes:
    """Draw a matrix a contender; rows add up to 1."""
    count = len(report.confusions)
    figure = new_figure(4.2 * count + 0.8, 4.4)
    axes = figure.subplots(1, count, squeeze=False)[0]
    image: Any = None
    for axis, (name, matrix) in zip(axes, report.confusions.items(), strict=True):
        shares = matrix.double() / matrix.sum(1, keepdim=True).clamp_min(1)
        image = axis.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
        axis.set_title(f"{name}: {Tally.from_confusion(matrix).balanced:.3f}", loc="left", fontsize=11)
        axis.set(xlabel="taken for")
        _name_classes(axis.set_xticks, report, rotation=90)
        _name_classes(axis.set_yticks, report)
    axes[0].set_ylabel("class")
    figure.colorbar(image, ax=list(axes), fraction=0.03, label="share of the class")
    return png(figure)


def _classes(report: ImbNasReport) -> bytes:
    """Draw accuracy by class, and how many training images each has."""
    figure = new_figure(8.0, 4.8)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2])
    places = range(len(report.classes))
    above.bar(places, report.counts.tolist(), color=GREY)
    above.set_yscale("symlog")
    above.set_title("Training images over all devices", loc="left", fontsize=11)
    width = 0.8 / len(report.confusions)
    for number, (name, matrix) in enumerate(report.confusions.items()):
        accuracy = Tally.from_confusion(matrix).per_class.tolist()
        beside = [place + width * (number + 0.5) - 0.4 for place in places]
        below.bar(beside, accuracy, width, color=_COLOURS[name], label=name)
    below.set(ylim=(0, 1.02), xlabel="class")
    below.grid(alpha=0.3, axis="y")
    _name_classes(below.set_xticks, report)
    set_title(below, "Accuracy on test images")
    return png(figure)


def _name_classes(set_ticks: Any, report: ImbNasReport, rotation: int = 0) -> None:
    if len(report.classes) <= 40:
        upright = rotation if max(map(len, report.classes)) > 2 else 0
        names = [shortened(name) for name in report.classes]
        set_ticks(range(len(names)), names, rotation=upright, fontsize=8)
