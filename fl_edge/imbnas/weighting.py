"""Class weights from the effective number of samples, and when they begin to count (specification, section 4).

Source: Cui et al. (CVPR 2019) for the effective number; LDAM-DRW's released code for the scale and the schedule.
*Ours*: classes without samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fl_edge.errors import DataError
from fl_edge.imbnas.config import LossConfig


def effective_weights(counts: Tensor, beta: float) -> Tensor:
    """Return w_c ~ 1 / E_c with E_c = (1 - beta^n_c) / (1 - beta), scaled to sum to C.

    ``beta=0`` gives 1 for every class, ``beta=1`` the limit, inverse frequency. A class without samples has no
    effective number; it gets 0, and the others share the sum.

    Parameters
    ----------
    counts
        n_c, training images of every class over all devices, (C,).
    beta
        In [0, 1].

    Returns
    -------
    Tensor
        float64 (C,), on the counts' device.

    Raises
    ------
    DataError
        No class has samples.
    """
    n = counts.double()
    present = n > 0
    if not present.any():
        raise DataError(f"none of {len(counts)} classes has samples; at least one must have")
    if beta == 1:
        effective = n
    elif beta == 0:
        effective = torch.ones_like(n)
    else:
        effective = torch.expm1(n * math.log(beta)) / (beta - 1)  # 1 - beta^n loses digits for beta near 1
    weights = torch.where(present, 1 / torch.where(present, effective, 1.0), 0.0)
    return weights * (len(counts) / weights.sum())


def beta_at(progress: float, config: LossConfig) -> float:
    """Return beta at a share of the training in [0, 1): 0 before ``drw_start``, the configured one from then on.

    Epoch e of E, counted from 0, begins at e / E: 0.8 of 200 epochs makes epoch 160 the first with weights, as in the
    released code. In a federated run progress is that of the global rounds.
    """
    return config.beta if progress >= config.drw_start else 0.0
