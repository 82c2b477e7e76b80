"""The options of a choice block: convolutions with a norm each, a shortcut where sizes allow one, ReLU at the end.

Source: the specification's CIFAR-sized default (section 5): residual 3x3, separable 3x3 and 5x5, identity. *Ours*: one
convolution in the residual option; no shortcut where size or width changes; and the two options that are there to be
worse: ``narrow3`` squeezes everything through two channels, ``zero`` (as in NAS-Bench-201) gives nothing at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Size = tuple[int, int]  # height, width
Norm = Callable[[int], nn.Module]  # makes the norm of so many channels

STEM_KERNEL = 3
_NARROW = 2  # channels in the middle of narrow3


@dataclass(frozen=True)
class Conv:
    """One convolution without bias, padded so that stride 1 keeps the size."""

    inputs: int
    outputs: int
    kernel: int
    depthwise: bool = False
    strided: bool = False  # carries the block's stride

    @property
    def weights(self) -> int:
        """Return the number of its weights."""
        return self.outputs * (1 if self.depthwise else self.inputs) * self.kernel**2


@dataclass(frozen=True)
class Option:
    """What may stand in a choice block.

    Attributes
    ----------
    convolutions
        (inputs, outputs) -> the block's convolutions in order.
    residual
        The input is added where size and width stay.
    resizes
        It can stand where size or width changes.
    """

    convolutions: Callable[[int, int], tuple[Conv, ...]]
    residual: bool = True
    resizes: bool = True

    def weights(self, inputs: int, outputs: int) -> int:
        """Return the number of weights of all convolutions."""
        return sum(conv.weights for conv in self.convolutions(inputs, outputs))

    def multiply_adds(self, inputs: int, outputs: int, before: Size, after: Size) -> int:
        """Return the multiply-adds of all convolutions for one image, given its size before and after the block."""
        total, size = 0, before
        for conv in self.convolutions(inputs, outputs):
            size = after if conv.strided else size
            total += conv.weights * math.prod(size)
        return total


def _separable(kernel: int) -> Callable[[int, int], tuple[Conv, ...]]:
    def convolutions(inputs: int, outputs: int) -> tuple[Conv, ...]:
        return Conv(inputs, inputs, kernel, depthwise=True, strided=True), Conv(inputs, outputs, 1)

    return convolutions


def _nothing(inputs: int, outputs: int) -> tuple[Conv, ...]:  # noqa: ARG001 - the signature of all options
    return ()


OPTIONS = {
    "conv3": Option(lambda inputs, outputs: (Conv(inputs, outputs, 3, strided=True),)),
    "sep3": Option(_separable(3)),
    "sep5": Option(_separable(5)),
    "narrow3": Option(
        lambda inputs, outputs: (Conv(inputs, _NARROW, 3, strided=True), Conv(_NARROW, outputs, 1)), residual=False
    ),
    "identity": Option(_nothing, resizes=False),
    "zero": Option(_nothing, residual=False),
}


class Block(nn.Module):
    """One option in place.

    Attributes
    ----------
    body
        Convolutions, norms, and ReLU between them.
    residual
        Whether the input is added behind the body.
    """

    def __init__(self, body: nn.Sequential, *, residual: bool) -> None:
        super().__init__()
        self.body = body
        self.residual = residual

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (b, outputs, h', w') of (b, inputs, h, w)."""
        return self.join(inputs, self.body(inputs))

    def join(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return the block's output, given what its body makes of the inputs."""
        return functional.relu(outputs + inputs if self.residual else outputs)


class Zero(nn.Module):
    """Zeros (b, outputs, h / stride, w / stride), without a gradient."""

    def __init__(self, outputs: int, stride: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.stride = stride

    def forward(self, inputs: Tensor) -> Tensor:
        """Return zeros for (b, inputs, h, w)."""
        height, width = half(inputs.shape[2:]) if self.stride == 2 else inputs.shape[2:]  # type: ignore[arg-type]
        return inputs.new_zeros(len(inputs), self.outputs, height, width)


def half(size: Size) -> Size:
    """Return the size behind a stride of 2: halves, rounded up."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def make_block(
    option: str, inputs: int, outputs: int, stride: int, norm: Norm, generator: torch.Generator
) -> Block | None:
    """Build an option, weights drawn from the generator; None for the identity, which is no layer at all.

    Parameters
    ----------
    option
        A name of :data:`OPTIONS`.
    inputs, outputs
        Channels.
    stride
        1 or 2.
    norm
        Makes a norm, given its channels.
    """
    if option == "identity":
        return None
    if option == "zero":
        return Block(nn.Sequential(Zero(outputs, stride)), residual=False)
    kind, layers = OPTIONS[option], list[nn.Module]()
    for conv in kind.convolutions(inputs, outputs):
        layers += [nn.ReLU()] if layers else []
        layers += [make_conv(conv, stride if conv.strided else 1, generator), norm(conv.outputs)]
    return Block(nn.Sequential(*layers), residual=kind.residual and stride == 1 and inputs == outputs)


def make_stem(channels: int, outputs: int, norm: Norm, generator: torch.Generator) -> Block:
    """Build the stem, a 3x3 convolution of stride 1 that all paths share; see :func:`make_block`."""
    conv = make_conv(Conv(channels, outputs, STEM_KERNEL), 1, generator)
    return Block(nn.Sequential(conv, norm(outputs)), residual=False)


def make_conv(conv: Conv, stride: int, generator: torch.Generator) -> nn.Conv2d:
    """Build a convolution with He's initialisation, in the memory format in which small images run fastest."""
    groups = conv.inputs if conv.depthwise else 1
    with torch.device("meta"):  # the default initialisation would draw from the global generator
        layer = nn.Conv2d(conv.inputs, conv.outputs, conv.kernel, stride, conv.kernel // 2, groups=groups, bias=False)
    layer.to_empty(device="cpu")
    nn.init.kaiming_normal_(layer.weight, generator=generator)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return layer
