"""A super-network: all paths of a space in one module, of which every forward pass runs one.

Source: single-path one-shot (SPOS, arXiv 1904.00420) by way of the IMB-NAS specification, section 5: one path a step,
BatchNorm without affine parameters. *Ours*: no head inside, so that one backbone serves any set of classes; no running
statistics, which mean nothing for a single path (see :mod:`fl_edge.imbnas.batchnorm`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_edge.imbnas.blocks import Block, make_block, make_stem
from fl_edge.imbnas.space import Architecture, Space

EPSILON = 1e-5  # added to variances; torch's default


class PathNorm(nn.Module):
    """BatchNorm without affine parameters and without momentum.

    The batch's own statistics in training, stored ones in evaluation. What is stored belongs to one path and is not
    part of the state dict: weights alone make a super-network.

    Attributes
    ----------
    mean, variance
        (channels,) float32: what evaluation uses; 0 and 1 until somebody stores something.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels), persistent=False)
        self.register_buffer("variance", torch.ones(channels), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the normalised (b, c, h, w)."""
        mean, variance = (None, None) if self.training else (self.mean, self.variance)
        return functional.batch_norm(inputs, mean, variance, training=self.training, eps=EPSILON)


class Supernet(nn.Module):
    """The backbone of all paths; a path's layers are the only ones that run, and that get gradients.

    Parameters
    ----------
    space
        Which paths there are.
    channels
        Of the images.
    generator
        Draws the weights, in the order of the blocks and of their options.

    Attributes
    ----------
    stem
        Shared by all paths.
    blocks
        For every block its options by name; the identity is not among them.
    """

    def __init__(self, space: Space, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.space = space
        self.channels = channels
        self.stem = make_stem(channels, space.stem, PathNorm, generator)
        self.blocks = nn.ModuleList()
        for place in space.places:
            options = {
                name: make_block(name, place.inputs, place.outputs, place.stride, PathNorm, generator)
                for name in place.options
            }
            self.blocks.append(nn.ModuleDict({name: block for name, block in options.items() if block is not None}))

    def path(self, architecture: Architecture) -> list[Block]:
        """Return the stem and a path's blocks in order, without its identities.

        Raises
        ------
        ConfigError
            An architecture that the space does not have.
        """
        chain = [self.stem]
        for options, name in zip(self.blocks, self.space.names(self.space.check(architecture)), strict=True):
            if name != "identity":
                chain.append(options[name])  # type: ignore[index]
        return chain

    def forward(self, images: Tensor, architecture: Architecture) -> Tensor:
        """Return the features (b, d) of images (b, c, h, w) on one path."""
        for block in self.path(architecture):
            images = block(images)
        return functional.adaptive_avg_pool2d(images, 1).flatten(1)
