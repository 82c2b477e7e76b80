"""How the budget is spread: whole layers first, then a ratio for each layer that stays.

That layers go first, by importance, and that each remaining layer then gets its own ratio, is COMP's. The share of the
budget that layers take, the layers that may not go and the rule of the ratios are *ours*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from fl_edge.errors import ConfigError
from fl_edge.pruning import Unit

Key = tuple[int, Unit]  # a layer's heads or channels

_HALVINGS = 100
_LEAST_IMPORTANCE = 1e-6  # below rounding of a cosine in float32; keeps a ratio of importances finite


def layers_to_remove(ratio: float, share: float, layers: int) -> int:
    """Return how many layers go: floor(share * ratio * layers)."""
    return math.floor(share * ratio * layers + 1e-9)


def choose_layers(
    count: int, candidates: Sequence[int], measure: Callable[[tuple[int, ...]], Mapping[int, float]], iterative: bool
) -> tuple[int, ...]:
    """Return the layers to remove, the first to go first.

    Parameters
    ----------
    count
        How many.
    candidates
        Layers that may go.
    measure
        Importance of the layers that are left when some are gone.
    iterative
        Measure again after each removal, since similarities move; else all are taken from one measurement.

    Raises
    ------
    ConfigError
        More layers to remove than candidates.
    """
    if count > len(candidates):
        raise ConfigError(
            f"the ratio asks for {count} whole layers and {len(candidates)} may go; lower ratio, layer_share or the "
            "number of protected layers"
        )
    gone: list[int] = []
    while len(gone) < count:
        importance = measure(tuple(gone))
        ranked = sorted((layer for layer in candidates if layer not in gone), key=lambda layer: importance[layer])
        gone += ranked[: 1 if iterative else count]
    return tuple(gone)


def check_budget(budget: float, most: float) -> None:
    """Refuse to remove more parameters than may go.

    Raises
    ------
    ConfigError
        A budget that is more.
    """
    if budget > most * (1 + 1e-9):
        raise ConfigError(
            f"the layers that stay would have to lose {budget:,.0f} parameters, and may lose {most:,.0f}; lower ratio, "
            "or raise layer_share or max_layer_ratio"
        )


def layer_ratios(
    importance: Sequence[float],
    sizes: Sequence[float],
    budget: float,
    alpha: float,
    largest: float,
    least: Sequence[float] | None = None,
) -> list[float]:
    """Return each layer's pruning ratio: r_l = clip(r (mean I / I_l)^alpha), r such that sum_l r_l size_l = budget.

    Parameters
    ----------
    importance
        I_l of the layers.
    sizes
        Parameters that can be pruned in each.
    budget
        Parameters to remove in all.
    alpha
        How strongly ratios follow importance; 0: the same for all.
    largest
        Upper bound of a ratio.
    least
        Lower bounds, by default 0.

    Raises
    ------
    ConfigError
        A budget that no ratios within their bounds can meet.
    """
    check_budget(budget, largest * sum(sizes))
    levels = [max(value, _LEAST_IMPORTANCE) for value in importance]
    mean = sum(levels) / len(levels)
    shapes = [(mean / level) ** alpha for level in levels]
    floors = [0.0] * len(levels) if least is None else list(least)

    def at(rate: float) -> list[float]:
        return [max(min(rate * shape, largest), floor) for shape, floor in zip(shapes, floors, strict=True)]

    low, high = 0.0, largest / min(shapes)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        spent = sum(r * size for r, size in zip(at(middle), sizes, strict=True))
        low, high = (middle, high) if spent < budget else (low, middle)
    return at(high)


def spread(
    curves: Mapping[Key, Sequence[tuple[int, float]]],
    sizes: Mapping[Key, int],
    budget: float,
    least: Mapping[Key, int],
) -> dict[Key, int]:
    """Return how many units go of each kind so that what is lost in all is least; *ours*.

    Each curve is replaced by its lower convex hull, and units go where the next parameter costs least. What a unit is
    too large for at the end stays for the caller to make up for elsewhere.

    Parameters
    ----------
    curves
        (units removed, loss), rising; the last point is the most that may go.
    sizes
        Parameters of a unit.
    budget
        Parameters to remove.
    least
        Units that go in any case.

    Raises
    ------
    ConfigError
        A budget that is more than may go.
    """
    check_budget(budget, sum(curve[-1][0] * sizes[key] for key, curve in curves.items()))
    pieces = []
    for key, curve in curves.items():
        hull: list[tuple[int, float]] = []
        for point in curve:
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        pieces += [(_slope(a, b) / sizes[key], key, a[0], b[0]) for a, b in pairwise(hull)]
    taken = dict(least)
    left = budget - sum(count * sizes[key] for key, count in taken.items())
    for _, key, begin, end in sorted(pieces, key=lambda piece: piece[0]):
        fits = max(min(end - max(begin, taken[key]), int(left // sizes[key])), 0)
        taken[key] += fits
        left -= fits * sizes[key]
    return taken


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
