"""The job of :mod:`benchmarks.runner_job` by pfl's simulated back end: the same clients, batches and steps."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn

from benchmarks.runner_job import BATCH, LEARNING_RATE, Job, Outcome, accuracy_of, batch_order, load_data, make_model


class Net(nn.Module):
    """The job's MLP with the two methods that pfl asks for; counts its training steps."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.body = make_model(job)
        self.steps = 0

    def loss(self, pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of one training batch."""
        self.steps += 1
        return nn.functional.cross_entropy(self.body(pictures), labels)

    def metrics(self, pictures: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return one number: pfl evaluates its clients in the first round, whatever it is told."""
        return {"samples": Weighted(len(labels), len(pictures))}


def choices(job: Job) -> Iterator[tuple[int, int]]:
    """Yield (client, round) in the order in which the plain loop trains them."""
    chooser = random.Random(job.seed)  # noqa: S311
    round_number = 0
    while True:
        round_number += 1
        for client in chooser.sample(range(job.clients), job.per_round):
            yield client, round_number


def run_pfl(job: Job) -> Outcome:
    """Run the job by pfl's FederatedAveraging; making data set, model and back end is counted as start."""
    shares = load_data(job)[0]
    started = time.perf_counter()
    chosen = choices(job)

    def make_dataset(user: tuple[int, int]) -> Dataset:
        pictures, labels = shares[user[0]]
        order = batch_order(job, *user)
        return Dataset((pictures[order], labels[order]), user_id=str(user[0]))

    net = Net(job)
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
    data = FederatedDataset(make_dataset, lambda: next(chosen))
    backend = SimulatedBackend(training_data=data, val_data=data)
    start_seconds = time.perf_counter() - started
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=job.rounds + 1,
            train_cohort_size=job.per_round,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH
        ),
        send_metrics_to_platform=False,
    )
    seconds = time.perf_counter() - started - start_seconds
    return Outcome(seconds, start_seconds, accuracy_of(job, net.body), net.steps)
