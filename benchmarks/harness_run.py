"""How a benchmark is run: in which order, what is written down, and what is taken over after an interruption."""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.harness import Benchmark, Case, Results
from benchmarks.harness_record import (
    Partial,
    describe_machine,
    describe_source,
    fingerprint,
    now,
    versions,
    write_whole,
)
from benchmarks.harness_report import print_tables, summarize

INSTALL = 'pip install ".[bench]"'
PACKAGES = ("fl-edge", "flwr", "ray", "torch", "numpy", "scikit-learn")


def run_benchmark(
    benchmark: Benchmark,
    name: str,
    folder: Path,
    *,
    quick: bool = False,
    seeds: Sequence[int] | None = None,
    sources: Sequence[Path] = (),
    console: Console | None = None,
) -> int:
    """Run a benchmark to its end, print its table, and write ``NAME[.quick].json`` and the PNG beside it.

    Parameters
    ----------
    benchmark, name
        What to run, and what to call its files.
    folder
        Where results go; unfinished ones to ``partial/`` in it.
    sources
        Files whose change makes an interrupted run start anew.

    Returns
    -------
    int
        0 when all was measured, whether targets hold or not; 1 when a measurement failed.
    """
    # a pipe or a file has no width: rich would take 80 columns, too few for a table of intervals
    console = console or Console(width=None if sys.stdout.isatty() else 140)
    chosen = list(dict.fromkeys(seeds or (benchmark.quick_seeds if quick else benchmark.seeds)))
    missing = {case.name: absent for case in benchmark.cases if (absent := _absent(case.needs))}
    plan = [
        (case.name, seed, repetition)
        for seed in chosen
        for repetition in range(max(_repetitions(case, quick) for case in benchmark.cases))
        for case in benchmark.cases
        if repetition < _repetitions(case, quick) and case.name not in missing
    ]
    stem = f"{name}.quick" if quick else name
    package_versions = versions([*PACKAGES, *benchmark.packages])
    key = fingerprint({"settings": benchmark.settings, "plan": plan, "versions": package_versions}, sources)
    partial = Partial(folder / "partial", stem, key)
    for line in partial.describe():
        console.print(line)
    started = partial.started
    try:
        _measure_all(benchmark, plan, partial, quick, chosen, console)
    except Exception as error:  # whatever a peer or our own code raises: say where, keep what was measured
        console.print_exception()
        console.print(f"{stem}: failed: {type(error).__name__}; finished measurements are kept", style="bold red")
        return 1

    raw = partial.records
    results = Results(raw, summarize(raw, benchmark.columns), missing)
    targets = list(benchmark.targets(results))
    seed_words = " ".join(map(str, chosen))
    document = {
        "benchmark": name,
        "quick": quick,
        "command": f"python -m benchmarks {name}{' --quick' if quick else ''} --seeds {seed_words}",
        "started": started,
        "ended": now(),
        "sittings": partial.sittings,
        "commit": describe_source(),
        "machine": describe_machine(),
        "versions": package_versions,
        "seeds": chosen,
        "settings": dict(benchmark.settings),
        "targets": [vars(target) for target in targets],
        "missing": [{"case": case, "needs": list(needs), "install": INSTALL} for case, needs in missing.items()],
        "columns": {key: column.heading for key, column in benchmark.columns.items()},
        "summary": results.summary,
        "raw": raw,
    }
    write_whole(folder / f"{stem}.json", document, folder / f"{stem}.png", lambda path: benchmark.figure(results, path))
    partial.remove()
    print_tables(console, stem, [case.name for case in benchmark.cases], benchmark.columns, results, targets, INSTALL)
    return 0


def _repetitions(case: Case, quick: bool) -> int:
    return case.quick_repetitions if quick else case.repetitions


def _absent(modules: Sequence[str]) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def _measure_all(
    benchmark: Benchmark,
    plan: Sequence[tuple[str, int, int]],
    partial: Partial,
    quick: bool,
    seeds: Sequence[int],
    console: Console,
) -> None:
    """Measure what the partial file does not hold yet, and say after each what is left."""
    todo = [item for item in plan if item not in partial.done]
    if todo and benchmark.prepare is not None:
        console.print("preparing ...")
        benchmark.prepare(seeds, quick)
    took: dict[str, list[float]] = {}
    for index, (case, seed, repetition) in enumerate(todo, start=1):
        gc.collect()
        started = time.perf_counter()
        values = dict(benchmark.measure(case, seed, quick))
        took.setdefault(case, []).append(time.perf_counter() - started)
        partial.append({"case": case, "seed": seed, "repetition": repetition, "values": values})
        left = sum(sum(known) / len(known) for later, _, _ in todo[index:] if (known := took.get(later)))
        word = "about" if all(later in took for later, _, _ in todo[index:]) else "more than"
        position = len(plan) - len(todo) + index
        console.print(
            f"[{position}/{len(plan)}] {case}, seed {seed}, repetition {repetition + 1}: "
            f"{took[case][-1]:.2f} s; {word} {_duration(left)} left",
            markup=False,
            highlight=False,
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
