"""The picture of :mod:`benchmarks.hat`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import hat_real
from benchmarks.harness import Results
from benchmarks.hat_accept import DRAFTS, accept_case
from benchmarks.hat_cloud import LOADS, MODELS, cloud_case
from benchmarks.hat_virtual import row_case
from fl_edge.hat.simulated_report import ROWS, WITHIN
from fl_edge.plotting import BLUE, GREY, ORANGE, new_figure


def figure(results: Results, path: Path) -> None:
    """Draw TTFT and TBT of the real run, the paper's rows against the virtual clock, accept length, and the cloud."""
    drawing = new_figure(13, 9)
    axes = drawing.subplots(2, 2)
    _real(axes[0, 0], results)
    _rows(axes[0, 1], results)
    _bars(
        axes[1, 0],
        {name: results.center(accept_case(name), "accept_length") for name in DRAFTS},
        "Accept length on held-out text",
    )
    axes[1, 0].axvline(2.06, color="black", linestyle=":")
    _bars(
        axes[1, 1],
        {
            cloud_case(model, load).partition(": ")[2]: results.center(cloud_case(model, load), "of_bare")
            for model in MODELS
            for load in LOADS
        },
        "Cloud: verification rows a second, of the bare forward's",
    )
    axes[1, 1].axvline(0.8, color="black", linestyle=":")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=150)


def _real(axis: Any, results: Results) -> None:
    cases = [case.name for case in hat_real.CASES if results.center(case.name, "ttft_ms") is not None]
    places = range(len(cases))
    first = [(results.center(case, "ttft_ms") or 0) / 1e3 for case in cases]
    between = [(results.center(case, "tbt_ms") or 0) / 1e2 for case in cases]
    axis.barh([place - 0.2 for place in places], first, 0.38, color=ORANGE, label="TTFT, s")
    axis.barh([place + 0.2 for place in places], between, 0.38, color=BLUE, label="TBT, tenths of a second")
    axis.set_yticks(places, [case.removeprefix(hat_real.PREFIX) for case in cases], fontsize=8)
    axis.set_title("Real run, links and delays as in the paper's 13B setting, in slow motion", loc="left", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    axis.invert_yaxis()


def _rows(axis: Any, results: Results) -> None:
    known = [
        (row.paper, value, row.set_on)
        for number, row in enumerate(ROWS)
        if (value := results.center(row_case(number), "simulated")) is not None
    ]
    if known:
        low, high = min(paper for paper, *_ in known) / 1.5, max(paper for paper, *_ in known) * 1.5
        axis.plot([low, high], [low, high], color=GREY, linewidth=1)
        axis.fill_between(
            [low, high], [low * (1 - WITHIN), high * (1 - WITHIN)], [low * (1 + WITHIN), high * (1 + WITHIN)],
            color=GREY, alpha=0.2,
        )  # fmt: skip
    for set_on, color, label in ((True, GREY, "constants set on it"), (False, BLUE, "predicted")):
        mine = [(paper, value) for paper, value, on in known if on == set_on]
        axis.plot(
            [paper for paper, _ in mine], [value for _, value in mine], "o", color=color, markersize=4, label=label
        )
    axis.set(xscale="log", yscale="log", xlabel="paper: ms, %, or times", ylabel="virtual clock")
    axis.set_title(f"The paper's {len(ROWS)} rows (band: {WITHIN:.0%})", loc="left", fontsize=10)
    axis.legend(fontsize=8, frameon=False)


def _bars(axis: Any, values: dict[str, float | None], title: str) -> None:
    names = [name for name, value in values.items() if value is not None]
    axis.barh(names, [values[name] or 0 for name in names], color=BLUE)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title(title, loc="left", fontsize=10)
    axis.invert_yaxis()
