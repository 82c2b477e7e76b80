"""Which units go: the lowest scores, until the budget of parameters is spent.

All of it is ours, since the paper's text on it could not be had; the comparison layer by layer is that of LoRAPrune's
code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_edge.errors import ConfigError
from fl_edge.pruning import LayerPlan, PruningPlan
from fl_edge.pruning.plan import UNITS, Unit

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Guards:
    """What must stay.

    Attributes
    ----------
    min_heads
        Heads (groups) that every layer keeps.
    min_channels
        Share of its FFN channels that every layer keeps.
    frozen_layers
        Layers that are not pruned at all.
    """

    min_heads: int = 1
    min_channels: float = 0.1
    frozen_layers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Candidates:
    """Units that may go, lowest first."""

    layer: NDArray[np.int64]
    unit: NDArray[np.int64]  # place in UNITS
    index: NDArray[np.int64]  # of the unpruned model
    params: NDArray[np.int64]


def select(
    plan: PruningPlan,
    scores: Sequence[Mapping[Unit, Floats]],
    unit_params: Sequence[tuple[int, int]],
    sparsity: float,
    *,
    scope: str = "layer",
    guards: Guards | None = None,
) -> PruningPlan:
    """Return the plan after the next cut.

    Parameters
    ----------
    plan
        What is kept now.
    scores
        Of each layer, "heads" and "channels": one score for each unit of the *unpruned* model; those of units that are
        gone already are not looked at.
    unit_params
        Parameters of one head and of one channel, for each layer.
    sparsity
        Share of the prunable parameters that is to be gone afterwards. It is met from below, to within the smallest
        unit, unless the guards forbid it.
    scope
        "layer": in every layer, heads and channels lose the same share; "global": all units are compared by score over
        parameters.
    guards
        What must stay.

    Raises
    ------
    ConfigError
        A sparsity that is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity={sparsity} is not allowed; it must be at least 0 and below 1")
    guards = guards or Guards()
    candidates = _candidates(plan, scores, unit_params, scope, guards)
    budget = round(sparsity * _prunable(plan, unit_params)) - _removed(plan, unit_params)
    taken = _fill(candidates.params, budget)
    gone: dict[tuple[int, int], set[int]] = {}
    for layer, unit, index in zip(
        candidates.layer[taken].tolist(), candidates.unit[taken].tolist(), candidates.index[taken].tolist(), strict=True
    ):
        gone.setdefault((layer, unit), set()).add(index)
    layers = tuple(
        LayerPlan(
            *(
                tuple(i for i in getattr(kept, name) if i not in gone.get((place, unit), ()))
                for unit, name in enumerate(UNITS)
            )
        )
        for place, kept in enumerate(plan.layers)
    )
    return PruningPlan(plan.model_type, plan.heads, plan.channels, layers)


def _candidates(
    plan: PruningPlan,
    scores: Sequence[Mapping[Unit, Floats]],
    unit_params: Sequence[tuple[int, int]],
    scope: str,
    guards: Guards,
) -> _Candidates:
    columns: list[tuple[Any, ...]] = []
    keys: list[Floats] = []
    for place in range(len(plan.layers)):
        for unit, name in enumerate(UNITS):
            index = np.array(plan.kept(place, name), dtype=np.int64)
            before = plan.total(place, name)
            least = guards.min_heads if name == "heads" else -int(-guards.min_channels * before // 1)
            free = 0 if place in guards.frozen_layers else max(0, len(index) - max(1, least))
            score = np.asarray(scores[place][name], dtype=np.float64)[index]
            lowest = np.argsort(score, kind="stable")[:free]  # ties: the lowest index goes first
            params = unit_params[place][unit]
            if scope == "global":
                keys.append(score[lowest] / params)
            else:  # the n-th unit to go of a group of `before` has taken n / before of it away
                keys.append((before - len(index) + 1 + np.arange(free)) / before)
            columns.append((np.full(free, place), np.full(free, unit), index[lowest], np.full(free, params)))
    order = np.argsort(np.concatenate(keys), kind="stable")
    return _Candidates(*(np.concatenate(column)[order] for column in zip(*columns, strict=True)))


def _fill(params: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Return places of the units to take, in their order; one that does not fit into what is left is passed over."""
    taken: list[NDArray[np.int64]] = []
    places = np.arange(len(params))
    while len(places := places[params[places] <= budget]):
        count = int(np.searchsorted(np.cumsum(params[places]), budget, side="right"))
        taken.append(places[:count])
        budget -= int(params[places[:count]].sum())
        places = places[count:]
    return np.concatenate(taken) if taken else np.empty(0, np.int64)


def _prunable(plan: PruningPlan, unit_params: Sequence[tuple[int, int]]) -> int:
    sizes = zip(plan.heads, plan.channels, unit_params, strict=True)
    return sum(heads * a + channels * b for heads, channels, (a, b) in sizes)


def _removed(plan: PruningPlan, unit_params: Sequence[tuple[int, int]]) -> int:
    return sum(
        (heads - len(kept.heads)) * a + (channels - len(kept.channels)) * b
        for heads, channels, kept, (a, b) in zip(plan.heads, plan.channels, plan.layers, unit_params, strict=True)
    )
