"""IMB-NAS on devices, tiny: a super-network of 18 paths, digits with a tail over three unequal devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.clientapp import ClientApp

from fl_edge.clients.cache import WeightCache
from fl_edge.clients.imbnas import ImbNasClient, ImbNasWorkload
from fl_edge.data.config import DataConfig
from fl_edge.data.images import ImageSet, load_test, load_train
from fl_edge.imbnas.adaptation import PROCEDURES, Adapted, Source
from fl_edge.imbnas.config import (
    AdaptConfig,
    BatchNormConfig,
    FederatedConfig,
    HeadConfig,
    RetrainConfig,
    SearchConfig,
    SuperConfig,
    TailConfig,
)
from fl_edge.imbnas.longtail import make_task
from fl_edge.imbnas.losses import make_head
from fl_edge.imbnas.report import ImbNasRound
from fl_edge.imbnas.scoring import Scorer
from fl_edge.imbnas.space import Space, Stage
from fl_edge.imbnas.supernet import Supernet
from fl_edge.imbnas.supertraining import train_supernet
from fl_edge.seeding import torch_rng
from fl_edge.strategies.imbnas import ImbNas

SPACE = Space(4, (Stage(4, 2, 1), Stage(8, 1, 2)), ("conv3", "sep3", "identity"))
SEED = 3
BRIEF = FederatedConfig(
    head_rounds=2,
    final_rounds=2,
    head=HeadConfig(epochs=4, batch_size=32, tolerance=1e-2),
    batchnorm=BatchNormConfig(images=64),
    search=SearchConfig(population=4, top=2, generations=1, mutants=1, crosses=1, mutation=0.5),
    final=RetrainConfig(epochs=2, batch_size=32, crop_padding=0, flip=False),
)


@functools.cache
def digits() -> tuple[ImageSet, ImageSet]:
    return load_train(DataConfig(), 0), load_test(DataConfig(), 0)


@functools.cache
def source() -> Source:
    supernet = Supernet(SPACE, 1, torch_rng(0, "tiny"))
    head = make_head("ce", SPACE.features, 10, torch_rng(1, "tiny"))
    train_supernet(supernet, head, digits()[0], SuperConfig(epochs=4), seed=0)
    supernet.zero_grad()
    return Source(supernet, head, digits()[0])


@functools.cache
def shards() -> tuple[tuple[ImageSet, ImageSet], ...]:
    """Training and validation images of three devices: the second lacks classes, no device has a 9."""
    task = make_task(*digits(), TailConfig(ratio=20, validation_per_class=5), seed=0)
    labels = task.train.labels
    rows = torch.arange(len(labels))
    owner = torch.where(labels < 4, rows % 3, 2 * (rows % 2))
    held = torch.arange(len(task.validation)) % 2  # the third device scores nothing
    return tuple(
        (
            task.train.subset(rows[(owner == device) & (labels != 9)]),
            task.validation.subset((held == device).nonzero().squeeze(1)),
        )
        for device in range(3)
    )


def union(devices: tuple[int, ...] = (0, 1, 2)) -> tuple[ImageSet, ImageSet]:
    """The images of some devices on one machine."""
    chosen = [shards()[device] for device in devices]
    found = [
        replace(one[0], images=torch.cat([s.images for s in one]), labels=torch.cat([s.labels for s in one]))
        for one in zip(*chosen, strict=True)
    ]
    return found[0], found[1]


def central(procedure: str, head: torch.nn.Module | None, devices: tuple[int, ...] = (0, 1, 2)) -> Scorer:
    """What scores paths on one machine that has all images."""
    images = source().images if procedure == "P0" else union(devices)[0]
    adapted = Adapted(PROCEDURES[procedure], source().supernet, head, images)
    return Scorer(adapted, AdaptConfig(BRIEF.head, BRIEF.loss, SuperConfig(), BRIEF.batchnorm), SEED)


class Site:
    """Three devices in this process."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.rounds = WeightCache(cache), list[ImbNasRound]()
        self.work = [ImbNasWorkload(f"device-{index}", *own) for index, own in enumerate(shards())]

    def app(self) -> ClientApp:
        app = ClientApp()
        ImbNasClient(lambda context: self.work[int(context.node_config["partition-id"])], cache=self.cache).register(
            app
        )
        return app

    def anew(self) -> Callable[[Any, Any], Any]:
        """Return an app that is another process at every message."""

        def answer(message: Any, context: Any) -> Any:
            return self.app()(message, context)

        return answer

    def strategy(self, **changes: Any) -> ImbNas:
        config = replace(BRIEF, **changes)
        return ImbNas(
            source(), digits()[1], config, seed=SEED, min_devices=3, patience_s=1, observers=[self.rounds.append]
        )
