"""Losses for long-tailed classification, one signature for all (specification, sections 4 and 13).

Sources: LDAM-DRW's released code (margins, scale, deferred re-weighting, normalised head); Cui et al. (CVPR 2019) for
class-balanced weights; Ren et al. (NeurIPS 2020) for balanced softmax; Lin et al. (ICCV 2017) for the focal loss.
*Ours*: classes without training images, which no source treats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_edge.errors import ConfigError
from fl_edge.imbnas.config import LOSSES, LossConfig
from fl_edge.imbnas.weighting import beta_at, effective_weights

Loss = Callable[[Tensor, Tensor, float], Tensor]
"""Takes logits (b, C), labels int64 (b,) and the share of the training that is done, in [0, 1); returns a scalar."""


class NormedLinear(nn.Module):
    """LDAM's head: cosines between features and class vectors.

    Attributes
    ----------
    weight
        (C, d); only the directions of its rows count.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))

    def forward(self, features: Tensor) -> Tensor:
        """Return cosines (b, C) of features (b, d)."""
        return functional.linear(functional.normalize(features), functional.normalize(self.weight))


def make_head(name: str, features: int, classes: int, generator: torch.Generator) -> nn.Linear | NormedLinear:
    """Return a fresh head that fits a loss, weights from the generator alone.

    Parameters
    ----------
    name
        The loss: LDAM takes cosines (uniform directions as in its released code), every other one a linear layer
        (torch's default bounds).
    features, classes
        d and C.
    generator
        On the CPU.
    """
    with torch.device("meta"):  # nothing is drawn from torch's global state
        head = NormedLinear(features, classes) if name.startswith("ldam") else nn.Linear(features, classes)
    head.to_empty(device="cpu")
    bound = 1.0 if isinstance(head, NormedLinear) else 1 / math.sqrt(features)
    for parameter in head.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return head


def make_loss(name: str, counts: Tensor, config: LossConfig) -> Loss:
    """Return a loss.

    Parameters
    ----------
    name
        ``ce``: plain cross-entropy. ``drw``: plain, then weighted by effective numbers from ``drw_start`` on. ``cb``:
        weighted from the start. ``ldam``: margins that grow as a class shrinks; wants the cosines of
        :class:`NormedLinear`. ``ldam_drw``: both. ``balanced_softmax``: log n_c added to the logits, while training
        only. ``focal``: (1 - p)^gamma before the logarithm.
    counts
        n_c of the training set, over all devices, (C,). Put them on the device that the logits will be on.
    config
        Constants.

    Raises
    ------
    ConfigError
        An unknown name.
    DataError
        No class has samples.
    """
    if name not in LOSSES:
        raise ConfigError(f"loss={name} is not allowed; it must be one of {', '.join(LOSSES)}")
    weights = effective_weights(counts, config.beta).float()
    if name == "ce":
        return lambda logits, labels, _progress: functional.cross_entropy(logits, labels)
    if name == "cb":
        return lambda logits, labels, _progress: _weighted(logits, labels, weights)
    if name == "focal":
        return lambda logits, labels, _progress: _focal(logits, labels, config.gamma)
    if name == "balanced_softmax":
        # log 0 would leave an absent class without a gradient, and its logit where chance put it
        prior = counts.clamp_min(1).double().log().float()
        return lambda logits, labels, _progress: functional.cross_entropy(logits + prior.to(logits), labels)
    margins = ldam_margins(counts, config.margin) if name.startswith("ldam") else None

    def deferred(logits: Tensor, labels: Tensor, progress: float) -> Tensor:
        if margins is not None:
            logits = config.scale * (logits - functional.one_hot(labels, logits.shape[1]) * margins.to(logits))
        if name == "ldam" or not beta_at(progress, config):
            return functional.cross_entropy(logits, labels)
        return _weighted(logits, labels, weights)

    return deferred


def ldam_margins(counts: Tensor, largest: float) -> Tensor:
    """Return LDAM's margins Delta_c ~ n_c^(-1/4), float32 (C,), the largest of them as given.

    A class without samples is no label; its margin is 0.
    """
    n = counts.double()
    margins = torch.where(n > 0, n.clamp_min(1) ** -0.25, 0.0)
    return (margins * (largest / margins.max())).float()


def _weighted(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return sum w_y CE / sum w_y over the batch; 0 where no sample has weight, which torch's own mean makes NaN."""
    losses = functional.cross_entropy(logits, labels, reduction="none")
    of_samples = weights.to(logits)[labels]
    return (losses * of_samples).sum() / of_samples.sum().clamp_min(torch.finfo(logits.dtype).tiny)


def _focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    losses = functional.cross_entropy(logits, labels, reduction="none")
    # a probability of 1 has no derivative of (1 - p)^gamma for gamma below 1
    wrong = (-torch.expm1(-losses)).clamp_min(torch.finfo(logits.dtype).tiny)
    return (wrong**gamma * losses).mean()
