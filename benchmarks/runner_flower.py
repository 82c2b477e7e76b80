"""The job of :mod:`benchmarks.runner_job` by Flower's stock FedAvg: on LocalGrid, and in Flower's Ray simulation.

``python -m benchmarks.runner_flower '{"seed": 0}' OUT`` runs the Ray simulation once, in a process of its own so that
nothing of it is left behind, and writes the outcome to OUT as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.runner_job import LEARNING_RATE, Job, Outcome, accuracy_of, load_data, local_epoch, make_model
from fl_edge.link.local import LocalGrid
from fl_edge.link.packing import flat_array

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@lru_cache(maxsize=1)
def workshop(job: Job) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return this process's model and optimizer, made once as in the plain loop; a Ray actor keeps its own."""
    torch.set_num_threads(1)
    load_data(job)
    model = make_model(job)
    return model, torch.optim.SGD(model.parameters(), LEARNING_RATE)


def make_client_app(job: Job) -> ClientApp:
    """Return the ClientApp: weights come and go as one flat float32 array, one request in a deployment."""
    app = ClientApp()

    @app.query("ready")
    def ready(message: Message, context: Context) -> Message:  # noqa: ARG001
        workshop(job)
        return Message(RecordDict(), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, optimizer = workshop(job)
        records: Any = message.content
        with torch.no_grad():
            vector_to_parameters(torch.from_numpy(records["arrays"]["weights"].numpy()), model.parameters())
        client, round_number = int(context.node_config["partition-id"]), records["config"]["server-round"]
        steps = local_epoch(job, model, optimizer, client, round_number)
        with torch.no_grad():
            weights = parameters_to_vector(model.parameters())
        reply = RecordDict(
            {
                "arrays": ArrayRecord({"weights": flat_array(weights)}),
                "metrics": MetricRecord({"num-examples": job.samples, "steps": steps}),
            }
        )
        return Message(reply, reply_to=message)

    return app


def run_fedavg(job: Job, grid: Grid) -> Outcome:
    """Run stock FedAvg on any grid and measure its rounds."""
    model = make_model(job)
    start = ArrayRecord({"weights": Array(parameters_to_vector(model.parameters()).detach().numpy())})
    random.seed(job.seed)  # FedAvg chooses clients by the process's own generator
    strategy = FedAvg(fraction_train=job.per_round / job.clients, fraction_evaluate=0.0)
    started = time.perf_counter()
    result = strategy.start(grid, start, num_rounds=job.rounds)
    seconds = time.perf_counter() - started
    vector_to_parameters(torch.from_numpy(result.arrays["weights"].numpy()), model.parameters())
    metrics: Any = result.train_metrics_clientapp.values()
    steps = round(sum(metric["steps"] for metric in metrics) * job.per_round)
    return Outcome(seconds, 0.0, accuracy_of(job, model), steps)


def run_local_grid(job: Job) -> Outcome:
    """Run the job on LocalGrid; making the grid is counted as start."""
    logging.getLogger("flwr").setLevel(logging.ERROR)  # in all Flower runs: printing is not what is measured
    load_data(job)
    started = time.perf_counter()
    grid = LocalGrid(make_client_app(job), job.clients)
    start_seconds = time.perf_counter() - started
    return dataclasses.replace(run_fedavg(job, grid), start_seconds=start_seconds)


def run_ray(job: Job) -> Outcome:
    """Run the job once in Flower's Ray simulation, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", "benchmarks.runner_flower", json.dumps(dataclasses.asdict(job)), str(out)]
        environment = {**os.environ, **QUIET, "FLWR_HOME": folder}
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode or not out.exists():
            tail = "\n".join(done.stderr.splitlines()[-15:])
            raise RuntimeError(f"Flower's Ray simulation ended with status {done.returncode}:\n{tail}")
        return Outcome(**json.loads(out.read_text()))


def _ray_process(job: Job, out: Path) -> None:
    """Run the simulation here: everything until all clients have answered once is start, what follows is rounds."""
    from flwr.simulation import run_simulation

    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    outcomes: list[Outcome] = []
    started = time.perf_counter()
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001
        while len(nodes := list(grid.get_node_ids())) < job.clients:
            time.sleep(0.05)
        replies = list(grid.send_and_receive([Message(RecordDict(), node, "query.ready") for node in nodes]))
        if len(replies) < job.clients or any(reply.has_error() for reply in replies):
            raise RuntimeError(f"not all clients came up: {[r.error for r in replies if r.has_error()][:1]}")
        start_seconds = time.perf_counter() - started
        outcomes.append(dataclasses.replace(run_fedavg(job, grid), start_seconds=start_seconds))

    # One core a client: the most actors that this machine takes, and Flower's own advice for small models.
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, make_client_app(job), job.clients, backend_config=resources)  # type: ignore[arg-type]
    out.write_text(json.dumps(dataclasses.asdict(outcomes[0])))


if __name__ == "__main__":
    # As a member of the package, not as __main__: Ray's actors then find the cached model under the module's own name.
    from benchmarks.runner_flower import _ray_process as ray_process

    ray_process(Job(**json.loads(sys.argv[1])), Path(sys.argv[2]))
