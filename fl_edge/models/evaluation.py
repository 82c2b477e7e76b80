"""Accuracy and loss of a classifier on a test set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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


@torch.no_grad()
def evaluate_texts(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> tuple[float, float]:
    """Return (accuracy in [0, 1], mean cross-entropy) of a transformer of Hugging Face.

    Of a classifier a text counts as one, of a causal language model a token that has a label.

    Parameters
    ----------
    batches
        `input_ids`, `attention_mask` (b, n); `labels` (b,) or (b, n) with -100 where there is none.
    """
    model.eval()
    device = next(model.parameters()).device
    correct, count, loss = 0, 0, 0.0
    for batch in batches:
        labels = batch["labels"].to(device)
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        scores = model(**inputs).logits
        if labels.ndim == 2:  # the scores at a token are for the next one
            scores, labels = scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        known = labels >= 0
        scores, labels = scores[known], labels[known]
        correct += int((scores.argmax(-1) == labels).sum())
        count += len(labels)
        loss += float(functional.cross_entropy(scores.float(), labels, reduction="sum"))
    return correct / max(count, 1), loss / max(count, 1)
