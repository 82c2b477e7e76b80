"""The server's side of the scenario `hat`: the adapter's training, then the cloud."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from rich.console import Console
from rich.table import Table

from fl_edge.data.corpus import load_files
from fl_edge.hat.account import Account, HatReport
from fl_edge.hat.federation import AdapterRound
from fl_edge.hat.pictures import draw
from fl_edge.models.accelerator import find_accelerator
from fl_edge.models.language import model_folder
from fl_edge.observers import Lines, Recorder, TensorBoard
from fl_edge.strategies.hat import Hat
from fl_edge.strategies.hat_training import HatTraining
from simulations.running import close_run, open_run, say
from simulations.scenario import HatScenario

_PACKAGES = ("fl-edge", "flwr", "torch", "transformers", "safetensors", "tokenizers", "numpy")


def run_hat(grid: Grid, scenario: HatScenario) -> HatReport:
    """Train the adapter from the beginning, or from the last checkpoint of the run folder to resume; then generate.

    Raises
    ------
    FlEdgeError
        Whatever keeps the run from ending well, in one line.
    """
    torch.set_num_threads(scenario.threads)
    accelerator = find_accelerator(scenario.accelerator)
    load_files(scenario.data, scenario.model.name)  # refuses what devices would have to refuse
    base = model_folder(scenario.model)
    shared: dict[str, Any] = {
        "min_devices": scenario.devices,
        "patience_s": scenario.patience_s,
        "accelerator": accelerator,
        "threads": scenario.threads,
    }
    training = HatTraining(base, scenario.hat.shallow, scenario.training, scenario.cloud, seed=scenario.seed, **shared)
    if scenario.adapter:
        training.load(Path(scenario.adapter).expanduser())
    hat = Hat(base, scenario.hat.shallow, scenario.cloud, **shared)
    folder, done = open_run(scenario, training)
    with ExitStack() as stack:
        stack.callback(folder.discard_if_empty)
        if scenario.training.rounds:
            board = stack.enter_context(TensorBoard(folder.path, done + 1))
            training.observers += [Lines(scenario.training.rounds, say), Recorder(folder, training.snapshot), board]
            training.start(grid, scenario.exchange_timeout_s)
            training.save(folder.path / "adapter.safetensors")
        if scenario.training.rounds or scenario.adapter:
            training.hand_out(grid, scenario.exchange_timeout_s)
        requests = 0

        def record(device: str, account: Account) -> None:
            nonlocal requests
            requests += 1
            folder.add_round({"kind": "request", "device": device, **account.to_record()})
            say(f"request {requests:3d}/{scenario.devices * scenario.prompts.count}  {account.line(device)}")

        hat.observers.append(record)
        report = hat.start(grid, scenario.exchange_timeout_s)
    rounds = [AdapterRound.from_record(row) for row in folder.rounds if row["kind"] == "adapter"]
    _show(report)
    pictures = draw(rounds, report.accounts)
    close_run(folder, scenario, report.summary(), pictures, _PACKAGES, "HAT", _rows(report, rounds))
    return report


def _show(report: HatReport) -> None:
    table = Table(title="What devices generated; times are real, the grid's among them", title_justify="left")
    for name in ("device", "requests", "tokens", "TTFT", "TBT", "accept length", "drafts that held", "up", "down"):
        table.add_column(name)
    for device, accounts in sorted(report.accounts.items(), key=lambda pair: (len(pair[0]), pair[0])):
        one = HatReport({device: accounts}).summary()
        drafted = sum(account.drafted for account in accounts)
        table.add_row(
            device,
            str(one["requests"]),
            str(one["tokens"]),
            f"{1e3 * one['ttft_s']:.0f} ms",
            f"{1e3 * one['tbt_s']:.1f} ms",
            f"{one['accept_length']:.2f}",
            f"{sum(account.accepted for account in accounts)} of {drafted}" if drafted else "none made",
            f"{one['up_bytes'] / 1e6:.2f} MB",
            f"{one['down_bytes'] / 1e6:.2f} MB",
        )
    Console(width=120).print(table)


def _rows(report: HatReport, rounds: list[AdapterRound]) -> Mapping[str, str]:
    summary = report.summary()
    trained = (
        f"{len(rounds)} rounds, the last at a mean loss of {rounds[-1].loss:.3f}" if rounds else "not trained here"
    )
    return {
        "adapter": trained,
        "requests": f"{summary['requests']} answered, {summary['refused']} refused",
        "tokens": f"{summary['tokens']}, {summary['accept_length']:.2f} a verification",
        "TTFT, TBT": f"{1e3 * summary['ttft_s']:.0f} ms, {1e3 * summary['tbt_s']:.1f} ms in the mean",
        "hidden states": f"{summary['up_bytes'] / 1e6:.2f} MB up, {summary['down_bytes'] / 1e6:.2f} MB down",
        **{f"lost: {device}": why for device, why in report.lost.items()},
        **{f"refused: {device}": "; ".join(whys) for device, whys in report.refused.items()},
    }
