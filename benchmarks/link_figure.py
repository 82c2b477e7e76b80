"""The picture of :mod:`benchmarks.link`: exchange times, the server's memory, and FedAvg's whole time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import Results

COLORS = {"ours": "tab:orange", "bare": "tab:gray", "flower": "tab:blue"}
NAMES = {"ours": "ResidentGrid", "bare": "bare gRPC echo", "flower": "Flower's grid"}


def figure(results: Results, path: Path) -> None:
    """Draw the three panels; what was not measured is left out."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 7), layout="constrained")
    panels: dict[str, Any] = drawing.subplot_mosaic([["times", "times"], ["memory", "fedavg"]], height_ratios=[1.5, 1])
    values = {record["case"]: record["values"] for record in results.raw}
    _draw_times(panels["times"], values)
    for case, found in values.items():
        if "curve" in found:
            _draw_memory(panels["memory"], case, found["curve"])
        elif "rounds" in found:
            _draw_whole(panels["fedavg"], f"{case}, {found['rounds']} rounds", found)
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=150)


def _draw_times(axes: Any, values: dict[str, dict[str, Any]]) -> None:
    """Draw, for each case and system, median, 5th to 95th percentile, and the 99th."""
    ticks, row, largest = {}, 0.0, 1.0
    for case, found in reversed(values.items()):
        systems = [name for name in COLORS if f"{name}_ms" in found][::-1]
        if "curve" in found or "rounds" in found or not systems:
            continue
        ticks[row + (len(systems) - 1) / 2] = case
        for name in systems:
            median, high, color = found[f"{name}_ms"], found[f"{name}_p99_ms"], COLORS[name]
            range_ms = found.get(f"{name}_percentiles_ms", {"5": median, "95": high})
            axes.plot([range_ms["5"], range_ms["95"]], [row, row], color=color, linewidth=6, alpha=0.4)
            axes.plot(high, row, "|", color=color, markersize=10)
            axes.plot(median, row, "o", color=color)
            text = f"{NAMES[name]} {_time(median)}"
            axes.annotate(
                text, (max(high, range_ms["95"]), row), (8, 0), textcoords="offset points", va="center", fontsize=8
            )
            largest, row = max(largest, high), row + 1
        row += 0.7
    axes.set_xscale("log")
    axes.set_xlim(right=8 * largest)  # room for the words
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(
        "real ms, there and back: median, 5 % to 95 %, tick at 99 % (message to handler: one way, tick at the worst)"
    )
    axes.grid(axis="x", alpha=0.3)


def _time(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def _draw_memory(axes: Any, case: str, curve: list[tuple[int, float, float]]) -> None:
    numbers, resident, held = zip(*curve, strict=True)
    axes.plot(numbers, resident, color=COLORS["ours"], label="resident")
    axes.plot(numbers, held, color="black", linewidth=1, label="allocated")
    axes.legend(fontsize=8, loc="lower right")
    axes.axvline(50, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.2 * max(resident))
    axes.set_xlabel("exchange")
    axes.set_ylabel("MiB, server process")
    axes.set_title(case, fontsize=10)


def _draw_whole(axes: Any, title: str, found: dict[str, Any]) -> None:
    names = ["flower", "ours"]
    seconds = [found[f"{name}_ms"] / 1000 for name in names]
    bars = axes.barh([NAMES[name] for name in names], seconds, color=[COLORS[name] for name in names])
    axes.bar_label(bars, [f"{each:.1f} s" for each in seconds], padding=4)
    axes.set_xlim(right=1.2 * max(seconds))
    axes.set_xlabel("real s, from submission to the end")
    axes.set_title(title, fontsize=10)
