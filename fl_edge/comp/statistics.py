"""What COMP needs to know of a dense layer: sums over tokens, so that those of several texts or devices add up.

The layer is Y = X W^T, X (T, n) what enters it, W (o, n) its weight as torch keeps it, Y* (T, o) a wanted output. A
neuron is an input channel: a column of X with a column of W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 2048  # that are multiplied at once, which bounds the memory it takes
_EXACT = 4096  # inputs up to which sums are kept in float64; beyond it their memory would be that of several layers


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over the tokens of a text, for one dense layer.

    Attributes
    ----------
    tokens
        T, number of tokens.
    gram
        (n, n) X^T X.
    cross
        (n, o) X^T Y*.
    inputs, targets
        (n,) and (o,): column sums of X and of Y*.
    energy
        ||Y*||_F^2.
    """

    tokens: int
    gram: Tensor
    cross: Tensor
    inputs: Tensor
    targets: Tensor
    energy: float

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> Statistics:
        """Return the sums of some tokens.

        Parameters
        ----------
        inputs
            (T, n) X.
        targets
            (T, o) Y*.
        """
        exact = torch.float64 if inputs.shape[1] <= _EXACT else torch.float32
        x, y = inputs.to(exact), targets.to(exact)
        return cls(len(x), x.T @ x, x.T @ y, x.sum(0), y.sum(0), float(y.square().sum()))

    def extended(self, inputs: Tensor, targets: Tensor) -> Statistics:
        """Return the sums with further tokens, as for :meth:`of`; they are added to these matrices in place."""
        x, y = inputs.to(self.gram), targets.to(self.gram)
        return Statistics(
            self.tokens + len(x),
            self.gram.addmm_(x.T, x),
            self.cross.addmm_(x.T, y),
            self.inputs + x.sum(0),
            self.targets + y.sum(0),
            self.energy + float(y.square().sum()),
        )

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of both texts together."""
        return Statistics(
            self.tokens + other.tokens,
            self.gram + other.gram,
            self.cross + other.cross,
            self.inputs + other.inputs,
            self.targets + other.targets,
            self.energy + other.energy,
        )

    def centred(self) -> Statistics:
        """Return the statistics of X and Y* with their means taken off: those of a layer that has a free bias."""
        mean_x, mean_y = self.inputs / self.tokens, self.targets / self.tokens
        return Statistics(
            self.tokens,
            self.gram - torch.outer(mean_x, self.inputs),
            self.cross - torch.outer(mean_x, self.targets),
            torch.zeros_like(self.inputs),
            torch.zeros_like(self.targets),
            self.energy - float(mean_y @ self.targets),
        )

    def without_bias(self, bias: Tensor) -> Statistics:
        """Return the statistics for the wanted output less a bias (o,)."""
        b = bias.to(self.targets)
        return Statistics(
            self.tokens,
            self.gram,
            self.cross - torch.outer(self.inputs, b),
            self.inputs,
            self.targets - self.tokens * b,
            self.energy - float(b @ (2 * self.targets - self.tokens * b)),
        )


def relative_error(statistics: Statistics, weight: Tensor, bias: Tensor | None = None) -> float:
    """Return ||Y* - X W^T - 1 b^T||_F^2 / ||Y*||_F^2, from the sums alone.

    Parameters
    ----------
    statistics
        Of the text to measure on: that of the calibration, or one that was held out.
    weight, bias
        (o, n), zero in removed columns; (o,).
    """
    w = weight.to(statistics.gram)
    error = statistics.energy
    for start in range(0, len(statistics.gram), _ROWS):
        part = slice(start, start + _ROWS)
        product = statistics.gram[part] @ w.T
        error += float(product.sub_(statistics.cross[part], alpha=2).mul_(w.T[part]).sum())
    if bias is not None:
        b = bias.to(w)
        error += float(b @ (statistics.tokens * b - 2 * statistics.targets + 2 * (w @ statistics.inputs)))
    return max(error, 0.0) / statistics.energy  # rounding may take it below
