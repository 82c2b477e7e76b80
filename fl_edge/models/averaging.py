"""Federated averaging of named weights (FedAvg, McMahan et al. 2017), and what is refused before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fl_edge.errors import ReplyError


def check_weights(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """See that weights have the names, shapes and type of others, and are finite.

    Raises
    ------
    ReplyError
        They have not.
    """
    if weights.keys() != like.keys():
        raise ReplyError(f"weights of {len(weights)} tensors; the {len(like)} of {', '.join(like)[:80]} were due")
    for name, tensor in weights.items():
        if tensor.shape != like[name].shape or tensor.dtype != like[name].dtype:
            raise ReplyError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; due is {like[name].dtype} of "
                f"{tuple(like[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ReplyError(f"{name} is not all finite numbers")


def weighted_mean(parts: Sequence[tuple[int, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Return the mean of weights by numbers of samples, in their type; summed in float64, in this order.

    Parameters
    ----------
    parts
        Samples and weights of each device; at least one, of the same names, shapes and types.
    """
    total = sum(samples for samples, _ in parts)
    return {
        name: torch.stack([weights[name].double() * (samples / total) for samples, weights in parts]).sum(0).to(like)
        for name, like in parts[0][1].items()
    }
