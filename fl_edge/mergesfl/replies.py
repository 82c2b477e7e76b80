"""What a worker's answer must be before it may touch the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fl_edge.errors import ReplyError


def checked_batch(
    tensors: Mapping[str, Tensor], batch_size: int, feature_shape: Sequence[int], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return (features (d_i, *feature_shape) float32, labels (d_i,) int64) of an answer.

    Raises
    ------
    ReplyError
        A missing tensor, another shape than asked for, a feature that is not finite, a label outside the classes.
    """
    due = (batch_size, *feature_shape)
    features, labels = _named(tensors, "features", due, torch.float32), _named(tensors, "labels", due[:1], torch.int16)
    if not torch.isfinite(features).all():
        raise ReplyError("features that are not all finite numbers")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ReplyError(f"a label outside 0 to {num_classes - 1}")
    return features, labels.long()


def checked_weights(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a worker's bottom weights, with the names, shapes and types of the server's own.

    Raises
    ------
    ReplyError
        A missing tensor, another shape or type, or a weight that is not finite.
    """
    weights = {name: _named(tensors, name, own.shape, own.dtype) for name, own in expected.items()}
    for name, weight in weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ReplyError(f"weights {name} that are not all finite numbers")
    return weights


def _named(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if name not in tensors:
        raise ReplyError(f"no tensor {name} among {sorted(tensors)}")
    found = tensors[name]
    if tuple(found.shape) != tuple(shape) or found.dtype != dtype:
        raise ReplyError(f"{name} of shape {tuple(found.shape)} {found.dtype}; {tuple(shape)} {dtype} was due")
    return found
