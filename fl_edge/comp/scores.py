"""How much a neuron matters: three readings of COMP's score "based on the matrix condition". All formulas *ours*.

The paper says that the score reads the condition number as the output's sensitivity to a neuron, and that the decision
is tied to a least-squares problem; its formula is not public. A score is the larger the more a neuron matters, or a
group of neurons that goes together (an attention head).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fl_edge.comp.system import Solution, System


def sensitivity(system: System, solution: Solution, width: int) -> Tensor:
    """Return score A: the squared relative condition number of the output with respect to a neuron's mask.

    kappa_i = ||dY/dm_i|| |m_i| / ||Y|| with the common ||Y|| left out: kappa_i^2 = M_ii ||v_i||^2, for a mask
    ||x_i||^2 ||w_i||^2 m_i^2. Summed over a group.

    Parameters
    ----------
    system, solution
        Of the layer; the solution for the neurons that are left.
    width
        Neurons of a group, which stand side by side.

    Returns
    -------
    Tensor
        (groups left,) float64.
    """
    own = system.matrix.diagonal()[solution.kept] * _energies(solution)
    return own.view(-1, width).sum(1)


def conditioning(solution: Solution, width: int) -> Tensor:
    """Return score B: what the squared error rises by when a group goes and all others are tuned again.

    v_D^T [(M^-1)_DD]^-1 v_D, for a single neuron v_i^2 / (M^-1)_ii (the optimal-brain-surgeon step). Small where the
    group makes the least-squares system ill-conditioned, since near-duplicates stand in for each other. Parameters and
    result as for :func:`sensitivity`.
    """
    groups = len(solution.kept) // width
    if width == 1:
        return _energies(solution) / solution.inverse.diagonal()
    blocks = solution.inverse.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    values = solution.values.view(groups, width, -1)
    factors = torch.linalg.cholesky(blocks)  # solving batches by LU fails on CPUs with some threads (torch 2.13)
    found: Tensor = torch.linalg.solve_triangular(factors, values, upper=False).square().sum((1, 2))
    return found


def perturbation(energies: Tensor, solution: Solution, weight: Tensor, width: int) -> Tensor:
    """Return score C: kappa(W without the group) ||X_D|| / ||X||, from ||dY|| / ||Y|| <= kappa(W) ||dX|| / ||X||.

    Costly: one singular value decomposition a group.

    Parameters
    ----------
    energies
        (n,) ||x_i||^2.
    solution, width
        As for :func:`sensitivity`.
    weight
        (o, n).
    """
    inputs, left = energies.to(solution.values)[solution.kept], weight.to(solution.values)[:, solution.kept]
    shares = (inputs.view(-1, width).sum(1) / inputs.sum()).sqrt()
    found = []
    for group in range(len(shares)):
        stays = torch.ones(len(solution.kept), dtype=torch.bool, device=left.device)
        stays[group * width : (group + 1) * width] = False
        found.append(_condition(left[:, stays]))
    return torch.stack(found) * shares


def _energies(solution: Solution) -> Tensor:
    """Return ||v_i||^2, (s,), without a matrix of squares."""
    lengths: Tensor = torch.linalg.vector_norm(solution.values, dim=1)
    return lengths.square()


def _condition(matrix: Tensor) -> Tensor:
    """Return the condition number, at most that which rounding hides; 1 of a matrix without columns."""
    values = torch.linalg.svdvals(matrix)
    if not len(values):
        return matrix.new_ones(())
    found: Tensor = values[0] / values[-1].clamp_min(torch.finfo(values.dtype).eps * values[0])
    return found
