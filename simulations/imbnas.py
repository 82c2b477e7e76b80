"""The server's side of the scenario `imbnas`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from flwr.serverapp import Grid
from rich.console import Console
from rich.table import Table

from fl_edge.data.images import load_test, load_train
from fl_edge.imbnas.config import TailConfig
from fl_edge.imbnas.pictures import draw
from fl_edge.imbnas.report import ImbNasReport, PhaseLines
from fl_edge.imbnas.source import balanced_source, load_source
from fl_edge.imbnas.space import cifar_space, digits_space
from fl_edge.imbnas.tally import GROUPS
from fl_edge.models.accelerator import find_accelerator
from fl_edge.observers import Recorder, TensorBoard
from fl_edge.strategies.imbnas import ImbNas
from simulations.running import close_run, open_run, say
from simulations.scenario import ImbNasScenario

_SCORES = {"accuracy": "class-mean accuracy", "probability": "class-mean probability of the right class"}
_PACKAGES = ("fl-edge", "flwr", "torch", "numpy", "scipy", "scikit-learn", "flwr-datasets", "datasets")


def run_imbnas(grid: Grid, scenario: ImbNasScenario) -> ImbNas:
    """Search from the beginning, or from the last checkpoint of the run folder to resume.

    Raises
    ------
    FlEdgeError
        Whatever keeps the run from ending well, in one line.
    """
    torch.set_num_threads(scenario.threads)
    accelerator = find_accelerator(scenario.accelerator)
    test = load_test(scenario.data, scenario.seed)
    images = balanced_source(load_train(scenario.data, scenario.seed), test, scenario.tail, scenario.seed)
    space = digits_space() if scenario.space == "digits" else cifar_space()
    source = load_source(space, images, scenario.supernet, scenario.seed)
    source.supernet.to(accelerator)
    source.head.to(accelerator)
    strategy = ImbNas(
        source,
        test,
        scenario.imbnas,
        seed=scenario.seed,
        min_devices=scenario.devices,
        patience_s=scenario.patience_s,
        threads=scenario.threads,
    )
    folder, done = open_run(scenario, strategy)
    with ExitStack() as stack:
        stack.callback(folder.discard_if_empty)
        board = stack.enter_context(TensorBoard(folder.path, done + 1))
        strategy.observers += [PhaseLines(strategy.rounds, say), Recorder(folder, strategy.snapshot), board]
        report = strategy.start(grid, timeout=scenario.exchange_timeout_s)
    _show(report, scenario.tail)
    real_s = sum(row["real_s"] for row in folder.rounds)
    summary = {**report.summary(scenario.tail), "rounds": strategy.server_round, "real_s": real_s}
    rows = _rows(report, summary, strategy.procedure.score)
    close_run(folder, scenario, summary, draw(report), _PACKAGES, "IMB-NAS", rows)
    return strategy


def _show(report: ImbNasReport, tail: TailConfig) -> None:
    """Print what each contender gets right, by class group."""
    table = Table(title="Balanced test accuracy, trained from scratch by all devices together", title_justify="left")
    for name in ("architecture", "blocks", "multiply-adds", "all classes", *GROUPS):
        table.add_column(name)
    for name, architecture in report.contenders.items():
        row = report.row(name, tail) if name in report.confusions else {}
        accuracies = [f"{row[group]:.3f}" if group in row else "" for group in ("balanced", *GROUPS)]
        table.add_row(name, report.names[architecture], f"{report.costs[name]:,}", *accuracies)
    Console(width=120).print(table)


def _rows(report: ImbNasReport, summary: dict[str, Any], score: str) -> dict[str, str]:
    counts = report.counts.tolist()
    scored = ", ".join(f"{count} in {name}" for name, count in summary["scored"].items())
    return {
        "training images": f"{sum(counts)} over all devices, by class {' '.join(map(str, counts))}"[:80],
        "found together": report.names[report.winner.architecture],
        "its score": f"{report.winner.score:.4f}, {_SCORES[score]} on the devices' validation images",
        "architectures scored": scored,
        "real time": f"{summary['real_s']:.1f} s",
        "traffic": f"{report.up_bytes / 1e6:.1f} MB up, {report.down_bytes / 1e6:.1f} MB down in tensors",
        "devices lost": str(len(report.lost)),
    }
