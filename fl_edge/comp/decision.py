"""What happens to one dense layer: which units stay, and what their weights become. All choices here *ours*."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fl_edge.comp.config import CompConfig
from fl_edge.comp.elimination import Elimination, eliminate
from fl_edge.comp.scores import conditioning, perturbation, sensitivity
from fl_edge.comp.statistics import Statistics, relative_error
from fl_edge.comp.system import Solution, System, mask_statistics, solve, weight_system


@dataclass(frozen=True, eq=False)
class Decision:
    """What happens to the linear map that consumes a layer's heads or channels.

    Attributes
    ----------
    kept
        Units that stay, ascending.
    mask
        (s,) factors of the columns that stay; None where whole weights are new.
    weight
        (o, s) new weight; None where the mask says it all.
    bias
        (o,) new bias; None: as it was.
    order
        Units that go, the first to go first.
    guarded
        Whether the guard on the mask's variance kept more units than were to stay.
    variance
        Of the mask.
    untuned, tuned
        Relative error of the output on the calibration text, with the kept columns as they were and as they are now.
    """

    kept: tuple[int, ...]
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    order: tuple[int, ...]
    guarded: bool
    variance: float
    untuned: float
    tuned: float

    def fold(self, linear: nn.Linear) -> None:
        """Change the weights of a map whose columns have been sliced: W_S diag(m), or the new ones."""
        with torch.no_grad():
            if self.mask is not None:
                linear.weight.mul_(self.mask.to(linear.weight.device))
            if self.weight is not None:
                linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias = nn.Parameter(self.bias.to(linear.weight), requires_grad=False)


def decide(
    statistics: Statistics,
    weight: Tensor,
    bias: Tensor | None,
    quota: int,
    width: int,
    config: CompConfig,
    gone: Collection[int] | None = None,
) -> Decision:
    """Choose the units that go and tune what stays.

    Layers with more neurons than ``config.block`` are taken block by block, each with its part of the quota and with
    the others as they are by then; neurons are dealt to the blocks in the order of their sensitivity.

    Parameters
    ----------
    statistics
        Of what enters the map and of the output that is wanted.
    weight, bias
        (o, n) and (o,), or None, of the map.
    quota
        Units to remove, fewer than there are.
    width
        Neurons of a unit.
    gone
        Units that go, where that is settled; then there is no guard.

    Raises
    ------
    DataError
        Statistics that no solution fits.
    """
    if bias is not None:
        statistics = statistics.without_bias(bias)
    fitted = statistics.centred() if config.bias else statistics
    whole = config.restore == "weights"
    original = weight.to(statistics.gram)
    prior = original if whole else torch.ones_like(original[:1])
    problem = fitted if whole else mask_statistics(fitted, original)
    values, order = _tuned(problem, fitted, original, prior, quota, width, config, gone)
    removed = set(order)
    kept = tuple(unit for unit in range(original.shape[1] // width) if unit not in removed)
    stay = neurons_of(torch.tensor(kept, device=original.device), width)
    bare = torch.zeros_like(prior)
    bare[:, stay] = prior[:, stay]
    untuned, tuned = (relative_error(problem, each) * problem.energy for each in (bare, values.T))
    del bare  # of the size of the weights
    if config.bias:  # untuned, there is none to take the mean of what is wanted
        off = statistics.targets - original[:, stay] @ statistics.inputs[stay]
        untuned += float(off.square().sum()) / statistics.tokens
    passing = values.T @ statistics.inputs if whole else original @ (values[:, 0] * statistics.inputs)
    added = (statistics.targets - passing) / statistics.tokens
    lengths = torch.linalg.vector_norm(original, dim=0).square().clamp_min(torch.finfo(original.dtype).tiny)
    mask = (values * original.T).sum(1) / lengths if whole else values[:, 0]
    return Decision(
        kept=kept,
        mask=None if whole else values[stay, 0],
        weight=values[stay].T.contiguous() if whole else None,
        bias=None if not config.bias else added if bias is None else bias.to(added) + added,
        order=order,
        guarded=len(order) < quota,
        variance=float(mask[stay].var(correction=0)),
        untuned=untuned / statistics.energy,
        tuned=tuned / statistics.energy,
    )


def _tuned(
    problem: Statistics,
    fitted: Statistics,
    original: Tensor,
    prior: Tensor,
    quota: int,
    width: int,
    config: CompConfig,
    gone: Collection[int] | None,
) -> tuple[Tensor, tuple[int, ...]]:
    """Return masks or weights (n, k), zero where units went, and these units, the first to go first."""
    values = prior.T.clone()
    order: list[tuple[float, int]] = []
    left, rest = quota, original.shape[1] // width
    for units in blocks_of(fitted, original, width, config.block):
        block = neurons_of(units, width)
        system = weight_system(problem, prior, config.damping, block, values)
        asked = min(round(left * len(units) / rest), len(units))  # after a guard more may be left than there are
        score = partial(_score, config, system, fitted.gram.diagonal()[block], original[:, block], width)
        if gone is None:
            found = eliminate(system, solve(system), score, asked, width, config.steps, config.max_variance)
        else:
            settled = torch.tensor(
                [place for place, unit in enumerate(units.tolist()) if unit in gone], dtype=torch.long
            )
            out = neurons_of(settled.to(block.device), width)
            found = Elimination(solve(system).without(out), tuple(settled.tolist()), guarded=False)
        values[block] = 0
        values[block[found.solution.kept]] = found.solution.values.to(values) if config.restore != "none" else 1.0
        left, rest = left - len(found.order), rest - len(units)
        order += [(place / len(units), int(units[unit])) for place, unit in enumerate(found.order)]
        del system, score, found  # as large as the layer's weights; not to be there beside those of the next block
    return values, tuple(unit for _, unit in sorted(order))


def _score(
    config: CompConfig, system: System, energies: Tensor, weight: Tensor, width: int, solution: Solution
) -> Tensor:
    if config.score == "sensitivity":
        return sensitivity(system, solution, width)
    if config.score == "conditioning":
        return conditioning(solution, width)
    return perturbation(energies, solution, weight, width)


def blocks_of(statistics: Statistics, weight: Tensor, width: int, most: int) -> list[Tensor]:
    """Deal the units of a layer to blocks of at most ``most`` neurons, so that each has as many that matter little."""
    units = weight.shape[1] // width
    count = -(-units // max(most // width, 1))
    if count == 1:
        return [torch.arange(units, device=weight.device)]
    matters = statistics.gram.diagonal().double() * torch.linalg.vector_norm(weight, dim=0).square()
    ranked = matters.view(units, width).sum(1).argsort()
    return [ranked[first::count].sort().values for first in range(count)]


def neurons_of(units: Tensor, width: int) -> Tensor:
    """Return the neurons of some units."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
