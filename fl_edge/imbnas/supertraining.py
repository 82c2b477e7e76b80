"""Training of a super-network: random paths, one step after another.

    W_s, phi_s = argmin E_{a ~ U(A)} CE(phi^T f(x; a, W), y)

Source: single-path uniform sampling of SPOS (arXiv 1904.00420) and strict fairness of FairNAS (arXiv 1907.01845), by
way of the IMB-NAS specification, sections 5 and 13. *Ours*: cosine instead of linear decay; where blocks have unequally
many options, a fair step gives every option of a block its turn and draws the rest; a parameter that several paths of a
fair step share gets the mean of their gradients; no image is left out of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_edge.data.images import ImageSet
from fl_edge.errors import DataError, TrainingError
from fl_edge.imbnas.augmentation import augment
from fl_edge.imbnas.config import SuperConfig
from fl_edge.imbnas.losses import Loss
from fl_edge.imbnas.space import Architecture, Space, random
from fl_edge.imbnas.supernet import Supernet
from fl_edge.seeding import numpy_rng, torch_rng


def train_supernet(
    supernet: Supernet,
    head: nn.Module,
    images: ImageSet,
    recipe: SuperConfig,
    seed: int,
    *,
    loss: Loss | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Train a super-network and its head in place.

    Parameters
    ----------
    supernet, head
        On one device, which is where the training happens.
    images
        Training set, balanced or not.
    recipe
        Settings.
    seed
        Of the experiment: decides batches, paths and augmentation by (seed, epoch, step).
    loss
        Of scores, labels and the share of the training that is done; cross-entropy if None.
    on_epoch
        Is told the epoch, from 0, and the mean loss of its steps.

    Raises
    ------
    DataError
        A set without images.
    TrainingError
        A loss that is not a number.
    """
    if not len(images):
        raise DataError("a super-network cannot be trained on a set without images")
    parameters = [*supernet.parameters(), *head.parameters()]
    optimiser = torch.optim.SGD(
        parameters, recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    device = parameters[0].device
    images = replace(images, images=images.images.to(device), labels=images.labels.to(device))
    objective = loss or _cross_entropy
    count = math.ceil(len(images) / recipe.batch_size)
    supernet.train()
    head.train()
    for epoch in range(recipe.epochs):
        generator = torch_rng(seed, "supernet", epoch)
        batches = torch.randperm(len(images), generator=generator).to(device).tensor_split(count)
        total = torch.zeros((), device=device)
        for step, chosen in enumerate(batches):
            progress = (epoch + step / count) / recipe.epochs
            for group in optimiser.param_groups:
                group["lr"] = cosine(recipe.learning_rate, progress)
            inputs, labels = images.batch(chosen)
            inputs = augment(inputs, recipe.crop_padding, recipe.flip, generator)
            paths = draw_paths(supernet.space, recipe.sampling, numpy_rng(seed, "paths", epoch, step))
            optimiser.zero_grad()  # to None: what no path of this step has keeps weights and momentum
            for path in paths:
                value = objective(head(supernet(inputs, path)), labels, progress)
                value.backward()  # type: ignore[no-untyped-call]
                total += value.detach() / len(paths)
            _average(supernet, head, paths)
            optimiser.step()
        mean = float(total) / count
        if not math.isfinite(mean):
            raise TrainingError(
                f"the super-network's loss is {mean} in epoch {epoch}; a learning rate below {recipe.learning_rate} "
                "may help"
            )
        if on_epoch is not None:
            on_epoch(epoch, mean)


def draw_paths(space: Space, sampling: str, rng: np.random.Generator) -> list[Architecture]:
    """Return the paths of one step.

    ``uniform``: one path, all equally likely. ``fair``: as many as the richest block has options; in each block every
    option comes equally often where the numbers allow, else no two differ by more than one.
    """
    if sampling == "uniform":
        return [random(space, rng)]
    counts = [len(options) for options in space.choices]
    columns = [_turns(count, max(counts), rng) for count in counts]
    return list(zip(*columns, strict=True))


def cosine(rate: float, progress: float) -> float:
    """Return the learning rate when a share of the training, in [0, 1], is done: from ``rate`` down to 0."""
    return rate * 0.5 * (1 + math.cos(math.pi * progress))


def _turns(options: int, length: int, rng: np.random.Generator) -> list[int]:
    """Return ``length`` options in random order, none of them more than once oftener than another."""
    whole, rest = divmod(length, options)
    turns = np.concatenate([np.tile(np.arange(options), whole), rng.permutation(options)[:rest]])
    return [int(turn) for turn in rng.permutation(turns)]


def _average(supernet: Supernet, head: nn.Module, paths: list[Architecture]) -> None:
    """Divide every gradient by the number of the paths that it is summed over."""
    if len(paths) == 1:
        return
    uses: dict[nn.Parameter, int] = {}
    for path in paths:
        for module in (*supernet.path(path), head):
            for parameter in module.parameters():
                uses[parameter] = uses.get(parameter, 0) + 1
    for parameter, times in uses.items():
        if parameter.grad is not None and times > 1:
            parameter.grad /= times


def _cross_entropy(scores: Tensor, labels: Tensor, progress: float) -> Tensor:  # noqa: ARG001 - as all losses
    return functional.cross_entropy(scores, labels)
