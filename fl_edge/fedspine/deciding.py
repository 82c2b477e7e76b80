"""What each device is given in a round, and why: ratio and rank by its bandit, within what the schedule allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_edge.fedspine.bandit import Agent, Arm, leaf_of, quadrants
from fl_edge.fedspine.config import FedSpineConfig
from fl_edge.fedspine.schedule import deadline_round, next_sparsity, ratio_bounds
from fl_edge.fedspine.selection import select
from fl_edge.fedspine.state import DeviceState
from fl_edge.pruning import PruningPlan, sparsity
from fl_edge.pruning.plan import UNITS, Unit

Scores = list[dict[Unit, NDArray[np.float64]]]


@dataclass(frozen=True)
class Decision:
    """A device's orders for one round.

    Attributes
    ----------
    arm
        Ratio and rank as decided.
    plan
        What the device keeps from this round on.
    before, after
        Its sparsity, before and after the cut.
    could_prune
        Whether the schedule allowed a ratio above 0.
    why
        A few words for the log.
    """

    arm: Arm
    plan: PruningPlan
    before: float
    after: float
    could_prune: bool
    why: str


def decide(
    config: FedSpineConfig,
    device: DeviceState,
    scores: Scores,
    sizes: Sequence[tuple[int, int]],
    server_round: int,
    rounds: int,
    rng: np.random.Generator,
) -> Decision:
    """Return what one device does in a round.

    Parameters
    ----------
    scores
        By which its units go, see :func:`removal_scores`.
    sizes
        Parameters of one head and one channel, for each layer.
    server_round, rounds
        t and T, for the schedule.
    rng
        Of (seed, round, device).
    """
    before = sparsity(device.plan, sizes)
    # a cut ends less than one unit below what was asked for: what is that close to the target is done
    reached = before > config.schedule.target - _smallest_step(device.plan, sizes)
    least, largest = (0.0, 0.0) if reached else ratio_bounds(config.schedule, before, server_round, rounds)
    arm, why = _choose(config, device.agent, least, largest, server_round, rounds, before, rng)
    if largest == 0:
        why = f"{'target reached' if reached else 'warm-up'}, rank only; {why}"
        return Decision(arm, device.plan, before, before, False, why)
    wanted = next_sparsity(config.schedule, before, arm.ratio)
    plan = select(device.plan, scores, sizes, wanted, scope=config.scope, guards=config.guards(len(device.plan.layers)))
    return Decision(arm, plan, before, sparsity(plan, sizes), True, why)


def _choose(
    config: FedSpineConfig,
    agent: Agent,
    least: float,
    largest: float,
    server_round: int,
    rounds: int,
    before: float,
    rng: np.random.Generator,
) -> tuple[Arm, str]:
    if config.choice == "fixed":
        left = max(deadline_round(config.schedule, rounds) - server_round + 1, 1)
        step = (config.schedule.target - before) / left
        if config.schedule.reading == "fraction":
            step /= 1 - before
        return Arm(min(max(step, least), largest), config.fixed_rank), "even steps, one rank"
    arm = agent.choose(rng, least, largest)
    if leaf_of(agent.space, quadrants(agent.space), arm) in agent.cold:
        return arm, "first pull of its quadrant"
    if not agent.history:
        return arm, "nothing known yet"
    mean, width = agent.predict([arm])
    bonus = agent.config.exploration * float(width[0])
    floor = f", at least {least:.3f} to be in time" if least > 0 and arm.ratio <= least else ""
    return arm, f"highest of {len(agent.leaves)} bounds: {mean[0]:.2f} + {bonus:.2f}{floor}"


def _smallest_step(plan: PruningPlan, sizes: Sequence[tuple[int, int]]) -> float:
    """Return the sparsity of the smallest unit."""
    total = sum(
        a * heads + b * channels for heads, channels, (a, b) in zip(plan.heads, plan.channels, sizes, strict=True)
    )
    return min(min(pair) for pair in sizes) / total


def removal_scores(config: FedSpineConfig, devices: Mapping[str, DeviceState], device: str) -> Scores:
    """Return the scores by which a device's units go, lowest first, one for each unit of the unpruned model.

    "own": the device's own importance. "consensus": what others have removed goes first, the more of them the sooner;
    then by the mean importance over the devices that still have the unit, weighted by samples. All devices then cut
    along one order: of each layer, the heads of one device and those of another are the same or one contains the other,
    and so are the channels. Both are ours.
    """
    own = devices[device]
    if config.importance == "own":
        return [{unit: scores[unit].double().numpy() for unit in UNITS} for scores in own.importance] or _flat(own.plan)
    everyone = [devices[name] for name in sorted(devices)]  # sums in an order that does not depend on who came first
    known = [each for each in everyone if each.importance] or [own]
    weights = np.array([each.samples for each in known], dtype=np.float64)
    found: Scores = []
    for layer in range(len(own.plan.layers)):
        row: dict[Unit, NDArray[np.float64]] = {}
        for unit in UNITS:
            kept = np.stack([_mask(each.plan, layer, unit) for each in known])
            scores = np.stack([_scores(each, layer, unit) for each in known])
            mean = (weights[:, None] * kept * scores).sum(0) / np.maximum((weights[:, None] * kept).sum(0), 1e-300)
            gone = np.sum([~_mask(each.plan, layer, unit) for each in everyone], axis=0)
            row[unit] = np.where(gone > 0, -gone.astype(np.float64), mean)
        found.append(row)
    return found


def class_plan(
    config: FedSpineConfig, plans: Sequence[PruningPlan], sizes: Sequence[tuple[int, int]], target: float
) -> PruningPlan:
    """Return the one plan that stands for several: at a sparsity, without the units that most of them have removed.

    Equal plans give this plan. Ours.
    """
    if len({plan.digest() for plan in plans}) == 1:
        return plans[0]
    first = plans[0]
    # select compares score over parameters: times the parameters, it is the share of the plans that keep the unit
    kept = [
        {
            unit: np.mean([_mask(plan, layer, unit) for plan in plans], axis=0) * params
            for unit, params in zip(UNITS, sizes[layer], strict=True)
        }
        for layer in range(len(first.layers))
    ]
    return select(first.unpruned(), kept, sizes, target, scope="global", guards=config.guards(len(first.layers)))


def _mask(plan: PruningPlan, layer: int, unit: Unit) -> NDArray[np.bool_]:
    mask = np.zeros(plan.total(layer, unit), dtype=bool)
    mask[list(plan.kept(layer, unit))] = True
    return mask


def _scores(device: DeviceState, layer: int, unit: Unit) -> NDArray[np.float64]:
    if not device.importance:
        return np.zeros(device.plan.total(layer, unit))
    return device.importance[layer][unit].double().numpy()


def _flat(plan: PruningPlan) -> Scores:
    return [{unit: np.zeros(plan.total(layer, unit)) for unit in UNITS} for layer in range(len(plan.layers))]
