"""Adapting a super-network that was trained on balanced data to a long-tailed target.

Source: IMB-NAS compares such procedures and finds it best to freeze the backbone and retrain the linear head with a
loss re-weighted late (DRW); only that much could be read. The labels P0 to P4 and what each does in detail are the
specification's (section 6), by attributes: what happens to the backbone, which head, which loss. *Ours*: ``OWN``, the
recommended setting, and scores by probability; that P0 keeps the source's BatchNorm statistics as well, so that it
ranks as on the source.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from fl_edge.data.images import ImageSet
from fl_edge.errors import ConfigError, DataError, TrainingError
from fl_edge.imbnas.config import AdaptConfig, HeadConfig
from fl_edge.imbnas.heads import CONVEX
from fl_edge.imbnas.longtail import LongTailTask
from fl_edge.imbnas.losses import Loss, make_head, make_loss
from fl_edge.imbnas.space import random
from fl_edge.imbnas.supernet import Supernet
from fl_edge.imbnas.supertraining import cosine, train_supernet
from fl_edge.seeding import numpy_rng, torch_rng

BACKBONES = ("source", "frozen", "tuned", "scratch")
HEADS = ("kept", "shared", "own")
SCORES = ("accuracy", "probability")


@dataclass(frozen=True)
class Adaptation:
    """What is done with a super-network on the target.

    Attributes
    ----------
    backbone
        ``source``: nothing, not even BatchNorm statistics are the target's. ``frozen``: the weights stay. ``tuned``:
        trained on, with the head. ``scratch``: trained anew on the target alone.
    head
        ``kept``: the source's, or, where the classes differ, one for all paths fitted by plain cross-entropy.
        ``shared``: a fresh one for all paths. ``own``: one for each candidate, fitted when it is scored.
    loss
        Of all training on the target, see :func:`fl_edge.imbnas.losses.make_loss`.
    score
        Of a path, mean over classes and validation images. ``accuracy``: whether the answer is right.
        ``probability``: that of the right class (ours).

    Raises
    ------
    ConfigError
        Attributes that do not go together.
    """

    backbone: str
    head: str
    loss: str
    score: str = "accuracy"

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES or self.head not in HEADS:
            raise ConfigError(f"{self} is not allowed; backbones are {', '.join(BACKBONES)}, heads {', '.join(HEADS)}")
        if self.score not in SCORES:
            raise ConfigError(f"score={self.score} is not allowed; it must be one of {', '.join(SCORES)}")
        if self.head == "kept" and self.backbone in ("tuned", "scratch"):
            raise ConfigError(f"head=kept does not go with backbone={self.backbone}; it must be shared or own")
        if self.head != "kept" and self.backbone == "source":
            raise ConfigError(f"head={self.head} does not go with backbone=source; frozen is the backbone for that")
        if self.head == "own" and self.loss not in CONVEX:
            raise ConfigError(f"head=own does not go with loss={self.loss}; it must be one of {', '.join(CONVEX)}")


OWN = Adaptation("frozen", "own", "balanced_softmax", "probability")
PROCEDURES = {
    "P0": Adaptation("source", "kept", "ce"),
    "P1": Adaptation("frozen", "shared", "drw"),
    "P1-CE": Adaptation("frozen", "shared", "ce"),
    "P2": Adaptation("tuned", "shared", "drw"),
    "P3": Adaptation("scratch", "shared", "drw"),
    "P4": Adaptation("scratch", "shared", "ce"),
    "own": OWN,
}


@dataclass(frozen=True, eq=False)
class Source:
    """A super-network as it was trained.

    Attributes
    ----------
    supernet, head
        On one device. Adapting never changes them.
    images
        The balanced training set.
    """

    supernet: Supernet
    head: nn.Module
    images: ImageSet


@dataclass(frozen=True, eq=False)
class Adapted:
    """A super-network that can score paths on the target.

    Attributes
    ----------
    procedure
        How it came about.
    supernet
        The source's own where the backbone is not trained: evaluation statistics stored in it are the last path's.
    head
        Of all paths; None where each candidate gets its own.
    images
        Training images that BatchNorm statistics, and own heads, are estimated from.
    """

    procedure: Adaptation
    supernet: Supernet
    head: nn.Module | None
    images: ImageSet


@dataclass(frozen=True)
class Turn:
    """Which part of a training this is: the whole of it, or a device's part of one round of a federated one.

    Attributes
    ----------
    number, rounds
        Round, from 0, and how many there are. Learning rate and DRW follow the progress over all rounds.
    device
        Who trains: batches differ between devices, paths do not, so that all train the same ones.
    """

    number: int = 0
    rounds: int = 1
    device: str = ""


def adapt(procedure: Adaptation, source: Source, task: LongTailTask, config: AdaptConfig, seed: int) -> Adapted:
    """Adapt a super-network to a target.

    Parameters
    ----------
    procedure
        One of :data:`PROCEDURES`, or any other.
    source
        What there is; unchanged afterwards, to the bit, except for modes and evaluation statistics.
    task
        The target; only its training images are looked at.
    config
        Settings of heads, losses and training from scratch.
    seed
        Of the experiment.

    Raises
    ------
    TrainingError
        A loss that is not a number.
    """
    if procedure.head == "kept" and source.images.classes == task.train.classes:
        images = source.images if procedure.backbone == "source" else task.train
        return Adapted(procedure, source.supernet, source.head, images)
    name = "ce" if procedure.head == "kept" else procedure.loss
    device = next(source.head.parameters()).device
    supernet = source.supernet
    if procedure.backbone == "frozen" and procedure.head == "own":
        return Adapted(procedure, supernet, None, task.train)
    classes = len(task.train.classes)
    head = make_head(name, supernet.space.features, classes, torch_rng(seed, "head")).to(device)
    loss = make_loss(name, task.counts.to(device), config.loss)
    if procedure.backbone == "scratch":
        supernet = Supernet(supernet.space, supernet.channels, torch_rng(seed, "scratch")).to(device)
        train_supernet(supernet, head, task.train, config.scratch, seed, loss=loss)
    else:
        tuned = procedure.backbone == "tuned"
        supernet = copy.deepcopy(supernet) if tuned else supernet
        train_head(supernet, head, task.train, loss, config.head, seed, tune_backbone=tuned)
    return Adapted(procedure, supernet, None if procedure.head == "own" else head, task.train)


def train_head(
    supernet: Supernet,
    head: nn.Module,
    images: ImageSet,
    loss: Loss,
    config: HeadConfig,
    seed: int,
    *,
    turn: Turn = Turn(),
    tune_backbone: bool = False,
) -> float:
    """Train a head in place on a random path each step, and return the mean loss of the last epoch.

    phi = argmin E_{a ~ U(A)} sum w_y CE(phi^T f(x; a, W_s), y) (specification, section 6), BatchNorm with the batch's
    statistics. Without ``tune_backbone`` the backbone runs without gradients and stays as it is, to the bit.

    Parameters
    ----------
    supernet, head
        On one device, which is where the training happens.
    images
        Training images, of the target or of one device's shard of it.
    loss
        Made with the counts of the *whole* target, also on a device.
    config
        Optimiser and epochs (of a device: in this round).
    seed
        Of the experiment: decides batches and paths.
    turn
        Part of a federated training; by default the whole of a central one.
    tune_backbone
        Train the backbone as well, at ``config.backbone_rate`` times the learning rate (P2).

    Raises
    ------
    DataError
        No images.
    TrainingError
        A loss that is not a number.
    """
    if not len(images):
        raise DataError("a head cannot be trained on a set without images")
    device = next(head.parameters()).device
    images = replace(images, images=images.images.to(device), labels=images.labels.to(device))
    groups = [{"params": list(head.parameters()), "share": 1.0}]
    if tune_backbone:
        groups.append({"params": list(supernet.parameters()), "share": config.backbone_rate})
    optimiser = torch.optim.SGD(
        groups, config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    count = math.ceil(len(images) / config.batch_size)
    supernet.train()
    head.train()
    total = torch.zeros((), device=device)
    for epoch in range(config.epochs):
        generator = torch_rng(seed, "head batches", turn.number, epoch, turn.device)
        total.zero_()
        for step, chosen in enumerate(torch.randperm(len(images), generator=generator).to(device).tensor_split(count)):
            progress = (turn.number + (epoch + step / count) / config.epochs) / turn.rounds
            for group in optimiser.param_groups:
                group["lr"] = cosine(config.learning_rate, progress) * group["share"]
            inputs, labels = images.batch(chosen)
            path = random(supernet.space, numpy_rng(seed, "head paths", turn.number, epoch, step))
            with torch.set_grad_enabled(tune_backbone):
                features = supernet(inputs, path)
            optimiser.zero_grad()  # to None: what the path does not have keeps weights and momentum
            value = loss(head(features), labels, progress)
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += value.detach()
        if not math.isfinite(float(total)):
            raise TrainingError(
                f"the head's loss is {float(total) / count} in epoch {epoch}; a learning rate below "
                f"{config.learning_rate} may help"
            )
    return float(total) / count
