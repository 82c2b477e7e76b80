"""Pretraining of the small language models on text that is on every machine.

*Ours* throughout: it stands in for models from a hub, so that an adapter has a base worth adapting without a network.
The result depends on the text, the settings and the number of threads, on no global random state.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fl_edge.errors import TrainingError
from fl_edge.models.muon import Muon

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("flwr.fl_edge")

Batch = dict[str, Tensor]

_DECAY = 0.01  # of weights
_WARM_UP = 0.1  # part of the steps
_LARGEST_GRADIENT = 1.0
_REPORT_S = 10.0


def pretrain(
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    steps: int,
    rate: float,
    what: str,
    faster: Mapping[Tensor, float],
    muon: float = 0.0,
) -> float:
    """Train all weights, the rate rising over a tenth of the steps and falling linearly after it.

    A line says every ten seconds how far it is and how long it will take.

    Parameters
    ----------
    model
        Trained in place and left in evaluation mode; dropout should be zero, it would draw from global random state.
    loss
        Mean loss of a batch.
    batches
        At least ``steps``.
    steps
        Of the optimiser.
    rate
        Highest learning rate of AdamW.
    what
        Name for the messages.
    faster
        Parameters whose rate is higher, and by what factor.
    muon
        Highest learning rate of Muon, which then trains the matrices of the layers in AdamW's place; it learns more of
        few steps.

    Returns
    -------
    float
        Mean loss of the last tenth of the steps.

    Raises
    ------
    TrainingError
        A loss that is not a number.
    """
    optimisers = _optimisers(model, rate, faster, muon)
    warm = max(int(_WARM_UP * steps), 1)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1))
        )
        for optimiser in optimisers
    ]
    model.train()
    losses: list[float] = []
    begun = reported = time.monotonic()
    for batch in islice(batches, steps):
        value = loss(batch)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        losses.append(float(value.detach()))
        if losses[-1] != losses[-1]:
            raise TrainingError(f"pretraining of {what} failed: the loss of step {len(losses)} is not a number")
        now = time.monotonic()
        if now - reported >= _REPORT_S or len(losses) == steps:
            reported, left = now, (now - begun) / len(losses) * (steps - len(losses))
            recent = losses[-50:]
            log.info(
                "pretraining %s: step %d of %d, loss %.3f, %.0f s left",
                *(what, len(losses), steps, sum(recent) / len(recent), left),
            )
    model.eval()
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / max(len(last), 1)


def _optimisers(
    model: nn.Module, rate: float, faster: Mapping[Tensor, float], muon: float
) -> list[torch.optim.Optimizer]:
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}  # often the head's too
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    matrices = linear - tables if muon else set()
    groups = [{"params": [p], "lr": rate * faster.get(p, 1.0)} for p in model.parameters() if p not in matrices]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, weight_decay=_DECAY)]
    if matrices:
        found.append(Muon([p for p in model.parameters() if p in matrices], lr=muon, weight_decay=_DECAY))
    return found


def initialise(model: PreTrainedModel, names: Iterable[str], generator: torch.Generator) -> None:
    """Draw some parameters anew: matrices normal with the model's own deviation, biases zero, scales one."""
    wanted = set(names)
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in wanted:
                continue
            if parameter.ndim > 1:
                # drawn on the CPU, where the generator is, whatever the model's device
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def weights_digest(model: nn.Module) -> str:
    """Return a hash of all weights and buffers, for server and devices to agree on; independent of their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
