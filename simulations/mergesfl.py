"""The server's side of the scenario `mergesfl`: model, test set, strategy, observers, closing table."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid

from fl_edge.data.images import load_test
from fl_edge.mergesfl.pictures import draw
from fl_edge.mergesfl.report import RoundReport, summarise
from fl_edge.models.evaluation import evaluate
from fl_edge.models.images import build_model
from fl_edge.models.split import feature_shape
from fl_edge.observers import Lines, Recorder, TensorBoard
from fl_edge.strategies.mergesfl import MergeSFL
from simulations.running import close_run, open_run, say
from simulations.scenario import MergeSFLScenario

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
    folder, done = open_run(scenario, strategy)
    with ExitStack() as stack:
        stack.callback(folder.discard_if_empty)
        board = stack.enter_context(TensorBoard(folder.path, done + 1))
        strategy.observers += [Lines(scenario.rounds, say), Recorder(folder, strategy.snapshot), board]

        def evaluate_model(_server_round: int, _arrays: ArrayRecord) -> MetricRecord:
            accuracy, loss = evaluate(model, images, labels)
            return MetricRecord({"accuracy": accuracy, "loss": loss})

        strategy.start(
            grid, num_rounds=scenario.rounds, timeout=scenario.exchange_timeout_s, evaluate_fn=evaluate_model
        )
    reports = [RoundReport.from_record(record) for record in folder.rounds]
    summary = summarise(reports)
    close_run(folder, scenario, summary, draw(reports, test.classes), _PACKAGES, "MergeSFL", _rows(summary))
    return strategy


def _rows(summary: dict[str, Any]) -> dict[str, str]:
    accuracy, best = summary["test_accuracy"], summary["best_test_accuracy"]
    virtual = summary["virtual_s"]
    return {
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
