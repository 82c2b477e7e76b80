"""Training one architecture from scratch on the long tail, and what it then gets right on the balanced test set.

Source: LDAM-DRW's trainer, as section 4 of the specification has it; every epoch of its schedule is kept as a share of
the training, so that shorter trainings have the same course. *Ours*: no image is left out of an epoch.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fl_edge.data.images import ImageSet
from fl_edge.errors import DataError, TrainingError
from fl_edge.imbnas.adaptation import Turn
from fl_edge.imbnas.augmentation import augment
from fl_edge.imbnas.config import LossConfig, RetrainConfig
from fl_edge.imbnas.extraction import Network, fresh_network
from fl_edge.imbnas.longtail import LongTailTask
from fl_edge.imbnas.losses import Loss, make_loss
from fl_edge.imbnas.scoring import on_device
from fl_edge.imbnas.space import Architecture, Space
from fl_edge.imbnas.tally import confusion_matrix
from fl_edge.seeding import torch_rng

_WHOLE = Turn()


def retrain(
    space: Space,
    architecture: Architecture,
    task: LongTailTask,
    loss: str,
    losses: LossConfig,
    recipe: RetrainConfig,
    seed: int,
) -> torch.Tensor:
    """Train a fresh network of an architecture on a task's tail; return its confusion matrix on the test set.

    Parameters
    ----------
    loss
        See :func:`fl_edge.imbnas.losses.make_loss`; LDAM gets its normalised head.
    seed
        Of the experiment: decides weights, batches and augmentation, the same weights for every loss.

    Returns
    -------
    Tensor
        int64 (C, C); see :meth:`fl_edge.imbnas.tally.Tally.from_confusion`.

    Raises
    ------
    TrainingError
        A loss that is not a number.
    """
    network = make_network(space, architecture, task.train, loss, seed)
    train_network(network, task.train, make_loss(loss, task.counts, losses), recipe, seed)
    return confusion(network, task.test)


def make_network(space: Space, architecture: Architecture, images: ImageSet, loss: str, seed: int) -> Network:
    """Return an untrained network for a set of images, with the head that the loss takes."""
    classes = len(images.classes)
    return fresh_network(space, architecture, images.shape[0], classes, torch_rng(seed, "network"), loss)


def train_network(
    network: nn.Module, images: ImageSet, loss: Loss, recipe: RetrainConfig, seed: int, *, turn: Turn = _WHOLE
) -> float:
    """Train a network in place, on its device, and return the mean loss of the last epoch.

    Parameters
    ----------
    network
        Takes images (b, c, h, w), returns logits (b, C).
    images
        Training set.
    loss
        Made with the training set's counts, on the same device.
    recipe
        Settings.
    seed
        Of the experiment; of this round and device in a federated training.
    turn
        Part of a federated training; by default the whole of a central one.

    Raises
    ------
    DataError
        Fewer than two images, which BatchNorm cannot normalise.
    TrainingError
        A loss that is not a number.
    """
    if len(images) < 2:
        raise DataError(f"a network cannot be trained on {len(images)} images; it takes at least 2")
    parameters = list(network.parameters())
    device = parameters[0].device
    images = on_device(images, device)
    optimiser = torch.optim.SGD(
        parameters, recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    count = math.ceil(len(images) / recipe.batch_size)
    network.train()
    total = torch.zeros((), device=device)
    for epoch in range(recipe.epochs):
        generator = torch_rng(seed, "retraining", epoch)
        total.zero_()
        for step, chosen in enumerate(torch.randperm(len(images), generator=generator).to(device).tensor_split(count)):
            progress = (turn.number + (epoch + step / count) / recipe.epochs) / turn.rounds
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate_at(progress)
            inputs, labels = images.batch(chosen)
            inputs = augment(inputs, recipe.crop_padding, recipe.flip, generator)
            optimiser.zero_grad()
            value = loss(network(inputs), labels, progress)
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += value.detach()
        if not math.isfinite(float(total)):
            raise TrainingError(
                f"the loss is {float(total) / count} in epoch {epoch}; a learning rate below {recipe.learning_rate} "
                "may help"
            )
    return float(total) / count


@torch.no_grad()
def confusion(network: nn.Module, images: ImageSet, batch_size: int = 512) -> torch.Tensor:
    """Return a network's confusion matrix, int64 (C, C)."""
    network.eval()
    images = on_device(images, next(network.parameters()).device)
    inputs, labels = images.batch()
    predictions = torch.cat([network(part).argmax(1) for part in torch.split(inputs, batch_size)])
    return confusion_matrix(predictions, labels, len(images.classes))
