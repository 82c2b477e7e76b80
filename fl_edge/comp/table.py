"""The table at the end of a run on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fl_edge.comp.measures import Measures
from fl_edge.comp.run import Result


def show(
    console: Console, results: Sequence[Result], before: Measures, after: Sequence[Measures], folders: Sequence[Path]
) -> None:
    """Print the figures before and after, what the run took, and what was left out."""
    table = Table("", "before", *(f"{result.config.ratio:g} pruned" for result in results))
    columns = (before, *after)
    table.add_row("parameters, million", *(f"{each.parameters / 1e6:.3f}" for each in columns))
    table.add_row("on disk, MB", *(f"{each.disk_bytes / 1e6:.2f}" for each in columns))
    table.add_row("weights in memory, MB", *(f"{each.memory_bytes / 1e6:.2f}" for each in columns))
    table.add_row("perplexity", *(_number(each.perplexity) for each in columns))
    table.add_row("decoding, ms a token", *(_number(each.decode_ms) for each in columns))
    table.add_row("prefill, ms", *(_number(each.prefill_ms) for each in columns))
    console.print(table)
    last = results[-1]
    peak = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in last.peak_memory.items())
    console.print(
        f"prefill of {before.prefill} tokens; pruning took {last.seconds:.1f} s, read {last.bytes_read / 1e6:.1f} MB; "
        f"peak memory: {peak}; written to {', '.join(map(str, folders))}",
        soft_wrap=True,
    )
    if any(each.decode_ms is None for each in columns):
        console.print("left out (-): the model is larger than half of the free memory", soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
