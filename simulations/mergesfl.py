"""The server's side of the scenario `mergesfl`: model, test set, strategy, observers, closing table."""

from __future__ import annotations

import platform
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from rich.console import Console
from rich.table import Table

import fl_edge
from fl_edge.checkpoints import Checkpoint, load_checkpoint
from fl_edge.config import to_yaml
from fl_edge.data.images import load_test
from fl_edge.errors import ConfigError
from fl_edge.files import write_whole
from fl_edge.link.packing import tensor_bytes
from fl_edge.observers import Lines, Recorder, TensorBoard
from fl_edge.mergesfl.pictures import draw
from fl_edge.mergesfl.report import RoundReport, summarise
from fl_edge.models.evaluation import evaluate
from fl_edge.models.images import build_model
from fl_edge.models.split import feature_shape
from fl_edge.runs import RunFolder, versions
from fl_edge.strategies.mergesfl import MergeSFL
from simulations.scenario import MergeSFLScenario

_CHECKPOINTS = 3  # that are on disk together: two kept, one being written
_OTHER_BYTES = 1_000_000  # events, records and pictures of a short run
_PACKAGES = ("fl-edge", "flwr", "torch", "numpy", "scikit-learn", "flwr-datasets", "datasets")


def run_mergesfl(grid: Grid, scenario: MergeSFLScenario) -> MergeSFL:
    """Train from the first round, or from the last checkpoint of the run folder to resume.

    Raises
    ------
    FlEdgeError
        Whatever keeps the run from ending well, in one line.
    """
    torch.set_num_threads(scenario.threads)
    test = load_test(scenario.data, scenario.seed)
    images, labels = test.batch(torch.arange(len(test.labels)))
    model = build_model(scenario.model, test.shape, len(test.classes), scenario.seed)
    strategy = MergeSFL(
        model,
        feature_shape(model.bottom, test.shape),
        scenario.mergesfl,
        seed=scenario.seed,
        edge=scenario.edge,
        min_devices=scenario.devices,
        patience_s=scenario.patience_s,
        threads=scenario.threads,
    )
    folder = _open(scenario, strategy)
    first = strategy.state.server_round + 1
    _say(f"run folder {folder.path}" + (f", resumed after round {first - 1}" if first > 1 else ""))
    with ExitStack() as stack:
        stack.callback(folder.discard_if_empty)
        board = stack.enter_context(TensorBoard(folder.path, first))
        strategy.observers += [Lines(scenario.rounds, _say), Recorder(folder, strategy.snapshot), board]

        def evaluate_model(_server_round: int, _arrays: ArrayRecord) -> MetricRecord:
            accuracy, loss = evaluate(model, images, labels)
            return MetricRecord({"accuracy": accuracy, "loss": loss})

        strategy.start(
            grid, num_rounds=scenario.rounds, timeout=scenario.exchange_timeout_s, evaluate_fn=evaluate_model
        )
    _close(folder, scenario, test.classes)
    return strategy


def _open(scenario: MergeSFLScenario, strategy: MergeSFL) -> RunFolder:
    """Open the run folder, and restore the strategy when the run is resumed."""
    if not scenario.resume:
        name = scenario.name or f"{scenario.simulation}-{time.strftime('%Y%m%d-%H%M%S')}"
        if Path(name).name != name or name == "..":
            raise ConfigError(f"name={name} is not allowed; it must be the name of one folder below {scenario.runs}")
        needs = _CHECKPOINTS * tensor_bytes(strategy.model.state_dict()) + _OTHER_BYTES
        return RunFolder.create(Path(scenario.runs) / name, to_yaml(scenario), needs)
    path = Path(scenario.resume).expanduser().absolute()
    checkpoint = load_checkpoint(path / "checkpoints") or Checkpoint(0, {}, {})
    if checkpoint.server_round:
        strategy.restore(checkpoint.weights, checkpoint.record)
    return RunFolder.reopen(path, checkpoint.server_round, to_yaml(replace(scenario, resume="")))


def _close(folder: RunFolder, scenario: MergeSFLScenario, classes: list[str]) -> None:
    """Write result.json and the pictures, and show the closing table."""
    reports = [RoundReport.from_record(record) for record in folder.rounds]
    summary = summarise(reports)
    for name, picture in draw(reports, classes).items():
        write_whole(folder.path / name, picture)
    machine = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    folder.write_result(
        {"summary": summary, "seed": scenario.seed, "versions": versions(_PACKAGES), "machine": machine}
    )
    _show(summary)
    _say(f"fl_edge {fl_edge.__version__}: records, pictures and TensorBoard events are in {folder.path}")


def _show(summary: dict[str, Any]) -> None:
    table = Table(title="MergeSFL", title_justify="left", show_header=False)
    accuracy, best = summary["test_accuracy"], summary["best_test_accuracy"]
    virtual = summary["virtual_s"]
    rows = {
        "test accuracy": f"{accuracy:.4f} (best {best:.4f})",
        "rounds": str(summary["rounds"]),
        "KL of the label mix": f"{summary['kl_mean']:.4f} on average",
        "target of KL missed": f"{summary['kl_above_target']} rounds",
        "cohort": f"{summary['cohort_mean']:.1f} devices on average",
        "batch sizes": f"{summary['batch_size_min']} to {summary['batch_size_max']}",
        "waiting": f"{summary['waiting_s_mean']:.2f} s a device and round",
        "virtual time": "not used (measured)" if virtual is None else f"{virtual:.1f} s",
        "real time": f"{summary['real_s']:.1f} s",
        "traffic": f"{summary['up_bytes'] / 1e6:.1f} MB up, {summary['down_bytes'] / 1e6:.1f} MB down",
        "devices lost": f"{summary['lost']} ({summary['aborted']} iterations without a top step)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=100).print(table)


def _say(line: str) -> None:
    print(line, flush=True)
