"""Summaries and tables of measurements."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from benchmarks.harness import Column, Results, Target


def summarize(raw: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return ``summary[case][key]`` of all columns: quartiles of real times, mean and 95 % interval of the rest."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for case in dict.fromkeys(record["case"] for record in raw):
        summary[case] = {}
        for key, column in columns.items():
            by_seed: dict[int, list[float]] = {}
            for record in raw:
                if record["case"] == case and record["values"].get(key) is not None:
                    by_seed.setdefault(record["seed"], []).append(float(record["values"][key]))
            if by_seed:
                pooled = [value for values in by_seed.values() for value in values]
                means = [statistics.fmean(values) for values in by_seed.values()]
                summary[case][key] = quartiles(pooled) if column.kind.startswith("real") else interval(means)
    return summary


def quartiles(values: Sequence[float]) -> dict[str, Any]:
    """Return median and quartiles (by linear interpolation) of real times."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0], "n": 1}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over seeds and its 95 % interval by Student's t; no interval from a single seed."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(values)}


def cell(entry: Mapping[str, Any] | None, digits: int) -> str:
    """Return one cell of the table: center and spread."""
    if entry is None:
        return "-"
    if "median" in entry:
        spread = "" if entry["n"] == 1 else f" [{entry['q1']:.{digits}f}, {entry['q3']:.{digits}f}]"
        return f"{entry['median']:.{digits}f}{spread}"
    spread = "" if entry["low"] is None else f" ± {entry['mean'] - entry['low']:.{digits}f}"
    return f"{entry['mean']:.{digits}f}{spread}"


def tables(cases: Sequence[str], results: Results) -> list[tuple[list[str], set[str]]]:
    """Return cases and columns of each table: a case goes on with a table that has its columns, or only some of them.

    Cases that were not asked for are left out; those whose peers are absent go on with whatever table there is.
    """
    found: list[tuple[list[str], set[str]]] = []
    asked = {record["case"] for record in results.raw} | set(results.missing)
    for case in (each for each in cases if each in asked):
        keys = set(results.summary.get(case, {}))
        if not found or not (keys <= found[-1][1] or keys >= found[-1][1]):
            found.append(([], set()))
        found[-1][0].append(case)
        found[-1][1].update(keys)
    return found


def print_tables(
    console: Console,
    title: str,
    cases: Sequence[str],
    columns: Mapping[str, Column],
    results: Results,
    targets: Sequence[Target],
    install: str,
) -> None:
    """Print one row a case, then one line a target."""
    for rows, keys in tables(cases, results):
        console.print(_table(title, rows, {key: value for key, value in columns.items() if key in keys}, results))
    caption = "real time: median [quartiles] over repetitions; all else: mean ± half of the 95 % interval over seeds"
    console.print(caption, markup=False)
    for case, needs in results.missing.items():
        console.print(Text(f"{case}: not installed ({', '.join(needs)}); {install}", style="yellow"))
    for target in targets:
        value = "not measured" if target.value is None else f"{target.value:.4g}"
        verdict, style = ("holds", "green") if target.holds else ("DOES NOT HOLD", "bold red")
        console.print(f"{target.measure}: {value}, target {target.target}: {verdict}", style=style, markup=False)


def _table(title: str, cases: Sequence[str], columns: Mapping[str, Column], results: Results) -> Table:
    # Text throughout: rich reads plain strings as markup, and would take "[quartiles]" and ".[bench]" for styles.
    table = Table(title=Text(title))
    table.add_column("case")
    for column in columns.values():
        table.add_column(Text(column.heading), justify="right")
    for case in cases:
        entries = results.summary.get(case, {})
        cells = [cell(entries.get(key), column.digits) for key, column in columns.items()]
        if case in results.missing:
            cells = ["not installed", *[""] * (len(columns) - 1)][: len(columns)]
        table.add_row(*map(Text, [case, *cells]), style="yellow" if case in results.missing else None)
    return table
