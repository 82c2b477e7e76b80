"""Running speed on one job: LocalGrid against a plain Python loop, Flower's Ray simulation, and pfl.

The job is that of :mod:`benchmarks.runner_job`. All runners do the same 600 local steps on one torch thread. LocalGrid,
the loop and pfl choose the same clients and batches, so their accuracy must agree; Flower's Ray simulation numbers its
nodes at random and may choose others. Its rounds count from the moment when all clients have answered once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Benchmark, Case, Column, Results, Target
from benchmarks.runner_job import Job, Outcome, run_loop

LOCAL, LOOP, COPIES = "fl_edge LocalGrid", "plain loop", "plain loop, deepcopy"
PFL, RAY = "pfl", "Flower Ray simulation"


def _runners() -> Mapping[str, Callable[[Job], Outcome]]:
    """Return the runner of each case; peers are imported only here, when they are installed."""
    from benchmarks.runner_flower import run_local_grid, run_ray

    def run_pfl(job: Job) -> Outcome:
        from benchmarks import runner_pfl

        return runner_pfl.run_pfl(job)

    return {
        LOCAL: run_local_grid,
        LOOP: run_loop,
        COPIES: lambda job: run_loop(job, reuse=False),
        PFL: run_pfl,
        RAY: run_ray,
    }


def prepare(seeds: Sequence[int], quick: bool) -> None:  # noqa: ARG001
    """Run the job once in each runner of this process, so that no measurement pays for first calls."""
    torch.set_num_threads(1)
    for case, runner in _runners().items():
        if case != RAY and not (case == PFL and _no_pfl()):
            runner(Job(seed=seeds[0]))


def _no_pfl() -> bool:
    try:
        import pfl  # noqa: F401
    except ImportError:
        return True
    return False


def measure(case: str, seed: int, quick: bool) -> Mapping[str, Any]:  # noqa: ARG001
    """Run the job once; quick means fewer repetitions of the same job."""
    job = Job(seed=seed)
    outcome = _runners()[case](job)
    if outcome.steps != job.steps:
        raise RuntimeError(f"{case} did {outcome.steps} local steps, not {job.steps}")
    task_ms = 1000 * outcome.seconds / (job.rounds * job.per_round)
    return {**dataclasses.asdict(outcome), "task_ms": task_ms}


def targets(results: Results) -> list[Target]:
    """Return the two lines of the issue's table, over medians of the rounds' time.

    The plain loop of the job's description makes a deep copy of the model for each client. The line against the loop
    that reuses one model is stricter, and our own.
    """
    copies, reused = (results.ratio(LOCAL, loop, "seconds") for loop in (COPIES, LOOP))
    ray = results.ratio(RAY, LOCAL, "seconds")
    return [
        Target.at_most("time of LocalGrid / time of the plain loop (a deep copy of the model a client)", copies, 1.15),
        Target.at_most("time of LocalGrid / time of a plain loop that reuses one model (ours)", reused, 1.15),
        Target.at_least("time of Flower's Ray simulation, without its start / time of LocalGrid", ray, 10),
    ]


def figure(results: Results, path: Path) -> None:
    """Draw each runner's time for the rounds on a logarithmic axis: every measurement, median and quartiles."""
    from matplotlib.figure import Figure

    base = results.center(LOOP, "seconds")
    cases = [case for case in (LOOP, COPIES, LOCAL, PFL, RAY) if case in results.summary][::-1]
    drawing = Figure(figsize=(8, 3), layout="constrained")
    axes = drawing.subplots()
    largest = 0.0
    for row, case in enumerate(cases):
        entry, values = results.summary[case]["seconds"], results.values(case, "seconds")
        color = "tab:orange" if case == LOCAL else "tab:gray"
        spread = [[entry["median"] - entry["q1"]], [entry["q3"] - entry["median"]]]
        axes.plot(values, [row] * len(values), "|", color=color, alpha=0.6, markersize=10)
        axes.errorbar(entry["median"], row, xerr=spread, fmt="o", color=color, ecolor="black", capsize=4)
        times = f", {entry['median'] / base:.2f} times the loop" if base else ""
        axes.annotate(
            f"{entry['median']:.3g} s{times}", (max(values), row), (10, 0), textcoords="offset points", va="center"
        )
        largest = max(largest, *values)
    axes.set_yticks(range(len(cases)), cases)
    axes.set_xscale("log")
    axes.set_ylim(-0.6, len(cases) - 0.4)
    axes.set_xlim(right=12 * largest)  # room for the words beside the last point
    axes.set_xlabel("real seconds for 200 client tasks (median, quartiles, all measurements)")
    axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=150)


BENCHMARK = Benchmark(
    cases=(
        Case(LOCAL, repetitions=7, quick_repetitions=3),
        Case(LOOP, repetitions=7, quick_repetitions=3),
        Case(COPIES, repetitions=7, quick_repetitions=3),
        Case(PFL, repetitions=7, quick_repetitions=3, needs=("pfl",)),
        Case(RAY, repetitions=2, quick_repetitions=1, needs=("ray",)),
    ),
    columns={
        "seconds": Column("20 rounds", "real_s", 3),
        "task_ms": Column("client task", "real_ms", 2),
        "start_seconds": Column("start", "real_s", 3),
        "accuracy": Column("test accuracy"),
        "steps": Column("local steps", digits=0),
    },
    measure=measure,
    targets=targets,
    figure=figure,
    prepare=prepare,
    seeds=(0, 1, 2),
    quick_seeds=(0,),
    settings={**{key: value for key, value in dataclasses.asdict(Job()).items() if key != "seed"}, "torch_threads": 1},
    packages=("pfl",),
)
