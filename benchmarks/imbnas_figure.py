"""The picture of :mod:`benchmarks.imbnas`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import Results
from benchmarks.imbnas_found import compared, found_case, loss_case
from benchmarks.imbnas_ranks import RANKERS, rank_case
from benchmarks.imbnas_tasks import OTHER, PAIRS, SAME, SYNTHETIC
from fl_edge.imbnas.config import LOSSES
from fl_edge.imbnas.tally import GROUPS
from fl_edge.plotting import BLUE, GREY, ORANGE, new_figure

_THICK = {"P1": BLUE, "own": ORANGE, "P0": "black"}
_THIN = ("skyblue", "tab:green", "tab:olive", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:cyan")
_COLOURS = _THICK | dict(zip([ranker for ranker in RANKERS if ranker not in _THICK], _THIN, strict=True))


def figure(results: Results, path: Path) -> None:
    """Draw tau by ratio and by source, what searches find, and accuracy by class group and loss."""
    drawing = new_figure(14, 10)
    axes = drawing.subplots(2, 2)
    _by_ratio(axes[0, 0], results)
    _by_pair(axes[0, 1], results)
    _found(axes[1, 0], results)
    _groups(axes[1, 1], results)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=150)


def _by_ratio(axis: Any, results: Results) -> None:
    ratios = PAIRS[SAME].ratios
    for ranker in RANKERS:
        entries = [results.summary.get(rank_case(SAME, ratio, ranker), {}).get("tau") for ratio in ratios]
        known = [(ratio, entry) for ratio, entry in zip(ratios, entries, strict=True) if entry is not None]
        if known:
            axis.plot(
                [ratio for ratio, _ in known],
                [entry["mean"] for _, entry in known],
                marker="o",
                color=_COLOURS[ranker],
                linewidth=2.2 if ranker in _THICK else 1.0,
                label=ranker,
            )
    axis.set(xscale="log", xlabel="ratio of the tail", ylabel="Kendall's tau with the truth")
    axis.set_xticks(ratios, [str(ratio) for ratio in ratios])
    axis.minorticks_off()
    axis.set_title(f"{SAME}: ranks of all {PAIRS[SAME].space.size} paths", loc="left", fontsize=11)
    axis.legend(fontsize=8, frameon=False, ncol=6, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _by_pair(axis: Any, results: Results) -> None:
    pairs, width = list(PAIRS), 0.8 / len(RANKERS)
    for number, ranker in enumerate(RANKERS):
        entries = [results.summary.get(rank_case(pair, 100, ranker), {}).get("tau") for pair in pairs]
        known = [(place, entry) for place, entry in enumerate(entries) if entry is not None]
        if not known:
            continue
        heights = [entry["mean"] for _, entry in known]
        spread = [
            [entry["mean"] - entry["low"] if entry["low"] is not None else 0 for _, entry in known],
            [entry["high"] - entry["mean"] if entry["high"] is not None else 0 for _, entry in known],
        ]
        places = [place + (number - (len(RANKERS) - 1) / 2) * width for place, _ in known]
        axis.bar(places, heights, width, yerr=spread, label=ranker, color=_COLOURS[ranker], error_kw={"lw": 0.7})
    axis.set_xticks(range(len(pairs)), pairs)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_title("Kendall's tau with the truth, ratio 100, by source", loc="left", fontsize=11)
    axis.legend(fontsize=8, frameon=False, ncol=5, loc="upper center", bbox_to_anchor=(0.5, -0.06))


def _found(axis: Any, results: Results) -> None:
    names, known = compared(SAME), []
    for offset, pair, color in ((-0.27, SAME, GREY), (0, OTHER, BLUE), (0.27, SYNTHETIC, ORANGE)):
        values = [results.center(found_case(pair, 100, who), "chosen") for who in names]
        shown = [(place + offset, value) for place, value in enumerate(values) if value is not None]
        axis.barh([place for place, _ in shown], [value for _, value in shown], 0.26, color=color, label=pair)
        known += [value for _, value in shown]
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(left=max(0, min(known, default=0) - 0.05))
    axis.set_title("Balanced accuracy of what is found, ratio 100", loc="left", fontsize=11)
    axis.legend(fontsize=8, frameon=False, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.06))


def _groups(axis: Any, results: Results) -> None:
    for number, (group, color) in enumerate(zip(GROUPS, (GREY, BLUE, ORANGE), strict=True)):
        values = [results.center(loss_case(SAME, loss), group) or 0 for loss in LOSSES]
        axis.bar([place + (number - 1) * 0.27 for place in range(len(LOSSES))], values, 0.26, color=color, label=group)
    axis.set_xticks(range(len(LOSSES)), [loss.replace("_", "\n") for loss in LOSSES], fontsize=8)
    axis.set_title(f"{SAME}, ratio 100: accuracy by class group and loss, same path", loc="left", fontsize=11)
    axis.legend(fontsize=8, frameon=False, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
