"""What a device's round was worth: the reward that the bandit learns from, in [0, 1].

The ingredients (local-loss improvement, pruning progress, importance of the LoRA update, completion time relative to
the other devices) are FedSpine's (arXiv 2501.02438, second-hand). How they combine was not to be had: every formula
here is *ours*; ``form="product"`` follows the ancestor FedMP (ICDE 2022), loss decrease over time difference.

All functions work along the last axis, the devices of one round; axes before it are independent rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fl_edge.config import setting

Floats = NDArray[np.float64]


@dataclass
class RewardConfig:
    """How the ingredients of a reward combine. All defaults are ours."""

    form: str = setting(
        "ratio", "weighted sum over 1 + time difference, or product over time difference", choices=("ratio", "product")
    )
    loss_weight: float = setting(0.5, "share of the local-loss improvement", low=0.0)
    progress_weight: float = setting(0.3, "share of the pruning progress", low=0.0)
    importance_weight: float = setting(0.2, "share of the LoRA update's importance", low=0.0)
    softening: float = setting(
        0.1, "form=product: time differences well below this share of the mean time count alike", low=1e-3
    )

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        if self.loss_weight + self.importance_weight <= 0:
            return "loss_weight and importance_weight are both 0; a device that is done pruning would learn nothing"
        return None


def loss_drop(before: ArrayLike, after: ArrayLike) -> Floats:
    """Return dF = max(F_before - F_after, 0), nats; both losses are of the same probe batches."""
    return np.maximum(np.asarray(before, np.float64) - np.asarray(after, np.float64), 0.0)


def pruning_progress(before: ArrayLike, after: ArrayLike, target: float) -> Floats:
    """Return gP = (P_after - P_before) / (P* - P_before) in [0, 1], the share of what was left; 0 when done."""
    start = np.asarray(before, np.float64)
    left = target - start
    share = (np.asarray(after, np.float64) - start) / np.maximum(left, 1e-6)
    return np.where(left > 1e-6, np.clip(share, 0.0, 1.0), 0.0)


def min_max(values: ArrayLike) -> Floats:
    """Return z: values scaled to [0, 1] over the devices; 0.5 where all are equal, which tells nothing about any."""
    values = np.asarray(values, np.float64)
    low, high = values.min(axis=-1, keepdims=True), values.max(axis=-1, keepdims=True)
    # halves, since the difference of two large floats of opposite sign overflows
    span = high / 2 - low / 2
    return np.where(span > 0, (values / 2 - low / 2) / np.where(span > 0, span, 1.0), 0.5)


def time_difference(seconds: ArrayLike) -> Floats:
    """Return |t_i - tbar| / tbar with tbar the mean over the devices; 0 where no time passed."""
    seconds = np.asarray(seconds, np.float64)
    mean = seconds.mean(axis=-1, keepdims=True)
    return np.where(mean > 0, np.abs(seconds - mean) / np.where(mean > 0, mean, 1.0), 0.0)


def waiting_time(seconds: ArrayLike) -> Floats:
    """Return W = mean_i (max_j t_j - t_i): the seconds that a device waits for the slowest, on average."""
    seconds = np.asarray(seconds, np.float64)
    return np.asarray((seconds.max(axis=-1, keepdims=True) - seconds).mean(axis=-1))


def rewards(
    config: RewardConfig,
    loss_drop: ArrayLike,
    progress: ArrayLike,
    importance: ArrayLike,
    seconds: ArrayLike,
    pruning: ArrayLike = True,
) -> Floats:
    """Return R_i in [0, 1], (..., N); ours.

    ::

        ratio:    [w1 z(dF) + w2 gP + w3 z(U)] / (w1 + w2 + w3)  /  (1 + |t - tbar| / tbar)
        product:  z(dF) (1 + gP) / 2 z(U)  *  delta / (|t - tbar| / tbar + delta)

    Parameters
    ----------
    loss_drop
        dF, see :func:`loss_drop`, (..., N).
    progress
        gP in [0, 1], see :func:`pruning_progress`, (..., N).
    importance
        U, mean over the iterations of sum |theta dL/dtheta| over the LoRA parameters, (..., N).
    seconds
        t, completion times, (..., N), at least 0.
    pruning
        Whether a device could prune in this round, (..., N). Where not (target reached, warm-up), gP drops out and its
        weight goes to the other two.
    """
    drop, update = min_max(loss_drop), min_max(importance)
    could, progress = np.asarray(pruning, bool), np.asarray(progress, np.float64)
    difference = time_difference(seconds)
    if config.form == "product":
        worth = drop * update * np.where(could, (1 + progress) / 2, 1.0)
        return np.asarray(worth * config.softening / (difference + config.softening))
    weight = np.where(could, config.progress_weight, 0.0)
    worth = config.loss_weight * drop + weight * progress + config.importance_weight * update
    # a sum of weights times ones may end an ulp above the sum of the weights
    share = np.minimum(worth / (config.loss_weight + weight + config.importance_weight), 1.0)
    return np.asarray(share / (1 + difference))
