"""The least-squares system behind a dense layer, and how its solution changes when unknowns are removed.

Masks and weights are the same problem. With Y = X W^T, w_i column i of W:

- a mask m (COMP's mask tuning): minimise ||Y* - X diag(m) W^T||^2 + lambda ||m - 1||^2. With A = (X^T X) o (W^T W) and
  b_i = <(X^T Y*)_i, w_i> that is (A + lambda I) m = b + lambda 1, one column of unknowns.
- whole weights V: minimise ||Y* - X V||^2 + lambda ||V - W^T||^2, (X^T X + lambda I) V = X^T Y* + lambda W^T, as many
  columns of unknowns as the layer has outputs.

That the mask makes the pruned output as close as possible to the original one is COMP's; the systems and the damping
are *ours*, the first after Kwon et al. 2022 ("A fast post-training pruning framework for transformers").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_edge.comp.statistics import Statistics
from fl_edge.errors import DataError

_UNSOLVED = "the statistics of a layer have no solution: activations are zero or not finite, or damping is too small"
_ROWS = 2048  # of a mask's matrix that are computed at once


@dataclass(frozen=True, eq=False)
class System:
    """(matrix + damping I) solution = right + damping prior, n unknowns in k columns, float64.

    Attributes
    ----------
    matrix
        (n, n) symmetric, positive semidefinite.
    right, prior
        (n, k).
    damping
        lambda, pulls the solution to the prior.
    """

    matrix: Tensor
    right: Tensor
    prior: Tensor
    damping: float


def mask_statistics(statistics: Statistics, weight: Tensor) -> Statistics:
    """Return the statistics of a layer's mask, as of the weights (1, n) of a layer with one output: A, b and ||Y*||^2.

    ``targets``, which the mask has no use for, is 0.
    """
    w = weight.to(statistics.gram)
    matrix, right, count = torch.empty_like(statistics.gram), torch.empty_like(w[:1].T), w.shape[1]
    for start in range(0, count, _ROWS):  # one triangle is computed
        rows, later = slice(start, start + _ROWS), slice(start + _ROWS, count)
        matrix[rows, start:] = (w[:, rows].T @ w[:, start:]).mul_(statistics.gram[rows, start:])
        matrix[later, rows] = matrix[rows, later].T
        right[rows] = (statistics.cross[rows] * w[:, rows].T).sum(1, keepdim=True)
    return Statistics(statistics.tokens, matrix, right, statistics.inputs, w.new_zeros(1), statistics.energy)


def weight_system(statistics: Statistics, weight: Tensor, damping: float, block: Tensor, current: Tensor) -> System:
    """Return the system of a layer's weights, or of a block of them; of a mask with :func:`mask_statistics`.

    Parameters
    ----------
    statistics, weight
        Of the layer; ``weight`` (o, n), for a mask ones (1, n).
    damping
        As a part of the mean diagonal of the matrix.
    block
        (b,) int64, the neurons to solve for.
    current
        (n, o) the weights, or the mask, as they are, which stay outside the block.
    """
    rows, right = statistics.gram[block], statistics.cross[block].double()
    if len(block) < len(current):  # what the neurons outside contribute is known, and goes to the right side
        values = current.to(rows)
        right -= rows @ values - rows[:, block] @ values[block]
    matrix = rows[:, block].double()
    prior = weight[:, block].T.to(matrix)
    return System(matrix, right, prior, damping * float(matrix.diagonal().mean()))


@dataclass(frozen=True, eq=False)
class Solution:
    """The solution of a system for the unknowns that are left.

    Attributes
    ----------
    kept
        (s,) int64, numbers of the unknowns that are left, ascending.
    values
        (s, k).
    inverse
        (s, s) of the damped matrix on the kept unknowns.
    """

    kept: Tensor
    values: Tensor
    inverse: Tensor

    def rise(self, removed: Tensor) -> float:
        """Return by how much the damped squared error rises when more unknowns are zero; see :meth:`without`."""
        factor = torch.linalg.cholesky(self.inverse[removed][:, removed])
        values = self.values[removed]
        return float((values * torch.cholesky_solve(values, factor)).sum())

    def without(self, removed: Tensor) -> Solution:
        """Return the solution when more unknowns are zero.

        By the Schur complement, so that all steps of an elimination cost about as much as one factorisation.

        Parameters
        ----------
        removed
            (r,) int64, positions in ``kept``.
        """
        stays = torch.ones(len(self.kept), dtype=torch.bool, device=self.kept.device)
        stays[removed] = False
        left = stays.nonzero().flatten()
        rows = self.inverse[removed]
        across = rows[:, left]  # (r, s - r)
        pulled = torch.cholesky_solve(across, torch.linalg.cholesky(rows[:, removed]))
        return Solution(
            self.kept[left],
            self.values[left].addmm_(pulled.T, self.values[removed], alpha=-1),
            self.inverse[left].index_select(1, left).addmm_(across.T, pulled, alpha=-1),
        )


def solve(system: System) -> Solution:
    """Return the solution with every unknown left.

    Raises
    ------
    DataError
        Statistics that are not finite, or a system without a solution.
    """
    if not bool(torch.isfinite(system.right).all()):
        raise DataError(_UNSOLVED)
    factor, inverse = inverted(system.matrix, system.damping)
    values = torch.cholesky_solve(torch.add(system.right, system.prior, alpha=system.damping), factor)
    return Solution(torch.arange(len(inverse), device=inverse.device), values, inverse)


def inverted(matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor and the inverse of matrix + damping I, (n, n).

    Raises
    ------
    DataError
        A matrix that is not finite, or not positive definite.
    """
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        raise DataError(_UNSOLVED)
    # Not torch.cholesky_inverse: MKL's threads wait for each other in it so often that on busy cores it takes 50 times
    # as long. The damped matrix has done its part, and its memory is for the identity.
    identity = damped.zero_()
    identity.diagonal().fill_(1.0)
    return factor, torch.cholesky_solve(identity, factor)
