"""A path as a module of its own: with the super-network's weights, or fresh ones to be trained.

Source: IMB-NAS specification, sections 7 and 15 (test 5). *Ours*: a fresh network has affine BatchNorm.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fl_edge.imbnas.blocks import Block, make_block, make_stem
from fl_edge.imbnas.losses import make_head
from fl_edge.imbnas.space import Architecture, Space
from fl_edge.imbnas.supernet import EPSILON, PathNorm, Supernet


class Network(nn.Module):
    """One path of plain layers.

    Attributes
    ----------
    features
        (b, c, h, w) to (b, d).
    head
        (b, d) to scores (b, classes); the identity where there is none. It may be replaced.
    """

    def __init__(self, blocks: Sequence[Block], head: nn.Module | None) -> None:
        super().__init__()
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Identity() if head is None else head

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores (b, classes), or the features where there is no head."""
        scores: Tensor = self.head(self.features(images))
        return scores


def extract(supernet: Supernet, architecture: Architecture, head: nn.Module | None = None) -> Network:
    """Copy a path out of the super-network, as plain layers with the same outputs in both modes.

    Statistics that are stored in the path's norms become the running statistics of ``nn.BatchNorm2d``.

    Parameters
    ----------
    head
        Is copied; None for a network that ends with its features.
    """
    blocks = [copy.deepcopy(block) for block in supernet.path(architecture)]
    for block in blocks:
        for place, layer in enumerate(block.body):
            if isinstance(layer, PathNorm):
                block.body[place] = _plain(layer)
    return Network(blocks, copy.deepcopy(head)).train(supernet.training)


def fresh_network(
    space: Space,
    architecture: Architecture,
    channels: int,
    classes: int,
    generator: torch.Generator,
    loss: str = "ce",
) -> Network:
    """Return a path with drawn weights, affine BatchNorm and a head, to be trained from scratch.

    Parameters
    ----------
    channels
        Of the images.
    classes
        Outputs of the head.
    generator
        Draws the weights, from the stem on, the head last.
    loss
        Name of the loss that the head must fit.
    """
    chain = [make_stem(channels, space.stem, nn.BatchNorm2d, generator)]
    for place, name in zip(space.places, space.names(space.check(architecture)), strict=True):
        block = make_block(name, place.inputs, place.outputs, place.stride, nn.BatchNorm2d, generator)
        chain += [block] if block is not None else []
    return Network(chain, make_head(loss, space.features, classes, generator))


def _plain(norm: PathNorm) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(len(norm.mean), eps=EPSILON, affine=False).to(norm.mean.device)
    assert plain.running_mean is not None
    assert plain.running_var is not None
    plain.running_mean.copy_(norm.mean)
    plain.running_var.copy_(norm.variance)
    return plain.train(norm.training)
