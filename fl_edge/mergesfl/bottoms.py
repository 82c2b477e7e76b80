"""The workers' half of MergeSFL: which samples, one forward pass, one update; and the mean of the bottoms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_edge.mergesfl.sgd import descend
from fl_edge.seeding import derive_seed, torch_rng


@dataclass(frozen=True)
class Turn:
    """One device's part in one round: the coordinates of all its random draws."""

    seed: int
    server_round: int
    device: str


def batch_indices(turn: Turn, step: int, batch_size: int, num_samples: int) -> Tensor:
    """Return the sample indices (batch_size,) int64 of one iteration.

    Samples are drawn without replacement; an epoch's last, incomplete batch is dropped and a new order begins (released
    code). The answer depends on the arguments alone, so a worker needs no memory of what it drew before.

    Parameters
    ----------
    step
        Iteration k within the round, from 0.
    batch_size, num_samples
        d_i and n_i, with 1 <= d_i <= n_i.
    """
    epoch, position = divmod(step, num_samples // batch_size)
    order = torch.randperm(
        num_samples, generator=torch_rng(turn.seed, "batches", turn.server_round, turn.device, epoch)
    )
    return order[position * batch_size : (position + 1) * batch_size]


def forward(bottom: nn.Module, inputs: Tensor, turn: Turn, step: int) -> Tensor:
    """Run the bottom model in training mode and return the features (d_i, *feature_shape), with their graph.

    Dropout masks depend on (seed, round, device, step), so a repeated pass gives the same bits.
    """
    bottom.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(turn.seed, "forward", turn.server_round, turn.device, step))
        features: Tensor = bottom(inputs)
    return features


def repeat_forward(bottom: nn.Module, inputs: Tensor, turn: Turn, step: int) -> Tensor:
    """Rebuild the graph of a forward pass that was made before, in another process.

    Buffers (the running statistics of BatchNorm) have seen the batch already and keep their values.
    """
    kept = [buffer.clone() for buffer in bottom.buffers()]
    features = forward(bottom, inputs, turn, step)
    for buffer, value in zip(bottom.buffers(), kept, strict=True):
        buffer.data = value  # not copy_(): the graph may still hold the buffer
    return features


def bottom_step(bottom: nn.Module, features: Tensor, gradient: Tensor, learning_rate: float) -> None:
    """Send the gradient (like features) back through the bottom model and update it in place (section 4.8)."""
    features.backward(gradient)  # type: ignore[no-untyped-call]
    descend(bottom, learning_rate)


def aggregate(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of the bottoms (eq. 17): sum_i d_i w_i / sum_i d_i.

    Floating buffers (running statistics) are averaged with the same weights; integer counters come from the first
    state. Sums are made in float64, in the order given: callers pass a fixed order of workers to get the same bits.
    """
    total = float(sum(weights))
    mean: dict[str, Tensor] = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            mean[name] = first.clone()
            continue
        pooled = torch.zeros(first.shape, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            pooled.add_(state[name].double(), alpha=weight / total)
        mean[name] = pooled.to(first.dtype)
    return mean
