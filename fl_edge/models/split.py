"""Split models: a bottom on the worker, a top on the server, and what passes between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fl_edge.errors import ConfigError

_FLOAT_BYTES = 4  # features travel as float32


class SplitModel(nn.Module):
    """A model in two parts, ``forward(x) = top(bottom(x))``.

    Attributes
    ----------
    bottom, top
        The worker's part and the server's.
    """

    def __init__(self, bottom: nn.Sequential, top: nn.Sequential) -> None:
        super().__init__()
        self.bottom = bottom
        self.top = top

    def forward(self, inputs: Tensor) -> Tensor:
        """Return class scores (n, classes) of inputs (n, ...)."""
        scores: Tensor = self.top(self.bottom(inputs))
        return scores


def split_at(layers: nn.Sequential, cut: int) -> SplitModel:
    """Cut a chain of layers behind its first ``cut`` ones. The layers themselves are taken over, not copied.

    Raises
    ------
    ConfigError
        A cut that leaves one side without layers.
    """
    if not 1 <= cut < len(layers):
        raise ConfigError(
            f"cut={cut} is not allowed; the model has {len(layers)} layers, so it must be at least 1 and "
            f"at most {len(layers) - 1}"
        )
    chain = list(layers)
    return SplitModel(nn.Sequential(*chain[:cut]), nn.Sequential(*chain[cut:]))


def feature_shape(bottom: nn.Module, input_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of one sample's feature, without the batch axis. The bottom's state and mode stay as they are.

    Parameters
    ----------
    bottom
        Takes (n, *input_shape).
    input_shape
        Of one sample, for example (channels, height, width).

    Raises
    ------
    ConfigError
        An input that the bottom cannot take.
    """
    first = next(iter(bottom.parameters()), torch.empty(0))
    modes = {module: module.training for module in bottom.modules()}
    bottom.eval()  # batch norm must neither learn from zeros nor refuse a batch of one
    try:
        with torch.no_grad():
            shape = bottom(torch.zeros(1, *input_shape, device=first.device)).shape
    except RuntimeError:
        raise ConfigError(f"an input of shape {tuple(input_shape)} does not fit the model") from None
    finally:
        for module, training in modes.items():
            module.training = training
    return tuple(shape[1:])


def feature_bytes(bottom: nn.Module, input_shape: Sequence[int]) -> int:
    """Return c, the bytes of one sample's feature as float32; see :func:`feature_shape`."""
    return _FLOAT_BYTES * math.prod(feature_shape(bottom, input_shape))
