"""Word vectors from counts, the start of a small model's pretraining.

Source: factorising the matrix of positive pointwise mutual information (Levy and Goldberg, NeurIPS 2014), neighbours
weighted by the inverse of their distance (Pennington et al., EMNLP 2014), the randomised subspace iteration of Halko
et al. (2011). *Ours*: to begin there; a few hundred steps teach a transformer from random vectors next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_WINDOW = 8  # neighbours on each side
_MORE = 16  # dimensions beyond those wanted, for the precision of the last ones
_ITERATIONS = 3


def word_vectors(rows: Iterable[Sequence[int]], vocabulary: int, width: int, generator: torch.Generator) -> Tensor:
    """Return vectors float32 (vocabulary, width) with a mean square of one; tokens in like company get like vectors.

    Parameters
    ----------
    rows
        Token ids of the texts.
    vocabulary
        Number of tokens, at least ``width``.
    width
        Of the vectors.
    generator
        On the CPU, for the subspace that the iteration begins with.
    """
    information = _information(_neighbours(rows, vocabulary))
    size = min(width + _MORE, vocabulary)
    basis = torch.randn(vocabulary, size, generator=generator)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(information @ (information @ basis)).Q
    left, values, _ = torch.linalg.svd(basis.T @ information, full_matrices=False)
    vectors = (basis @ left[:, :width]) * values[:width].sqrt()
    scaled: Tensor = vectors / vectors.square().mean().sqrt().clamp_min(1e-12)
    return scaled


def _neighbours(rows: Iterable[Sequence[int]], vocabulary: int) -> Tensor:
    """Count how often tokens stand near each other, (vocabulary, vocabulary), symmetric."""
    lined: list[int] = []
    for row in rows:
        lined += [*row, *[-1] * _WINDOW]  # so that no window reaches into the next text
    tokens = torch.tensor(lined)
    counts = torch.zeros(vocabulary * vocabulary)
    for distance in range(1, _WINDOW + 1):
        one, other = tokens[:-distance], tokens[distance:]
        both = (one >= 0) & (other >= 0)
        found = torch.bincount(one[both] * vocabulary + other[both], minlength=vocabulary * vocabulary)
        counts += found / distance
    square = counts.view(vocabulary, vocabulary)
    return square + square.T


def _information(counts: Tensor) -> Tensor:
    """Return positive pointwise mutual information; 0 where two tokens never met."""
    marginal = counts.sum(1)
    expected = marginal[:, None] * marginal / marginal.sum().clamp_min(1e-12)
    information: Tensor = (counts / expected.clamp_min(1e-12)).clamp_min(1.0).log()
    return information
