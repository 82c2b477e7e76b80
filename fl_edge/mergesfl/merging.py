"""Feature merging and gradient dispatch: many workers' features, one batch for the top model.

Source: MergeSFL (arXiv 2311.13348), section on feature merging; the dispatch factor is that of the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_edge.mergesfl.sgd import descend


@dataclass(frozen=True)
class TopStep:
    """What one update of the top model gives back."""

    loss: float  # mean cross-entropy over the merged batch
    correct: int  # samples whose label the top model had right, before the update
    gradients: list[Tensor]  # for each worker, like its features: (d_i, *feature_shape)


def merge(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the workers' tensors (d_i, ...) into one of (sum d_i, ...), in the order given."""
    return torch.cat(list(parts))


def split(merged: Tensor, batch_sizes: Sequence[int]) -> list[Tensor]:
    """Undo :func:`merge`: cut (sum d_i, ...) into tensors (d_i, ...)."""
    return list(torch.split(merged, list(batch_sizes)))


def dispatch(gradient: Tensor, batch_sizes: Sequence[int]) -> list[Tensor]:
    """Cut the merged features' gradient into the workers' own.

    The merged loss is a mean over sum_j d_j samples. The factor sum_j d_j / d_i makes worker i's slice the gradient of
    the mean over its own d_i samples (released code), so that its step does not shrink with the size of the cohort.
    """
    total = sum(batch_sizes)
    return [part * (total / size) for part, size in zip(split(gradient, batch_sizes), batch_sizes, strict=True)]


def top_step(top: nn.Module, features: Sequence[Tensor], labels: Sequence[Tensor], learning_rate: float) -> TopStep:
    """Make one update of the top model on the merged batch, and return each worker's gradient.

    Gradients are those of the top model *before* the update (released code: backward, then step).

    Parameters
    ----------
    top
        Updated in place by plain SGD.
    features, labels
        For each worker, in a fixed order: (d_i, *feature_shape) float32 and (d_i,) int64.
    learning_rate
        eta of the round.
    """
    sizes = [len(part) for part in labels]
    merged = merge(features).requires_grad_()
    targets = merge(labels)
    top.train()
    top.zero_grad(set_to_none=True)
    scores = top(merged)  # (sum d_i, classes)
    loss = functional.cross_entropy(scores, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    descend(top, learning_rate)
    assert merged.grad is not None
    correct = int((scores.detach().argmax(1) == targets).sum())
    return TopStep(float(loss.detach()), correct, dispatch(merged.grad, sizes))
