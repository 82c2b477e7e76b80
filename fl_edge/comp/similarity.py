"""How much a decoder layer matters: how far it turns the hidden states.

That layers are judged by the cosine similarity of what enters and what leaves them, and that the most similar go first,
is COMP's; the mean form is ShortGPT's block influence (Men et al. 2024). That the first positions are left out is
*ours*: the attention sink there has a huge norm. So is looking at the two halves of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fl_edge.pruning import Unit

_SINK = 1  # positions at the start of a sequence that are left out


@dataclass(frozen=True)
class Similarity:
    """Sums over tokens that say how similar a layer's input and output are; those of two texts add up.

    Attributes
    ----------
    tokens
        Number of tokens.
    cosines
        Sum of the tokens' cosine similarities.
    products
        Sum of the inner products of input and output.
    before, after
        ||X||_F^2 of input and of output.
    heads, channels
        Sum of the tokens' cosine similarities of what enters and what leaves the attention, and the feed-forward
        network, each with its residual.
    """

    tokens: int
    cosines: float
    products: float
    before: float
    after: float
    heads: float
    channels: float

    @classmethod
    def of(cls, before: Tensor, middle: Tensor, after: Tensor) -> Similarity:
        """Return the sums of some sequences; hidden states (s, n, d) before attention, after it, after the layer."""
        x, z, y = (each[:, _SINK:].float() for each in (before, middle, after))
        return cls(
            x.shape[0] * x.shape[1],
            _sum(functional.cosine_similarity(x, y, dim=-1)),
            _sum(x * y),
            _sum(x.square()),
            _sum(y.square()),
            _sum(functional.cosine_similarity(x, z, dim=-1)),
            _sum(functional.cosine_similarity(z, y, dim=-1)),
        )

    def __add__(self, other: Similarity) -> Similarity:
        """Return the sums of both texts."""
        return Similarity(
            self.tokens + other.tokens,
            self.cosines + other.cosines,
            self.products + other.products,
            self.before + other.before,
            self.after + other.after,
            self.heads + other.heads,
            self.channels + other.channels,
        )

    def importance(self, reading: str) -> float:
        """Return I_l, 0 where the layer changes no direction.

        ``mean``: 1 - mean_t cos(x_t, y_t). ``ratio``: 1 - |sum_t <x_t, y_t>| / (||X||_F ||Y||_F), the other way to read
        the notes on COMP's formula.
        """
        if reading == "mean":
            return 1 - self.cosines / max(self.tokens, 1)
        norm: float = (self.before * self.after) ** 0.5
        return 1 - abs(self.products) / norm if norm else 0.0

    def turn(self, unit: Unit) -> float:
        """Return 1 - mean_t cos of the attention (``heads``) or the feed-forward network (``channels``) alone."""
        return 1 - (self.heads if unit == "heads" else self.channels) / max(self.tokens, 1)

    @property
    def growth(self) -> float:
        """By what factor the layer lengthens the hidden states, root mean square."""
        return float((self.after / self.before) ** 0.5) if self.before and self.after else 1.0


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
