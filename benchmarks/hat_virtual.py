"""The virtual clock, of :mod:`benchmarks.hat`: the paper's tables row by row, and its settings with our drafts.

The rows are those of :mod:`fl_edge.hat.simulated_report`, which says what its constants are set on and why some rows
are off. *Measured drafts*: the same two settings, with the accept lengths of this benchmark's own adapter and heads.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from statistics import fmean

from scipy.optimize import brentq  # type: ignore[import-untyped]

from benchmarks.hat_accept import MEDUSA_DRAFTS, OURS, measure_accept, measured_length
from fl_edge.hat.simulated_device import Drafting
from fl_edge.hat.simulated_report import CNN_DM, METHODS, ROWS, SPECBENCH, Found, Row, reproduce
from fl_edge.hat.simulation import simulate

SEEDS, QUICK_SEEDS, QUICK_REQUESTS = 3, 1, 60
SETTINGS = {"7B": SPECBENCH, "13B": CNN_DM}
OWN_METHODS = ("HAT", "U-Sarathi", "U-Medusa", "U-shape")
_FIGURES = {
    "ttft_ms": "TTFT, ms",
    "tbt_ms": "TBT, ms",
    "batch_ms": "in-cloud delay a batch, ms",
    "tenth_token_ms": "10 tokens, median ms",
    "tbt_reduction": "TBT of HAT below it, %",
    "speed_up": "speed-up over U-shape",
}


def row_case(number: int) -> str:
    """Return what the table calls a row of the paper."""
    row = ROWS[number]
    return f"paper {number + 1:02d}: {row.setting}, {row.method}, {_FIGURES[row.figure]}"


def own_case(setting: str, method: str) -> str:
    """Return what the table calls a simulation with measured accept lengths."""
    return f"measured drafts: {setting}, {method}"


def row_of(case: str) -> Row:
    """Return the paper's row of a case."""
    return ROWS[int(case[6:8]) - 1]


def measure_row(number: int, quick: bool) -> dict[str, float]:
    """Return a figure of the paper, the simulation's, and how far it is off."""
    found = _reproduced(quick)[number]
    return {"paper": found.row.paper, "simulated": found.value, "off": found.error, "within": float(found.reproduced)}


def measure_own(setting: str, method: str, quick: bool) -> dict[str, float]:
    """Return TTFT and TBT of a setting in virtual seconds, with drafts as those measured here."""
    base = SETTINGS[setting]
    drafting = _drafting(OURS, quick)
    medusa = Drafting(measured_length(MEDUSA_DRAFTS, quick), 1.0, cap=4)
    base = replace(base, drafting=drafting, medusa=medusa)
    base = replace(base, requests=QUICK_REQUESTS) if quick else base
    seeds = range(QUICK_SEEDS if quick else SEEDS)
    figures = [simulate(replace(base, seed=seed), METHODS[method]).figures() for seed in seeds]
    return {f"virtual_{name}_s": fmean(each[f"{name}_ms"] for each in figures) / 1e3 for name in ("ttft", "tbt")}


def _drafting(drafts: str, quick: bool) -> Drafting:
    """Return drafts as many a round, and as many of them accepted, as measured."""
    found, cap = measure_accept(drafts, quick), Drafting.cap
    confident = brentq(lambda chance: sum(chance**n for n in range(cap)) - min(found["drafted"], cap), 0, 1)
    return Drafting(found["accept_length"], confident, cap)


@functools.cache
def _reproduced(quick: bool) -> list[Found]:
    return reproduce(seeds=QUICK_SEEDS if quick else SEEDS)
