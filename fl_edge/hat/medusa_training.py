"""Training of Medusa's heads, by the lessons that the adapter has, and what they are then right about.

Source: Medusa-1 (arXiv 2401.10774): frozen model, cross-entropy of each head, weighted with 0.8 to the head's number.
*Ours*: the target is the full model's own distribution, as for the adapter; batches, optimiser and schedule are those
of :mod:`fl_edge.hat.distillation`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fl_edge.hat.distillation import Course, Lessons, fit
from fl_edge.hat.medusa import MedusaHeads
from fl_edge.hat.split import DeviceModel

_DECAY = 0.8  # weight of a head's loss, to the power of its number (Medusa)


def medusa_loss(heads: MedusaHeads, device: DeviceModel, rows: Tensor, mask: Tensor) -> Tensor:
    """Return the loss of heads, which alone get gradients.

    ``sum_k 0.8^k CE(softmax(W f*_{t+k}), softmax(head_k(f*_t)))``, each term the mean over tokens t that count with
    t + k.

    Parameters
    ----------
    heads
        In float32 or float64.
    device
        The model whose final norm and head W are used.
    rows, mask
        (b, n, d) and (b, n) bool, see :class:`~fl_edge.hat.distillation.Lessons`.

    Returns
    -------
    Tensor
        () in the heads' type.
    """
    kind = next(heads.parameters()).dtype
    features = device.norm(rows).detach()
    loss = torch.zeros((), dtype=kind, device=features.device)
    for head in range(len(heads)):
        further = head + 1
        seen = mask[:, further:] & mask[:, :-further]
        wanted = device.draft_head(features[:, further:][seen]).to(kind).softmax(-1)
        found = heads.logits(head, features[:, :-further][seen].to(kind)).log_softmax(-1)
        loss = loss - _DECAY**further * (wanted * found).sum() / max(len(found), 1)
    return loss


def train_heads(
    heads: MedusaHeads,
    device: DeviceModel,
    lessons: Lessons,
    course: Course,
    seed: int,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
) -> None:
    """Train heads in place, then measure on the same lessons what they are right about.

    Parameters as those of :func:`fl_edge.hat.distillation.train`; the course's token weight means nothing here.

    Raises
    ------
    TrainingError
        A loss that is not a number.
    """

    def loss(places: Tensor) -> Tensor:
        _, rows, mask = lessons.at(places, device.device)
        return medusa_loss(heads, device, rows, mask)

    fit(heads, loss, len(lessons), course, seed, on_step)
    heads.accuracies.copy_(measure(heads, device, lessons))


@torch.no_grad()
def measure(heads: MedusaHeads, device: DeviceModel, lessons: Lessons, batch_size: int = 8) -> Tensor:
    """Return the share of tokens that each head has at each rank: (heads, ranks), of those that the full model chooses.

    By these shares a tree is made (:func:`fl_edge.hat.trees.best_tree`); lessons that the heads have not learned from
    tell more.
    """
    kind, ranks = next(heads.parameters()).dtype, heads.accuracies.shape[1]
    hits, seen = torch.zeros(len(heads), ranks), torch.zeros(len(heads), 1)
    for places in torch.split(torch.arange(len(lessons)), batch_size):
        _, rows, mask = lessons.at(places, device.device)
        features = device.norm(rows)
        chosen = device.draft_head(features).argmax(-1)
        for head in range(len(heads)):
            further = head + 1
            there = mask[:, further:] & mask[:, :-further]
            found = heads.logits(head, features[:, :-further][there].to(kind)).topk(ranks).indices
            hits[head] += (found == chosen[:, further:][there][:, None]).sum(0).cpu()
            seen[head] += len(found)
    return hits / seen.clamp_min(1)
