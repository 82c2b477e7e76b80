"""A head for one candidate, fitted to its cached features: multinomial regression, solved to its optimum.

    phi = argmin  sum_i w_{y_i} CE(phi^T f_i + p, y_i) / sum_i w_{y_i}  +  ridge / 2 |phi|^2

Source: the variant "per-candidate head" of the specification, section 6 (its own inference, not the papers'). *Ours*:
the solver, the ridge on standardised features, and which losses allow it. The problem is strictly convex, so its
optimum depends neither on a schedule nor on a seed, and candidates differ by their features alone.

Loss and gradient are sums over samples (:func:`loss_sums`): devices can send theirs, (C, d + 1) numbers a step, and a
server can add them and run the same solver. Near the optimum a solver makes much of the last bit, so what is added is
rounded beforehand, to multiples that float64 adds without error in any order: devices and one machine take the same
steps. Means and deviations, whose terms have no common scale, are rounded to float32 after the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional

from fl_edge.errors import ConfigError, TrainingError
from fl_edge.imbnas.chunks import in_chunks
from fl_edge.imbnas.config import HeadConfig, LossConfig
from fl_edge.imbnas.weighting import effective_weights

CONVEX = ("ce", "cb", "drw", "balanced_softmax")

_GRID = 2.0**18  # features and errors are multiples of its inverse; products add up exactly below 2^17
_LOSS_GRID = 2.0**32  # losses are of this one's; they add up exactly below 2^21

Measure = Callable[[Tensor], tuple[Tensor, Tensor]]  # class vectors -> loss and gradient, summed over samples


@dataclass(frozen=True, eq=False)
class Objective:
    """What a loss means for multinomial regression.

    Attributes
    ----------
    weights
        w_c, of the samples of every class, float64 (C,).
    prior
        p_c, added to the logits while fitting, float64 (C,).
    counts
        n_c over all samples that take part, (C,).
    """

    weights: Tensor
    prior: Tensor
    counts: Tensor

    @property
    def total(self) -> float:
        """Return sum_i w_{y_i}."""
        return float((self.weights * self.counts).sum())

    def to(self, device: torch.device) -> Objective:
        """Return it on a device."""
        return Objective(self.weights.to(device), self.prior.to(device), self.counts.to(device))


def make_objective(loss: str, counts: Tensor, config: LossConfig) -> Objective:
    """Return the objective of a loss.

    Parameters
    ----------
    loss
        ``ce``; ``cb``: effective-number weights; ``drw``: the same, because what comes before the switch does not move
        the optimum; ``balanced_softmax``: log n_c as a prior, that of one sample for a class without any.
    counts
        n_c of the training set, (C,).

    Raises
    ------
    ConfigError
        A loss that is not convex in the head.
    DataError
        No class has samples.
    """
    if loss not in CONVEX:
        raise ConfigError(f"loss={loss} is not allowed for own heads; it must be one of {', '.join(CONVEX)}")
    weights = effective_weights(counts, config.beta if loss in ("cb", "drw") else 0.0)
    prior = counts.clamp_min(1).double().log() if loss == "balanced_softmax" else torch.zeros_like(weights)
    return Objective(weights, prior, counts)


def fit_head(features: Tensor, labels: Tensor, objective: Objective, config: HeadConfig) -> nn.Linear:
    """Return the best linear head on features.

    Parameters
    ----------
    features
        (n, d), of training images.
    labels
        int64 (n,).
    objective
        Of the same samples.
    config
        ``ridge`` and the solver's bounds.

    Raises
    ------
    TrainingError
        Features that are not finite.
    """
    exact = features.double()
    if not bool(torch.isfinite(exact).all()):
        raise TrainingError("features that are not finite numbers; no head can be fitted to them")
    mean = mean_of(exact.sum(0), len(exact))
    std = deviation_of((exact - mean).square().sum(0), len(exact))
    inputs = standardised(exact, mean, std)
    gram = gram_sums(inputs, labels, objective)
    point = solve(lambda at: loss_sums(at, inputs, labels, objective), gram, objective, config)
    return linear_head(point, mean, std, features)


def mean_of(total: Tensor, count: float) -> Tensor:
    """Return means, (d,) float64 of float32's precision.

    Sums in another order, which differ in the last bit, give the same ones unless they stand right between two floats.
    """
    return (total / count).float().double()


def deviation_of(squares: Tensor, count: float) -> Tensor:
    """Return standard deviations to divide by, (d,), from sums of squared differences, rounded as :func:`mean_of`.

    A dead channel, which has none, stays at 0.
    """
    std = (squares / count).sqrt()
    return torch.where(std > 1e-9 * std.max().clamp_min(1e-300), std, 1.0).float().double()


def standardised(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return float64 features (n, d) of mean 0 and deviation 1, and a last column of ones for the bias, (n, d + 1)."""
    return functional.pad(_rounded((features - mean) / std, _GRID), (0, 1), value=1.0)


