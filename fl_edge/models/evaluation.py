"""Accuracy and loss of a classifier on a test set."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 512) -> tuple[float, float]:
    """Return (accuracy in [0, 1], mean cross-entropy) of a model on images (n, ...) and labels (n,).

    The model is put into evaluation mode.
    """
    model.eval()
    correct, loss = 0, 0.0
    for inputs, targets in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
        scores = model(inputs)
        correct += int((scores.argmax(1) == targets).sum())
        loss += float(functional.cross_entropy(scores, targets, reduction="sum"))
    return correct / len(labels), loss / len(labels)
