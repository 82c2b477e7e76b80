"""A tiny federated job: 4 features, 3 classes, a bottom with dropout and BatchNorm if wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fl_edge.clients.cache import WeightCache
from fl_edge.clients.mergesfl import MergeSFLClient, Workload
from fl_edge.edge.config import EdgeConfig
from fl_edge.link.local import LocalGrid
from fl_edge.mergesfl.config import MergeSFLConfig
from fl_edge.models.split import SplitModel
from fl_edge.seeding import torch_rng
from fl_edge.strategies.mergesfl import MergeSFL

CLASSES, WIDTH, FEATURES = 3, 4, 5


def make_model(*, rich: bool = False, seed: int = 0) -> SplitModel:
    """Linear bottom and top; `rich` adds BatchNorm and dropout to the bottom."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extra = [nn.BatchNorm1d(FEATURES), nn.Dropout(0.4)] if rich else []
        bottom = nn.Sequential(nn.Linear(WIDTH, FEATURES), *extra, nn.Tanh())
        return SplitModel(bottom, nn.Sequential(nn.Linear(FEATURES, CLASSES)))


def make_data(device: int, samples: int = 20) -> tuple[Tensor, Tensor]:
    """Inputs (n, 4) and labels (n,); device k holds mostly class k mod 3."""
    generator = torch_rng(7, "tiny", device)
    inputs = torch.randn(samples, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    labels[: samples // 2] = device % CLASSES
    return inputs + labels[:, None], labels


def workload(device: int, model: SplitModel, samples: int = 20) -> Workload:
    inputs, labels = make_data(device, samples)
    return Workload(
        device=f"device-{device}",
        bottom=model.bottom,
        labels=labels,
        num_classes=CLASSES,
        batch=lambda indices: inputs[indices],
        costs=lambda server_round: (0.001 * (device + 1 + 0.1 * server_round), 0.002 + 0.0001 * server_round),
    )


def make_app(folder: Path, *, rich: bool = False, keep_live: int = 64) -> ClientApp:
    app = ClientApp()
    model = make_model(rich=rich, seed=99)  # other weights than the server's: they must be replaced

    def load(context: Context) -> Workload:
        return workload(int(context.node_config["partition-id"]), model)

    MergeSFLClient(load, cache=WeightCache(folder), keep_live=keep_live).register(app)
    return app


def make_strategy(*, rich: bool = False, devices: int = 4, seed: int = 3, **settings: Any) -> MergeSFL:
    config = MergeSFLConfig(**{"tau": 3, "batch_size": 6, "ingress_batches": 4.0, "min_workers": 2, **settings})
    return MergeSFL(
        make_model(rich=rich), (FEATURES,), config, seed=seed, edge=EdgeConfig(), min_devices=devices, patience_s=1
    )


def train(folder: Path, rounds: int = 2, *, devices: int = 4, keep_live: int = 64, faults: Any = None,
          rich: bool = False, **settings: Any) -> MergeSFL:  # fmt: skip
    """Train on a LocalGrid and return the strategy."""
    strategy = make_strategy(rich=rich, devices=devices, **settings)
    grid = LocalGrid(make_app(folder, rich=rich, keep_live=keep_live), devices, faults=faults)
    strategy.start(grid, num_rounds=rounds)
    return strategy


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