def solve(measure: Measure, gram: Tensor, objective: Objective, config: HeadConfig) -> Tensor:
    """Return the best class vectors with the bias as last column, (C, d + 1), for standardised features.

    Parameters
    ----------
    measure
        Such vectors -> :func:`loss_sums` over all samples, wherever they are.
    gram
        :func:`gram_sums` over all samples.
    """
    whitener = _whitener(gram, objective, config.ridge)
    shape = (len(objective.weights), len(gram))

    def measured(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        point = torch.from_numpy(flat).to(gram.device).reshape(shape) @ whitener
        loss, gradient = measure(point)
        value = loss / objective.total + config.ridge / 2 * point.square().sum()
        slope = (gradient / objective.total + config.ridge * point) @ whitener.T
        return float(value), slope.flatten().cpu().numpy()

    found = optimize.minimize(
        measured,
        np.zeros(shape[0] * shape[1]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": config.iterations, "gtol": config.tolerance, "ftol": 0.0},
    )
    return torch.from_numpy(found.x).to(gram.device).reshape(shape) @ whitener


def loss_sums(point: Tensor, inputs: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return sum_i w CE, a scalar, and its gradient, (C, d + 1), both float64 and additive over samples.

    Parameters
    ----------
    point
        Class vectors with the bias as last column, (C, d + 1).
    inputs
        Standardised features with a last column of ones, (n, d + 1).
    labels
        int64 (n,).
    """
    logs = in_chunks(lambda part: functional.log_softmax(part @ point.T + objective.prior, dim=1), inputs)
    weights = objective.weights[labels, None]
    loss = -_rounded(weights * logs.gather(1, labels[:, None]), _LOSS_GRID).sum()
    errors = (logs.exp() - functional.one_hot(labels, logs.shape[1])) * weights
    return loss, _rounded(errors, _GRID).T @ inputs


def gram_sums(inputs: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """Return sum_i w f_i f_i', (d + 1, d + 1), additive over samples; arguments as :func:`loss_sums`."""
    return inputs.T @ _rounded(inputs * objective.weights[labels, None], _GRID)


def _rounded(values: Tensor, grid: float) -> Tensor:
    return (values * grid).round_().div_(grid)


def _whitener(gram: Tensor, objective: Objective, ridge: float) -> Tensor:
    """Return L^-1, (d + 1, d + 1), for which the Hessian in ``point = x L^-1`` is near the identity.

    L L' = gram / (2 total) + ridge is Boehning's bound of the Hessian (1992), the same for every class.
    """
    bound = gram / (2 * objective.total)
    bound.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(bound)
    inverse: Tensor = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
    return inverse


def linear_head(point: Tensor, mean: Tensor, std: Tensor, like: Tensor) -> nn.Linear:
    """Return a solution as a layer for features as they are, on the device of others."""
    scaled = point[:, :-1] / std
    weight, bias = scaled, point[:, -1] - scaled @ mean
    with torch.device("meta"):  # nothing is drawn from torch's global state
        head = nn.Linear(weight.shape[1], weight.shape[0])
    head.to_empty(device=like.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head.requires_grad_(requires_grad=False)
