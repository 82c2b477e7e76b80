"""What every scenario's server does around its strategy: run folder, resume, closing table."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from torch import Tensor

import fl_edge
from fl_edge.checkpoints import Checkpoint, load_checkpoint
from fl_edge.config import to_yaml
from fl_edge.errors import ConfigError
from fl_edge.files import write_whole
from fl_edge.link.packing import tensor_bytes
from fl_edge.runs import RunFolder, versions
from simulations.scenario import Scenario

_CHECKPOINTS = 3  # that are on disk together: two kept, one being written
_OTHER_BYTES = 1_000_000  # events, records and pictures of a short run


class Resumable(Protocol):
    """A strategy that can go on where it was."""

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that the next round depends on."""

    def restore(self, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Go back to a snapshot."""


def open_run(scenario: Scenario, strategy: Resumable, take_home_bytes: int = 0) -> tuple[RunFolder, int]:
    """Open the run folder, restore the strategy when the run is resumed, and say so.

    Returns
    -------
    tuple
        The folder, and the last round that is complete.
    """
    done = 0
    if not scenario.resume:
        name = scenario.name or f"{scenario.simulation}-{time.strftime('%Y%m%d-%H%M%S')}"
        if Path(name).name != name or name == "..":
            raise ConfigError(f"name={name} is not allowed; it must be the name of one folder below {scenario.runs}")
        needs = _CHECKPOINTS * tensor_bytes(strategy.snapshot()[0]) + take_home_bytes + _OTHER_BYTES
        folder = RunFolder.create(Path(scenario.runs) / name, to_yaml(scenario), needs)
    else:
        path = Path(scenario.resume).expanduser().absolute()
        checkpoint = load_checkpoint(path / "checkpoints") or Checkpoint(0, {}, {})
        done = checkpoint.server_round
        if done:
            strategy.restore(checkpoint.weights, checkpoint.record)
        folder = RunFolder.reopen(path, done, to_yaml(replace(scenario, resume="")))
    say(f"run folder {folder.path}" + (f", resumed after round {done}" if done else ""))
    return folder, done


def close_run(
    folder: RunFolder,
    scenario: Scenario,
    summary: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    packages: tuple[str, ...],
    title: str,
    rows: Mapping[str, str],
) -> None:
    """Write result.json and the pictures, and show the closing table."""
    for name, picture in pictures.items():
        write_whole(folder.path / name, picture)
    machine = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    folder.write_result(
        {"summary": dict(summary), "seed": scenario.seed, "versions": versions(packages), "machine": machine}
    )
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=100).print(table)
    kinds = "records, pictures and TensorBoard events" if any(folder.path.glob("events.*")) else "records and pictures"
    say(f"fl_edge {fl_edge.__version__}: {kinds} are in {folder.path}")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)
