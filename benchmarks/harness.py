"""What a benchmark is, and how one is run.

A benchmark is a module ``benchmarks/<name>.py`` whose docstring's first line says what it measures, with one object
``BENCHMARK``, a :class:`Benchmark`. Nothing else is needed: ``python -m benchmarks`` finds it by that name.

::

    BENCHMARK = Benchmark(
        cases=(Case("ours", repetitions=7), Case("peer", repetitions=7, needs=("pfl",))),
        columns={"seconds": Column("rounds", "real_s"), "accuracy": Column("accuracy")},
        measure=measure,  # (case name, seed, quick) -> {"seconds": 0.12, "accuracy": 0.93, ...}
        targets=targets,  # (results) -> [Target.at_most("ours / peer", ratio, 1.15), ...]
        figure=figure,    # (results, path): draws one PNG
    )

Measurements run seed by seed and repetition by repetition, in each of them case after case (A B A B ...), so that a
machine that slows down slows all cases down. Each is written down as it ends; a run that was interrupted goes on where
it stopped, unless settings or code have changed. Times are summed up by median and quartiles over all repetitions;
everything else by its mean over seeds and that mean's 95 % interval.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from benchmarks.harness_record import (
    Partial,
    describe_machine,
    describe_source,
    fingerprint,
    now,
    versions,
    write_whole,
)
from benchmarks.harness_report import print_table, summarize

INSTALL = 'pip install ".[bench]"'
PACKAGES = ("fl-edge", "flwr", "ray", "torch", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Case:
    """One thing that is measured: ours, a baseline, or a peer.

    Parameters
    ----------
    name
        What tables and pictures call it.
    repetitions, quick_repetitions
        Measurements for each seed; more than one only where real time is measured.
    needs
        Modules of peers that the case imports. A case whose peer is absent is reported as such, never dropped.
    """

    name: str
    repetitions: int = 1
    quick_repetitions: int = 1
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """One column of the table: a key of the measurements, and what kind of number it holds.

    Real and virtual times are different kinds and never share a column; the heading names which one it is.
    """

    label: str
    kind: Literal["value", "real_s", "real_ms", "virtual_s"] = "value"
    digits: int = 3

    @property
    def heading(self) -> str:
        """The label with its unit of time."""
        return self.label if self.kind == "value" else f"{self.label} ({self.kind.replace('_', ' ')})"


@dataclass(frozen=True)
class Target:
    """One line of an issue's table: what was asked, what was measured, and whether it holds."""

    measure: str
    value: float | None
    target: str
    holds: bool

    @classmethod
    def at_most(cls, measure: str, value: float | None, bound: float) -> Target:
        """Return a target that holds when the value is at most the bound; not measured means not held."""
        return cls(measure, value, f"at most {bound:g}", value is not None and value <= bound)

    @classmethod
    def at_least(cls, measure: str, value: float | None, bound: float) -> Target:
        """Return a target that holds when the value is at least the bound; not measured means not held."""
        return cls(measure, value, f"at least {bound:g}", value is not None and value >= bound)


@dataclass(frozen=True)
class Results:
    """What targets and pictures are made from.

    Attributes
    ----------
    raw
        One record a measurement: ``case``, ``seed``, ``repetition``, ``values``.
    summary
        ``summary[case][key]``: ``median, q1, q3, n`` for real times, else ``mean, low, high, n`` over seeds (with one
        seed, ``low`` and ``high`` are None).
    missing
        Cases whose peers are not installed, with the modules that they need.
    """

    raw: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Mapping[str, Mapping[str, Any]]]
    missing: Mapping[str, Sequence[str]]

    def values(self, case: str, key: str) -> list[Any]:
        """Return all measurements of one key, seed by seed and repetition by repetition."""
        records = sorted((r for r in self.raw if r["case"] == case), key=lambda r: (r["seed"], r["repetition"]))
        return [record["values"][key] for record in records if key in record["values"]]

    def center(self, case: str, key: str) -> float | None:
        """Return the median of a real time, else the mean; None when the case was not measured."""
        entry = self.summary.get(case, {}).get(key)
        return None if entry is None else float(entry.get("median", entry.get("mean")))

    def ratio(self, case: str, base: str, key: str) -> float | None:
        """Return one case's center over another's; None when either was not measured."""
        above, below = self.center(case, key), self.center(base, key)
        return None if above is None or not below else above / below


@dataclass(frozen=True)
class Benchmark:
    """The contract of one benchmark (see the module's docstring for an example).

    Parameters
    ----------
    cases, columns
        What is measured, and which keys of the measurements the table shows.
    measure
        Called as ``measure(case, seed, quick)``; returns plain JSON values, no NaN. What it raises ends the run.
    targets, figure
        Called with the :class:`Results` of a finished run; ``figure`` also with the path of the PNG to write.
    prepare
        Called as ``prepare(seeds, quick)`` once before the first measurement of a process: warm-up, training of shared
        models. Not part of any measurement.
    seeds, quick_seeds
        What runs when the command names none.
    settings
        Everything else that the numbers depend on; stored with them, and a changed value starts anew.
    packages
        Distributions whose versions are stored besides the usual ones.
    """

    cases: Sequence[Case]
    columns: Mapping[str, Column]
    measure: Callable[[str, int, bool], Mapping[str, Any]]
    targets: Callable[[Results], Sequence[Target]]
    figure: Callable[[Results, Path], None]
    prepare: Callable[[Sequence[int], bool], None] | None = None
    seeds: tuple[int, ...] = (0,)
    quick_seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()


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
    console = console or Console()
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
    print_table(console, stem, [case.name for case in benchmark.cases], benchmark.columns, results, targets, INSTALL)
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
