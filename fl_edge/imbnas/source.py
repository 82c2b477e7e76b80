"""A super-network trained once on a machine, and a long-tailed task spread over devices: what a scenario starts from.

*Ours* throughout: the source is all that the validation split leaves of the balanced set, so that no path is scored on
images that its weights have seen.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fl_edge.data.config import PartitionConfig
from fl_edge.data.images import ImageSet
from fl_edge.data.once import content_key, made_once
from fl_edge.data.partition import device_indices
from fl_edge.imbnas.adaptation import Source
from fl_edge.imbnas.config import SuperConfig, TailConfig
from fl_edge.imbnas.longtail import LongTailTask, make_task
from fl_edge.imbnas.losses import make_head
from fl_edge.imbnas.space import Space
from fl_edge.imbnas.supernet import Supernet
from fl_edge.imbnas.supertraining import train_supernet
from fl_edge.seeding import torch_rng

_FORM = 1  # to be raised when the training changes, so that what is kept is made anew
_REPORTED = 10  # lines that a training logs

log = logging.getLogger("flwr.fl_edge")


def balanced_source(train: ImageSet, test: ImageSet, tail: TailConfig, seed: int) -> ImageSet:
    """Return the balanced images that a target of the same data set leaves to train a super-network on."""
    return make_task(train, test, replace(tail, profile="exponential", ratio=1.0), seed).train


def load_source(space: Space, images: ImageSet, recipe: SuperConfig, seed: int) -> Source:
    """Return a trained super-network with its head; trained on the first call, then kept on disk.

    Raises
    ------
    DataError
        The caches' folder cannot be written.
    TrainingError
        A loss that is not a number.
    """
    supernet = Supernet(space, images.shape[0], torch_rng(seed, "supernet"))
    head = make_head("ce", space.features, len(images.classes), torch_rng(seed, "supernet", "head"))

    def make(folder: Path) -> None:
        every = max(1, recipe.epochs // _REPORTED)

        def told(epoch: int, loss: float) -> None:
            if (epoch + 1) % every == 0:
                log.info("super-network: epoch %d of %d, loss %.3f", epoch + 1, recipe.epochs, loss)

        train_supernet(supernet, head, images, recipe, seed, on_epoch=told)
        save_file({name: value.contiguous() for name, value in supernet.state_dict().items()}, folder / "supernet")
        save_file(head.state_dict(), folder / "head")

    key = content_key(_FORM, space, asdict(recipe), seed, _digest(images), images.mean, images.std)
    folder = made_once("supernets", key, make, "the super-network")
    supernet.load_state_dict(load_file(folder / "supernet"))
    head.load_state_dict(load_file(folder / "head"))
    supernet.zero_grad()
    head.zero_grad()
    return Source(supernet, head, images)


def device_shards(
    task: LongTailTask, num_devices: int, config: PartitionConfig, seed: int
) -> list[tuple[ImageSet, ImageSet]]:
    """Return the training and validation images of every device.

    Parameters
    ----------
    config
        How training images are spread, on top of the tail. Validation images are spread evenly.

    Raises
    ------
    DataError
        See :func:`fl_edge.data.partition.device_indices`.
    """
    rows = device_indices(task.train.labels.numpy(), num_devices, config, seed)
    order = torch.randperm(len(task.validation), generator=torch_rng(seed, "imbnas", "validation"))
    return [
        (task.train.subset(torch.from_numpy(own)), task.validation.subset(held.sort().values))
        for own, held in zip(rows, order.tensor_split(num_devices), strict=True)
    ]


def _digest(images: ImageSet) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in (images.images, images.labels):
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
