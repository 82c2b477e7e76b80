"""The server's side of the scenarios `fedspine` and `fedspine_instructions`."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from statistics import fmean
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from rich.console import Console
from rich.table import Table
from torch import nn

from fl_edge.data.texts import head_classes, load_text_test
from fl_edge.data.tokens import ordered_batches
from fl_edge.fedspine.deciding import class_plan
from fl_edge.fedspine.export import assemble, export
from fl_edge.fedspine.pictures import draw
from fl_edge.fedspine.report import RoundReport, summarise
from fl_edge.link.packing import tensor_bytes
from fl_edge.models.accelerator import find_accelerator
from fl_edge.models.evaluation import evaluate_texts
from fl_edge.models.language import load_language_model
from fl_edge.models.pretraining import weights_digest
from fl_edge.observers import Lines, Recorder, TensorBoard
from fl_edge.pruning import sparsity
from fl_edge.runs import versions
from fl_edge.strategies.fedspine import FedSpine
from simulations.running import close_run, open_run, say
from simulations.scenario import FedSpineScenario

_PACKAGES = ("fl-edge", "flwr", "torch", "transformers", "peft", "tokenizers", "numpy", "datasets", "flwr-datasets")
_TEST_BATCH = 64
_EXAMPLE = "# Return the sorted list of keys.\n"  # of an instruction, for the model card


def run_fedspine(grid: Grid, scenario: FedSpineScenario) -> FedSpine:
    """Train from the first round, or from the last checkpoint of the run folder to resume.

    Raises
    ------
    FlEdgeError
        Whatever keeps the run from ending well, in one line.
    """
    torch.set_num_threads(scenario.threads)
    accelerator = find_accelerator(scenario.accelerator)
    base, tokenizer = load_language_model(scenario.model, scenario.seed, head_classes(scenario.data, scenario.seed))
    test = load_text_test(scenario.data, scenario.seed, tokenizer)
    batches = list(ordered_batches(test, tokenizer.pad_token_id, _TEST_BATCH))
    strategy = FedSpine(
        base,
        scenario.fedspine,
        rounds=scenario.rounds,
        seed=scenario.seed,
        base_digest=weights_digest(base),
        virtual=scenario.edge.clock == "virtual",
        min_devices=scenario.devices,
        patience_s=scenario.patience_s,
        threads=scenario.threads,
    )
    weights_bytes = tensor_bytes(base.state_dict())
    folder, done = open_run(scenario, strategy, take_home_bytes=weights_bytes if scenario.take_home else 0)

    def measure(model: nn.Module) -> dict[str, float]:
        accuracy, loss = evaluate_texts(model.to(accelerator), batches)
        return {"accuracy": accuracy, "loss": loss}

    def evaluate_model(_server_round: int, _arrays: ArrayRecord) -> MetricRecord:
        state, config = strategy.state, strategy.config
        plans = [device.plan for device in state.devices.values()]
        plan = class_plan(config, plans, strategy.sizes, fmean(sparsity(plan, strategy.sizes) for plan in plans))
        adapter = strategy.factors_to_send()
        model = assemble(copy.deepcopy(base), plan, adapter, state.head, config.max_rank, config.scale)
        return MetricRecord({**measure(model), "sparsity": sparsity(plan, strategy.sizes)})

    with ExitStack() as stack:
        stack.callback(folder.discard_if_empty)
        board = stack.enter_context(TensorBoard(folder.path, done + 1))
        strategy.observers += [Lines(scenario.rounds, say), Recorder(folder, strategy.snapshot), board]
        strategy.start(
            grid, num_rounds=scenario.rounds, timeout=scenario.exchange_timeout_s, evaluate_fn=evaluate_model
        )
    reports = [RoundReport.from_record(record) for record in folder.rounds]
    summary = summarise(reports)
    if scenario.take_home:
        about = {
            "base": scenario.model.name,
            "data": scenario.data.source,
            "seed": scenario.seed,
            "versions": versions(_PACKAGES),
            **({"example": _EXAMPLE} if scenario.data.source == "instructions" else {}),
        }
        taken = export(
            folder.path / "models", lambda: copy.deepcopy(base), strategy.state, strategy.config, strategy.sizes,
            tokenizer, measure, about,
        )  # fmt: skip
        summary["models"] = taken
        _show(taken)
    close_run(folder, scenario, summary, draw(reports), _PACKAGES, "FedSpine", _rows(summary))
    return strategy


def _show(taken: list[dict[str, Any]]) -> None:
    table = Table(title="Models to take home", title_justify="left")
    for name in ("folder", "devices", "rank", "parameters", "multiply-adds a token", "accuracy", "loss"):
        table.add_column(name)
    for row in taken:
        table.add_row(
            row["folder"],
            str(row["devices"]),
            str(row["rank"]),
            f"{row['parameters'] / 1e6:.2f} M of {row['parameters_before'] / 1e6:.2f} M",
            f"{row['macs'] / row['macs_before']:.0%}",
            f"{row['accuracy']:.4f}",
            f"{row['loss']:.4f}",
        )
    Console(width=100).print(table)


def _rows(summary: dict[str, Any]) -> dict[str, str]:
    accuracy, best, virtual = summary["test_accuracy"], summary["best_test_accuracy"], summary["virtual_s"]
    return {
        "test accuracy": f"{accuracy:.4f} at sparsity {summary['test_sparsity']:.2f} (best {best:.4f})",
        "test loss": f"{summary['test_loss']:.4f}",
        "rounds": str(summary["rounds"]),
        "sparsity of the devices": f"{summary['sparsity_min']:.3f} to {summary['sparsity_max']:.3f}",
        "rank": f"{summary['rank_mean']:.1f} on average",
        "reward": f"{summary['reward_mean']:.3f} on average",
        "cells of a bandit": f"{summary['cells_mean']:.1f} on average at the end",
        "waiting": f"{summary['waiting_s_mean']:.2f} s a device and round",
        "virtual time": "not used (measured)" if virtual is None else f"{virtual:.1f} s",
        "real time": f"{summary['real_s']:.1f} s",
        "traffic": f"{summary['up_bytes'] / 1e6:.1f} MB up, {summary['down_bytes'] / 1e6:.1f} MB down",
        "rounds missed by a device": str(summary["absent"]),
    }
