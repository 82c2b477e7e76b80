"""Planning a MergeSFL round: seconds, memory, and how balanced the cohort is, against pygad and a local search.

All solvers of a row get the very same problem: label distributions, fixed batch sizes, priorities, budget, reference.
The time of ours is that of a whole plan (batch regulation, selection, tuning, filling); its KL is that of the cohort as
chosen, which is what the others optimise. The local search gets exactly as long as ours took, and where that is short
also a second; pygad gets as long as ours, at least a second. All run on one BLAS thread: a second one does not help
any of them, and its waiting disturbs the times.
"""

from __future__ import annotations

import functools
import math
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Benchmark, Case, Column, Results, Target
from benchmarks.plan_peers import local_search, pygad_search
from fl_edge.mergesfl.config import MergeSFLConfig
from fl_edge.mergesfl.planning import make_plan, pose, select
from fl_edge.mergesfl.selection import Problem
from fl_edge.mergesfl.workers import Workers

BUDGET = 0.3  # share of all workers' batches that fits
SPREAD = 30.0  # the slowest worker's seconds a sample, by the fastest one's


@dataclass(frozen=True)
class Setting:
    """One problem size: its time limit for ours, and what the peers' own case (uniform mix, equal batches) changes."""

    workers: int
    classes: int
    limit_s: float
    repetitions: int
    uniform: bool = False

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.workers:,} workers, {self.classes} classes{', uniform' if self.uniform else ''}"


# Dirichlet(0.35) and a budget of 40 % of equal batches: all workers together are then as far from the uniform mix as in
# the case that several libraries were measured on before (0.024), whose data were not kept.
UNIFORM = Setting(40, 10, 1.0, 3, uniform=True)
SETTINGS = (
    UNIFORM,
    *(
        Setting(workers, classes, limit_s, repetitions)
        for workers, limit_s, repetitions in ((80, 0.05, 7), (1_000, 1.0, 3), (10_000, 15.0, 1))
        for classes in (10, 100)
    ),
)
OURS, SAME, SECOND, PYGAD = "ours", "local search, same time", "local search, 1 s", "pygad"


def draw(setting: Setting, seed: int) -> tuple[Workers, MergeSFLConfig, Problem]:
    """Return workers, settings and selection problem: skewed labels, log-uniform costs, uneven histories."""
    rng = np.random.default_rng(seed)
    labels = rng.dirichlet(np.full(setting.classes, 0.35 if setting.uniform else 0.1), setting.workers)
    workers = Workers(
        labels=labels / labels.sum(axis=1, keepdims=True),
        samples=rng.integers(64, 1_000, setting.workers),
        compute_s=0.01 * SPREAD ** rng.random(setting.workers),
        transfer_s=np.full(setting.workers, 1e-4),
        participation=rng.integers(0, 10, setting.workers),
    )
    config = MergeSFLConfig(batches="equal" if setting.uniform else "regulated", ingress_batches=float(setting.workers))
    every = int(pose(workers, config).batch_sizes.sum())
    share = 0.4 if setting.uniform else BUDGET
    config = replace(config, ingress_batches=share * every / config.batch_size)
    problem = pose(workers, config)
    if setting.uniform:
        problem = replace(problem, reference=np.full(setting.classes, 1 / setting.classes))
    return workers, config, problem


def timed_plan(setting: Setting, seed: int) -> tuple[float, float | None]:
    """Return the seconds of one plan and its KL; with the uniform mix, the seconds of the choice alone."""
    workers, config, problem = draw(setting, seed)
    started = time.perf_counter()
    if setting.uniform:
        select(problem, config, np.random.default_rng(seed))
        return time.perf_counter() - started, None
    plan = make_plan(workers, config, np.random.default_rng(seed))
    return time.perf_counter() - started, plan.kl


