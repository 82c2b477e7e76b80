"""The server's side of the scenario `comp`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import torch
from flwr.serverapp import Grid
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fl_edge.comp.pictures import draw
from fl_edge.comp.report import CompReport, DeviceRow, LayerRow
from fl_edge.data.corpus import load_files
from fl_edge.models.accelerator import find_accelerator
from fl_edge.models.language import model_folder
from fl_edge.runs import RunFolder
from fl_edge.strategies.comp import Comp
from simulations.running import close_run, open_run, say
from simulations.scenario import CompScenario

_PACKAGES = ("fl-edge", "flwr", "torch", "transformers", "safetensors", "tokenizers", "numpy")


def run_comp(grid: Grid, scenario: CompScenario) -> CompReport:
    """Prune from the beginning, or from where the run folder to resume stands.

    In the local mode, devices that were done are not asked again; in the federated one the server goes on at the layer
    it was at, and devices follow what had been decided by then.

    Raises
    ------
    FlEdgeError
        Whatever keeps the run from ending well, in one line.
    """
    torch.set_num_threads(scenario.threads)
    accelerator = find_accelerator(scenario.accelerator)
    load_files(scenario.data, scenario.model.name)  # refuses what devices would have to refuse
    base = model_folder(scenario.model)
    strategy = Comp(
        base,
        scenario.comp,
        min_devices=scenario.devices,
        patience_s=scenario.patience_s,
        accelerator=accelerator,
        threads=scenario.threads,
    )
    folder, _ = open_run(scenario, _Stateless())
    folder.rounds = _recorded(folder) if scenario.resume else []
    done = [DeviceRow.from_record(row) for row in folder.rounds if row["kind"] == "device"]
    done = done if scenario.comp.mode == "local" else []
    folder.rounds = [row for row in folder.rounds if row["kind"] == "layer"] + [row.to_record() for row in done]
    strategy.report.devices += done

    def record(row: LayerRow | DeviceRow) -> None:
        if isinstance(row, LayerRow):  # what was recorded of it before a kill is done again
            folder.rounds = [one for one in folder.rounds if one["report"]["layer"] < row.report.layer]
        folder.checkpoints.mkdir(exist_ok=True)
        folder.add_round(row.to_record())
        count = f"device {len(strategy.report.devices)}/{scenario.devices}  " if isinstance(row, DeviceRow) else ""
        say(count + row.line())

    strategy.observers.append(record)
    with ExitStack() as stack:
        stack.callback(folder.discard_if_empty)
        report = strategy.start(
            grid, folder.path, timeout=scenario.exchange_timeout_s, done=[row.device for row in done]
        )
    report.devices.sort(key=lambda row: (len(row.device), row.device))
    _show(report)
    close_run(folder, scenario, report.summary(), draw(report.devices), _PACKAGES, "COMP", _rows(report))
    return report


class _Stateless:
    """What :func:`open_run` asks of a strategy; where COMP stands is in files of its own."""

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
        pass


def _recorded(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the records of the run that was killed; what cannot be read is done again."""
    try:
        return [json.loads(line) for line in (folder.path / "rounds.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def _show(report: CompReport) -> None:
    table = Table(title="Models on the devices, before and after", title_justify="left")
    for name in ("device", "ratio", "parameters", "perplexity", "latency a token", "memory", "peak", "time"):
        table.add_column(name)
    for row in report.devices:
        figures = row.outcome.figures
        (m0, m1), (p0, p1), (l0, l1) = figures.parameters, figures.perplexity, figures.latency_s
        b0, b1 = figures.memory_bytes
        table.add_row(
            row.device,
            f"{row.ratio:g}",
            f"{m0 / 1e6:.2f} -> {m1 / 1e6:.2f} M",
            f"{p0:.2f} -> {p1:.2f}",
            f"{1e3 * l0:.2f} -> {1e3 * l1:.2f} ms",
            f"{b0 / 1e6:.1f} -> {b1 / 1e6:.1f} MB",
            f"{figures.peak_bytes / 1e6:.0f} MB",
            f"{row.outcome.seconds:.1f} s",
        )
    Console(width=120).print(table)


def _rows(report: CompReport) -> dict[str, str]:
    summary = report.summary()
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    return {
        "mode": report.mode,
        "perplexity": f"{before:.2f} before, {after:.2f} after, on average over the devices",
        "devices": f"{len(report.devices)} done, {len(report.lost)} lost",
        **{f"lost: {device}": why for device, why in report.lost.items()},
        "traffic": f"{report.up_bytes / 1e6:.2f} MB up, {report.down_bytes / 1e6:.2f} MB down in tensors",
        "folders": report.devices[0].outcome.folder if report.devices else "none",
    }
