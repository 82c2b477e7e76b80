"""Training of the adapter: the whole model teaches, through what its own parts give for a text.

Source: the paper's loss has two terms, smooth L1 on hidden states and cross-entropy on output distributions, with
weight 0.1. That the target is the last hidden state after the final norm, the means, AdamW, clipping by value and the
schedule are those of EAGLE's trainer, which the paper's summary does not tell. Batches drawn by step are *ours*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from fl_edge.errors import TrainingError
from fl_edge.hat.adapter import Adapter
from fl_edge.hat.split import DeviceModel, MiddleModel
from fl_edge.seeding import torch_rng


@dataclass(frozen=True, eq=False)
class Lessons:
    """What an adapter learns from: s sequences of n tokens.

    Attributes
    ----------
    states
        (s, n, d): hidden states after the last shallow layer.
    rows
        (s, n, d): the full model's last hidden states, before the final norm.
    mask
        (s, n) bool: tokens that count.
    """

    states: Tensor
    rows: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def at(self, places: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return states, rows and mask of some sequences, (b,) int64, on a device."""
        return tuple(part[places].to(device) for part in (self.states, self.rows, self.mask))  # type: ignore[return-value]


def teach(
    device: DeviceModel, middle: MiddleModel, tokens: Tensor, mask: Tensor | None = None, batch_size: int = 16
) -> Lessons:
    """Run the split model over texts once and keep what an adapter learns from, on the CPU.

    Parameters
    ----------
    device, middle
        The two parts, which may be on different devices.
    tokens
        (s, n) int64; sequences that are shorter are filled up at the end.
    mask
        (s, n) bool: tokens that count, such as those of replies, and none that fill up. None: all.
    batch_size
        Sequences at once.
    """
    states, rows = [], []
    for batch in torch.split(tokens, batch_size):
        shallow = device.embed_and_run(batch.to(device.device))
        states.append(shallow.cpu())
        rows.append(middle(shallow.to(middle.device)).cpu())
    there = torch.ones(tokens.shape, dtype=torch.bool) if mask is None else mask
    return Lessons(torch.cat(states), torch.cat(rows), there)


def distillation_loss(
    adapter: Adapter, device: DeviceModel, states: Tensor, rows: Tensor, mask: Tensor, token_weight: float = 0.1
) -> Tensor:
    """Return the loss of an adapter, which alone gets gradients.

    ``SmoothL1(f, f*) + w CE(softmax(W f*), softmax(W f))`` with features f of the adapter and f* of the full model,
    both after their norm, and the frozen head W; the mean over features, and over the tokens that count.

    Parameters
    ----------
    adapter
        In float32 or float64.
    device
        The model whose final norm and head are used.
    states, rows
        (b, n, d), see :class:`Lessons`.
    mask
        (b, n) bool: tokens that count; without any the loss is 0.
    token_weight
        w.

    Returns
    -------
    Tensor
        () in the adapter's type.
    """
    found, wanted, logits, answers = _both(adapter, device, states, rows, mask)
    return _loss(found, wanted, logits, answers, token_weight).sum() / max(len(found), 1)


@dataclass(frozen=True)
class Course:
    """How an adapter is trained; see :func:`train`.

    Attributes
    ----------
    steps
        Of the optimiser.
    batch_size
        Sequences a step.
    rate
        Highest learning rate of AdamW, after a linear rise and before a linear fall to 0. The default is for models as
        small as those of :mod:`fl_edge.models.small`; EAGLE has 3e-5 and Kangaroo 5e-5 at 7 billion weights.
    warm_up
        Share of the steps that the rise takes.
    clip
        Largest absolute value of any number in a gradient.
    token_weight
        Of the cross-entropy in the loss.
    """

    steps: int = 400
    batch_size: int = 4
    rate: float = 1e-2
    warm_up: float = 0.1
    clip: float = 0.5
    token_weight: float = 0.1


def train(
    adapter: Adapter,
    device: DeviceModel,
    lessons: Lessons,
    course: Course,
    seed: int,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
) -> None:
    """Train an adapter in place.

    Parameters
    ----------
    adapter
        In float32, where the device model is.
    device
        The model that it is for.
    lessons
        What it learns from.
    course
        How.
    seed
        Which sequences a step takes depends on it and the number of the step alone.
    on_step
        Called after each step with its number, from 1, and its loss.

    Raises
    ------
    TrainingError
        A loss that is not a number.
    """

    def loss(places: Tensor) -> Tensor:
        return distillation_loss(adapter, device, *lessons.at(places, device.device), course.token_weight)

    fit(adapter, loss, len(lessons), course, seed, on_step)


def fit(
    module: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    sequences: int,
    course: Course,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train a module in place; as :func:`train`, on the loss of sequences with some numbers, (b,) int64."""
    optimiser = torch.optim.AdamW(module.parameters(), lr=course.rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(int(course.warm_up * course.steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, (course.steps - step) / max(course.steps - warm, 1))
    )
    module.train()
    for step in range(1, course.steps + 1):
        places = torch.randperm(sequences, generator=torch_rng(seed, "distillation", step))[: course.batch_size]
        loss = loss_of(places)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_value_(module.parameters(), course.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"training of what drafts failed: the loss of step {step} is not a number")
        on_step(step, value)
    module.eval()


@dataclass(frozen=True)
class Likeness:
    """How near an adapter's next tokens are to the full model's, over the tokens of a text.

    Attributes
    ----------
    agreement
        Share of tokens after which both find the same one most likely.
    overlap
        Mean of sum_v min(p, q), which is the chance that a sampled draft is accepted.
    loss
        As in training.
    """

    agreement: float
    overlap: float
    loss: float


@torch.no_grad()
def compare(
    adapter: Adapter, device: DeviceModel, lessons: Lessons, batch_size: int = 8, token_weight: float = 0.1
) -> Likeness:
    """Compare an adapter with the full model on a text, which should not be one that it learned from."""
    seen = sums = torch.zeros(())
    for places in torch.split(torch.arange(len(lessons)), batch_size):
        found, wanted, logits, answers = _both(adapter, device, *lessons.at(places, device.device))
        agreed = (logits.argmax(-1) == answers.argmax(-1)).sum()
        shared = torch.minimum(logits.softmax(-1), answers.softmax(-1)).sum()
        loss = _loss(found, wanted, logits, answers, token_weight).sum()
        sums = sums + torch.stack((agreed, shared, loss)).cpu()
        seen = seen + len(found)
    return Likeness(*(sums / seen.clamp_min(1)).tolist())


def _both(
    adapter: Adapter, device: DeviceModel, states: Tensor, rows: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features and logits of adapter and full model, (t, ...) for t tokens that count: f, f*, W f, W f*."""
    kind = next(adapter.parameters()).dtype
    found = adapter(states.to(kind))[mask]
    wanted = device.norm(rows[mask])
    logits = device.lm_head(found.to(device.dtype))
    return found, wanted.to(kind), logits.to(kind), device.lm_head(wanted).to(kind)


def _loss(found: Tensor, wanted: Tensor, logits: Tensor, answers: Tensor, token_weight: float) -> Tensor:
    """Return the loss of each token, (t,)."""
    feature = smooth_l1_loss(found, wanted, reduction="none").mean(-1)
    return feature - token_weight * (answers.softmax(-1) * logits.log_softmax(-1)).sum(-1)
