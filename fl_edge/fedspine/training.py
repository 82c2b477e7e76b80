"""One device's round: LoRA on the pruned model, and the importance of its units from the same gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_edge.errors import ReplyError
from fl_edge.fedspine.factors import Factors
from fl_edge.fedspine.importance import Smoothing, unit_scores
from fl_edge.fedspine.lora import attach, detach, factors_of, head_of, load_head
from fl_edge.pruning import Member

Batch = Mapping[str, Tensor]  # input_ids, attention_mask, labels: what the model's forward takes


@dataclass(frozen=True)
class TrainingSettings:
    """How a device trains in a round."""

    learning_rate: float
    scale: float  # s = alpha / r
    dropout: float
    weight_decay: float
    clip_norm: float  # gradients are cut to this length; 0: not
    smoothing: float  # lambda of the importance
    normalise: bool  # see fl_edge.fedspine.importance.unit_scores


@dataclass(frozen=True)
class LocalRound:
    """What comes of it.

    Attributes
    ----------
    adapter, head
        Trained factors by path, and parameters of the task head by name.
    importance
        Smoothed scores of the units that the model has, over this round, and the iterations in them.
    loss_before, loss_after
        On the probe batches.
    update_importance
        sum |theta dL/dtheta| over the LoRA parameters, mean over the iterations (ours).
    """

    adapter: dict[str, Factors]
    head: dict[str, Tensor]
    importance: Smoothing
    loss_before: float
    loss_after: float
    update_importance: float


def train_round(
    model: nn.Module,
    members: Sequence[Member],
    adapter: Mapping[str, Factors],
    head: Mapping[str, Tensor],
    batches: Iterable[Batch],
    probe: Sequence[Batch],
    settings: TrainingSettings,
    seed: int,
) -> LocalRound:
    """Train factors and head, one iteration a batch (AdamW), on a model whose base stays as it is.

    Parameters
    ----------
    model
        Pruned base with a head; comes back without LoRA, its base untouched.
    members
        Its linear maps (`fl_edge.pruning.members`).
    adapter, head
        Where training starts: shapes of the pruned model.
    batches
        tau of them.
    probe
        Batches that the loss is measured on, before and after.
    seed
        Of dropout; the global generators are left as they were.

    Raises
    ------
    ReplyError
        A loss that is not finite, or factors and head that do not fit the model.
    """
    layers = 1 + max(member.layer for member in members)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        maps = attach(model, members, adapter, scale=settings.scale, dropout=settings.dropout)
        try:
            factors = [factor for each in maps for factor in (each.a, each.b)]
            trained = factors + load_head(model, head, trainable=True)
            loss_before = mean_loss(model, probe)
            optimiser = torch.optim.AdamW(
                trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
            )
            smoothing, moved = Smoothing(settings.smoothing), []
            model.train()
            for batch in batches:
                optimiser.zero_grad(set_to_none=True)
                loss = _loss(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                smoothing.add(unit_scores(maps, layers, settings.normalise))
                moved.append(_update_importance(factors))
                if settings.clip_norm:
                    nn.utils.clip_grad_norm_(trained, settings.clip_norm)
                optimiser.step()
            done = LocalRound(
                factors_of(maps), head_of(model), smoothing, loss_before, mean_loss(model, probe),
                float(torch.stack(moved).mean()) if moved else 0.0,
            )  # fmt: skip
        finally:
            detach(model, members)
            model.requires_grad_(False)
    for name, value in (("before", done.loss_before), ("after", done.loss_after)):
        if not math.isfinite(value):
            raise ReplyError(
                f"the loss {name} training is {value}; a smaller learning_rate than {settings.learning_rate:g} is due"
            )
    return done


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean loss over batches, in evaluation mode."""
    model.eval()
    return float(torch.stack([_loss(model, batch) for batch in batches]).mean())


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    loss: Tensor = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    return loss


@torch.no_grad()
def _update_importance(factors: Sequence[nn.Parameter]) -> Tensor:
    """Return sum |theta dL/dtheta|, as a tensor that need not leave its device."""
    terms = [torch.dot(f.flatten().abs(), f.grad.flatten().abs()) for f in factors if f.grad is not None]
    return torch.stack(terms).sum()