@functools.cache
def peak_mib(setting: Setting) -> float:
    """Return what one plan allocates at its peak, on top of its arguments."""
    workers, config, _ = draw(setting, 0)
    tracemalloc.start()
    make_plan(workers, config, np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


_took: dict[tuple[Setting, int], float] = {}  # seconds of ours, for the peers that follow


def measure(case: str, seed: int, quick: bool) -> Mapping[str, Any]:  # noqa: ARG001 - quick means fewer seeds
    """Solve one problem with one solver."""
    solver, _, name = case.partition(": ")
    setting = next(setting for setting in SETTINGS if setting.name == name)
    _, config, problem = draw(setting, seed)
    values: dict[str, Any] = {}
    if solver == OURS:
        seconds, values["plan_kl"] = timed_plan(setting, seed)
        _took[setting, seed] = seconds
        divergence = float(problem.score(select(problem, config, np.random.default_rng(seed))[None])[0][0])
        values["peak_mib"] = peak_mib(setting)
    else:
        budget_s = _took.get((setting, seed)) or timed_plan(setting, seed)[0]
        budget_s = budget_s if solver == SAME else max(1.0, budget_s)
        started = time.perf_counter()
        if solver == PYGAD:
            divergence = pygad_search(problem, seed, budget_s)
        else:
            divergence = local_search(problem, np.random.default_rng(seed), budget_s)
        seconds = time.perf_counter() - started
    return {**values, "seconds": seconds, "kl": divergence, "log_kl": math.log10(max(divergence, 1e-16))}


def prepare(seeds: Sequence[int], quick: bool) -> None:  # noqa: ARG001
    """Plan once, so that no measurement pays for first calls."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
    for setting in SETTINGS[:3]:
        timed_plan(setting, seeds[0])


def targets(results: Results) -> list[Target]:
    """Return time and quality of ours for every size; quality as ratios of KL, their geometric mean and the worst."""
    lines = []
    for setting in SETTINGS:
        name, ours = setting.name, f"{OURS}: {setting.name}"
        lines.append(Target.at_most(f"{name}: seconds a plan", results.center(ours, "seconds"), setting.limit_s))
        if setting.uniform:
            center = results.center(ours, "kl")
            lines.append(Target.at_most(f"{name}: KL to the uniform mix, mean over seeds", center, 1e-3))
        for peer in (SAME, PYGAD):
            mean, worst = ratios(results, setting, peer)
            lines.append(Target.at_most(f"{name}: KL of ours / {peer}, geometric mean over seeds", mean, 1.0))
            lines.append(Target.at_most(f"{name}: KL of ours / {peer}, worst seed", worst, 1.0))
    return lines


def ratios(results: Results, setting: Setting, peer: str) -> tuple[float | None, float | None]:
    """Return geometric mean and maximum over seeds of KL of ours / KL of a peer; 1e-6 off counts as equal."""
    known = {
        solver: {record["seed"]: record["values"]["log_kl"] for record in results.raw if record["case"] == case}
        for solver in (OURS, peer)
        for case in (f"{solver}: {setting.name}",)
    }
    logs = [round(known[OURS][seed] - value, 6) for seed, value in known[peer].items() if seed in known[OURS]]
    return (10 ** (sum(logs) / len(logs)), 10 ** max(logs)) if logs else (None, None)


def figure(results: Results, path: Path) -> None:
    """Draw KL against seconds, one panel a problem size; every seed is a point."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 7), layout="constrained")
    panels = drawing.subplots(3, 2).T.ravel()
    colors = {OURS: "tab:orange", SAME: "tab:gray", SECOND: "silver", PYGAD: "tab:blue"}
    shown = [setting for setting in SETTINGS if not setting.uniform]
    for axes, setting in zip(panels, sorted(shown, key=lambda setting: setting.classes), strict=True):
        for solver, color in colors.items():
            case = f"{solver}: {setting.name}"
            axes.loglog(results.values(case, "seconds"), results.values(case, "kl"), "o", color=color, label=solver)
        axes.set_title(setting.name, fontsize=10)
        axes.set_xlim(0.02, 20)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8)
    drawing.supxlabel("real seconds")
    drawing.supylabel("KL of the chosen cohort (nats, lower is better)")
    drawing.savefig(path, dpi=150)


def _cases() -> list[Case]:
    cases = []
    for setting in SETTINGS:
        cases.append(Case(f"{OURS}: {setting.name}", setting.repetitions, min(setting.repetitions, 3)))
        cases.append(Case(f"{SAME}: {setting.name}"))
        if setting.limit_s < 1:
            cases.append(Case(f"{SECOND}: {setting.name}"))
        cases.append(Case(f"{PYGAD}: {setting.name}", needs=("pygad",)))
    return cases


BENCHMARK = Benchmark(
    cases=_cases(),
    columns={
        "seconds": Column("time", "real_s", 3),
        "log_kl": Column("log10 KL", digits=2),
        "kl": Column("KL", digits=6),
        "plan_kl": Column("KL of the filled plan", digits=6),
        "peak_mib": Column("peak MiB", digits=1),
    },
    measure=measure,
    targets=targets,
    figure=figure,
    prepare=prepare,
    seeds=(0, 1, 2, 3, 4),
    quick_seeds=(0, 1, 2),
    settings={"blas_threads": 1, "budget": BUDGET, "spread": SPREAD, "sizes": [setting.name for setting in SETTINGS]},
    packages=("pygad", "scipy"),
)
