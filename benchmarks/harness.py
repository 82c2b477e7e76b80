"""What a benchmark is; :mod:`benchmarks.harness_run` runs it.

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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


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
