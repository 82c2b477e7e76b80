"""Plain stochastic gradient descent, without momentum or weight decay, as the released code trains both halves."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def descend(module: nn.Module, learning_rate: float) -> None:
    """Subtract learning_rate times its gradient from every parameter that has one, and forget the gradients.

    Not torch.optim.SGD: the first step of any torch optimiser imports the compiler, seconds in a client process that
    may live for one message only.
    """
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.sub_(parameter.grad, alpha=learning_rate)
            parameter.grad = None
