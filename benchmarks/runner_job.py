"""One federated job, and the plain loop that runs it without any framework.

scikit-learn's digits, an MLP 64-64-10, 50 clients with 30 pictures each, 10 clients a round, 20 rounds, one local epoch
in batches of 10 by SGD at 0.1: 200 client tasks of 3 steps. All runners start from the same weights and see the same
data. The loop and Flower call the same :func:`local_epoch`; pfl has its own training loop and gets the same batches.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fl_edge.seeding import torch_rng

BATCH = 10
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Job:
    """Size and seed of the job; with the same values every runner does the same number of steps."""

    seed: int = 0
    clients: int = 50
    per_round: int = 10
    rounds: int = 20
    samples: int = 30

    @property
    def steps(self) -> int:
        """Local steps in the whole job."""
        return self.rounds * self.per_round * -(-self.samples // BATCH)


@dataclass(frozen=True)
class Outcome:
    """What one run of the job took and gave: real seconds for its rounds and to start, test accuracy, local steps."""

    seconds: float
    start_seconds: float
    accuracy: float
    steps: int


@lru_cache(maxsize=4)
def load_data(job: Job) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    """Return the clients' shares ((samples, 64) pictures in [0, 1], (samples,) labels) and the rest as test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch_rng(job.seed, "split"))
    pictures = torch.tensor(digits.data / 16.0, dtype=torch.float32)[order]
    labels = torch.tensor(digits.target, dtype=torch.int64)[order]
    cut = job.clients * job.samples
    shares = list(zip(torch.split(pictures[:cut], job.samples), torch.split(labels[:cut], job.samples), strict=True))
    return shares, (pictures[cut:], labels[cut:])


def make_model(job: Job) -> nn.Sequential:
    """Return the MLP with the job's own initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def accuracy_of(job: Job, model: nn.Module) -> float:
    """Return the share of test pictures that the model names rightly."""
    pictures, labels = load_data(job)[1]
    with torch.no_grad():
        return float((model(pictures).argmax(1) == labels).float().mean())


def batch_order(job: Job, client: int, round_number: int) -> torch.Tensor:
    """Return the order, drawn from (seed, round, client), in which a client goes through its pictures."""
    return torch.randperm(job.samples, generator=torch_rng(job.seed, "batches", round_number, client))


def local_epoch(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, client: int, round_number: int) -> int:
    """Train one client's epoch; return the number of steps."""
    pictures, labels = load_data(job)[0][client]
    batches = torch.split(batch_order(job, client, round_number), BATCH)
    for batch in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pictures[batch]), labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return len(batches)


def run_loop(job: Job, *, reuse: bool = True) -> Outcome:
    """Run the job as a person would write it without a framework: one flat vector, one model, one optimizer.

    With ``reuse=False`` every client gets a deep copy of the model and an optimizer of its own.
    """
    load_data(job)
    model = make_model(job)
    started = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    chooser = random.Random(job.seed)  # noqa: S311
    weights = parameters_to_vector(model.parameters()).detach()
    steps = 0
    for round_number in range(1, job.rounds + 1):
        total = torch.zeros_like(weights)
        for client in chooser.sample(range(job.clients), job.per_round):
            local, local_optimizer = model, optimizer
            if not reuse:
                local = copy.deepcopy(model)
                local_optimizer = torch.optim.SGD(local.parameters(), LEARNING_RATE)
            with torch.no_grad():
                vector_to_parameters(weights.clone(), local.parameters())  # the parameters become views of it
            steps += local_epoch(job, local, local_optimizer, client, round_number)
            with torch.no_grad():
                total += parameters_to_vector(local.parameters()) * (1 / job.per_round)
        weights = total
    vector_to_parameters(weights, model.parameters())
    seconds = time.perf_counter() - started
    return Outcome(seconds, 0.0, accuracy_of(job, model), steps)
