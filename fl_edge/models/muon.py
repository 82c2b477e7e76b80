"""Muon (Jordan et al., 2024) in float32: steps that are as long in every direction of a matrix.

torch's own Muon multiplies in bfloat16. CPUs without units for it do that in software, some twenty times slower than in
float32: most of the training of a small model was spent there. Everything else is as in ``torch.optim.Muon``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_MOMENTUM, _STEPS, _TINY = 0.95, 5, 1e-7
_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the polynomial that drives all singular values to about 1


class Muon(torch.optim.Optimizer):
    """Nesterov's momentum, made orthogonal; weight decay apart from the gradient.

    Parameters
    ----------
    matrices
        Parameters of two axes.
    lr
        Length of a step in every direction of a matrix that is not higher than wide; times sqrt(rows / columns) of
        one that is.
    weight_decay
        Share of the weights that a step of rate 1 takes off.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here is evaluated twice
        """Move every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix.grad)
                momentum = state["momentum"].lerp_(matrix.grad, 1 - _MOMENTUM)
                direction = orthogonal(matrix.grad.lerp(momentum, _MOMENTUM))
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(direction.to(matrix), alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return a matrix of the same singular vectors, singular values near 1, by five Newton-Schulz steps in float32."""
    found = matrix.float()
    if matrix.shape[0] > matrix.shape[1]:
        found = found.T
    found = found / found.norm().clamp(min=_TINY)
    for _ in range(_STEPS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), found, beta=_A)
    return found.T if matrix.shape[0] > matrix.shape[1] else found
