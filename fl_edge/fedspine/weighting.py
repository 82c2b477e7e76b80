"""How much each device counts in the average: its samples, times how much of the model it still has.

The factors h_i are options of ours, HETLoRA's rule ("norm", EMNLP 2024) among them: that FedSpine weights by
heterogeneity is known, its formula is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from fl_edge.errors import ConfigError
from fl_edge.fedspine.factors import Factors

WeightRule = Literal["samples", "sparsity", "rank", "norm"]


def device_weights(
    samples: Sequence[int],
    sparsity: Sequence[float],
    ranks: Sequence[int],
    norms: Sequence[float],
    rule: WeightRule = "sparsity",
) -> list[float]:
    """Return w_i, proportional to n_i h_i and summing to 1.

    Parameters
    ----------
    samples
        n_i, at least 1.
    sparsity
        P_i, the share of prunable weights that is gone, in [0, 1).
    ranks
        r_i, at least 1.
    norms
        ||B_i A_i|| of the whole adapter (see :func:`adapter_norm`); may be empty for all rules but "norm".
    rule
        h_i: "samples" 1; "sparsity" 1 - P_i; "rank" r_i / max r; "norm" ||B_i A_i|| / sum_j ||B_j A_j||, and 1 while
        all products are zero.

    Raises
    ------
    ConfigError
        An unknown rule, no device, a value out of its range.
    """
    if rule not in get_args(WeightRule):
        raise ConfigError(f"no weighting rule {rule!r}: there are {', '.join(get_args(WeightRule))}")
    if not samples:
        raise ConfigError("no device to weight; at least one is due")
    for device, (count, share, rank) in enumerate(zip(samples, sparsity, ranks, strict=True)):
        if count < 1 or not 0 <= share < 1 or rank < 1:
            raise ConfigError(
                f"device {device}: {count} samples, sparsity {share}, rank {rank}; at least 1, [0, 1), at least 1"
            )
    factors: Sequence[float]
    if rule == "samples":
        factors = [1.0] * len(samples)
    elif rule == "sparsity":
        factors = [1 - share for share in sparsity]
    elif rule == "rank":
        factors = list(ranks)
    else:
        if not all(0 <= norm < math.inf for norm in norms):
            raise ConfigError("a norm below 0 or not finite")
        factors = norms if any(norms) else [1.0] * len(samples)
    products = [count * factor for count, factor in zip(samples, factors, strict=True)]
    total = math.fsum(products)
    return [product / total for product in products]


def adapter_norm(adapter: Iterable[Factors]) -> float:
    """Return the Frobenius norm of all products b @ a together, from (r, r) matrices: tr(bᵀb aaᵀ)."""
    squares = 0.0
    for factors in adapter:
        a, b = factors.a.double(), factors.b.double()
        squares += float(((b.T @ b) * (a @ a.T)).sum())
    return math.sqrt(max(squares, 0.0))
