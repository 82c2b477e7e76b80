"""How far a device prunes in a round: what its bandit may choose from, and the schedules of the baselines.

A ratio p of a round is read as an increment of the sparsity P, or as a fraction of what is left; which of them FedSpine
(arXiv 2501.02438) means was not to be had, nor its rule for reaching the target in time. All of this is *ours*.
Rounds count from 1. Everything is a pure function of numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fl_edge.config import setting

_EXACT = 1e-12  # sparsity closer than this to the target is the target: sums of increments round


@dataclass
class ScheduleConfig:
    """Target sparsity and the way there. All defaults are ours."""

    target: float = setting(0.5, "P*: sparsity of the prunable weights at the end, below 1", low=0.0, high=0.99)
    largest: float = setting(0.1, "p_max: the largest ratio of one round", low=1e-3, high=0.99)
    deadline: float = setting(0.6, "share of the rounds by whose end every device is at the target", low=0.0, high=1.0)
    warmup_rounds: int = setting(1, "rounds before the first pruning, in which importance gathers", low=0)
    reading: str = setting(
        "increment", "a ratio is added to the sparsity, or taken from what is left", choices=("increment", "fraction")
    )


def deadline_round(config: ScheduleConfig, rounds: int) -> int:
    """Return T_prune, the last round of regular pruning: share times rounds, rounded down, after the warm-up."""
    return max(math.floor(config.deadline * rounds + 1e-9), config.warmup_rounds + 1)


def shortfall(config: ScheduleConfig, rounds: int) -> str | None:
    """Return why not even the largest ratio in each round reaches the target in time, or nothing."""
    possible = deadline_round(config, rounds) - config.warmup_rounds
    if _needed(config, 0.0) <= _reach(config, possible) + _EXACT and deadline_round(config, rounds) <= rounds:
        return None
    return (
        f"a target of {config.target} is out of reach in {rounds} rounds: {possible} of them may prune (after "
        f"warmup_rounds={config.warmup_rounds}, until deadline={config.deadline}), each by largest={config.largest}"
    )


def next_sparsity(config: ScheduleConfig, sparsity: float, ratio: float) -> float:
    """Return P after a round with ratio p >= 0: min(P*, P + p), or min(P*, 1 - (1 - P)(1 - p))."""
    grown = sparsity + ratio if config.reading == "increment" else 1 - (1 - sparsity) * (1 - ratio)
    # what is above the target already (another target before a resume) stays: nothing grows back
    return max(sparsity, config.target if grown >= config.target - _EXACT else grown)


def ratio_bounds(config: ScheduleConfig, sparsity: float, server_round: int, rounds: int) -> tuple[float, float]:
    """Return the least and the largest ratio that a device may be given.

    ::

        least = need - what p_max achieves in the rounds left after this one before T_prune, within [0, largest]
        largest = min(p_max, need);  need = P* - P, or 1 - (1 - P*) / (1 - P)

    Any choice within the bounds, in every round, ends at P* exactly by T_prune. A device that missed rounds has its
    floor rise, up to p_max; if that is not enough, it goes on at p_max behind T_prune until it is there, or until the
    run ends below the target. Both bounds are 0 during the warm-up and once the target is reached.

    Parameters
    ----------
    sparsity
        P before this round, in [0, 1).
    server_round, rounds
        t and T.
    """
    need = _needed(config, sparsity)
    if server_round <= config.warmup_rounds or need <= 0:
        return 0.0, 0.0
    largest = min(config.largest, need)
    later = max(deadline_round(config, rounds) - server_round, 0)
    if config.reading == "increment":
        least = need - _reach(config, later)
    else:
        left, kept = 1 - need, (1 - config.largest) ** later
        # compared before dividing: many rounds of a large p_max keep nothing
        least = 1 - left / kept if left < kept else 0.0
    return min(max(least, 0.0), largest), largest


def _needed(config: ScheduleConfig, sparsity: float) -> float:
    """Return the ratio that goes from a sparsity to the target in one round; 0 when there."""
    if sparsity >= config.target - _EXACT:
        return 0.0
    return config.target - sparsity if config.reading == "increment" else 1 - (1 - config.target) / (1 - sparsity)


def _reach(config: ScheduleConfig, rounds: int) -> float:
    """Return the ratio that so many rounds at p_max amount to."""
    return config.largest * rounds if config.reading == "increment" else 1 - (1 - config.largest) ** rounds


def cubic_sparsity(
    server_round: int, rounds: int, target: float, start: float = 0.0, warmup: float = 0.1, cooldown: float = 0.1
) -> float:
    """Return the sparsity after a round by the cubic schedule of gradual pruning, the baselines' (LoRAPrune's code).

    P(t) = P* + (P_0 - P*) (1 - (t - t_0) / (T - t_0 - t_1))^3 between t_0 rounds of warm-up and t_1 of cool-down.

    Parameters
    ----------
    warmup, cooldown
        t_0 and t_1 as shares of the rounds, together below 1.
    """
    before, after = warmup * rounds, cooldown * rounds
    passed = min(max((server_round - before) / (rounds - before - after), 0.0), 1.0)
    return target + (start - target) * (1 - passed) ** 3


def one_shot_sparsity(server_round: int, target: float, start_round: int = 1) -> float:
    """Return the sparsity after a round when everything is pruned at once, in ``start_round``."""
    return target if server_round >= start_round else 0.0
