"""What the bandits of :mod:`benchmarks.bandit` play on: mean rewards that are known exactly, and their noise.

Three kinds, each stationary or with a change half-way:

- ``1-D``: a concave reward over one axis, [0, 0.9], uniform noise; the optimum jumps.
- ``2-D``: a concave reward over ratio and rank, uniform noise; the optimum jumps.
- ``device``: the rewards of FedSpine for one device out of 20 on the emulated test bed; its power mode changes.

In ``device`` a round's noise (bandwidths, jitter, losses) is one of a finite pool of draws, so that an arm's mean
reward is the plain mean over the pool, and regret carries no error of estimation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fl_edge.edge.config import EdgeConfig
from fl_edge.edge.profiles import MODES, deal_distances, deal_kinds, distance_level_bps, mode_speed
from fl_edge.fedspine.bandit import Arm, Space
from fl_edge.fedspine.reward import RewardConfig, pruning_progress, rewards
from fl_edge.seeding import numpy_rng

Floats = NDArray[np.float64]

RANKS = (4, 8, 12, 16, 24, 32)
NOISE = 0.1  # standard deviation of the synthetic rewards
DEVICES, POOL = 20, 512
PER_RATIO = 41  # grid of ratios on which the best arm is looked for

# RoBERTa-shaped (spec 4.9): seconds of an unpruned iteration at speed 1, share that one rank adds, bytes of one rank
ITERATIONS, ITERATION_S, RANK_SHARE, RANK_BYTES = 20, 0.05, 0.008, 5.06 * 2**20 / 8
SPARSITY, TARGET = 0.25, 0.5  # the device is half-way


@dataclass(frozen=True)
class Concave:
    """0.8 - 0.6 times the mean squared distance to the optimum; ratio and rank rescaled to [0, 1]."""

    space: Space
    optimum: tuple[float, float]

    @cached_property
    def pool(self) -> Floats:
        """Noise, (POOL,), uniform, with mean exactly 0; rewards stay within [0, 1]."""
        return np.asarray(NOISE * np.sqrt(3) * (2 * (np.arange(POOL) + 0.5) / POOL - 1))

    def outcomes(self, arm: Arm) -> Floats:
        """Return the rewards of an arm under every noise of the pool, (POOL,)."""
        across = [arm.ratio / self.space.largest - self.optimum[0]]
        if len(self.space.ranks) > 1:
            across.append(self.space.ranks.index(arm.rank) / (len(self.space.ranks) - 1) - self.optimum[1])
        return np.asarray(0.8 - 0.6 * np.mean(np.square(across)) + self.pool)


@dataclass(frozen=True)
class Device:
    """One device's reward; in every round the 19 others play arms at random, as bandits of their own may."""

    space: Space
    seed: int
    index: int
    mode: int

    @cached_property
    def noise(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Bits a second, jitter of the time, noise of the loss and of the importance, each (POOL, DEVICES)."""
        config, rng = EdgeConfig(), numpy_rng(self.seed, "bench", "noise")
        levels = np.array([distance_level_bps(config, metres) for metres in deal_distances(self.seed, DEVICES)])
        draws = rng.standard_normal((4, POOL, DEVICES))
        bandwidth = levels * np.exp(config.bandwidth_spread * draws[0])
        bounded = np.clip(bandwidth, 1e6 * config.bandwidth_low_mbps, 1e6 * config.bandwidth_high_mbps)
        return bounded, np.exp(0.1 * draws[1] / ITERATIONS**0.5), np.exp(0.15 * draws[2]), np.exp(0.1 * draws[3])

    @cached_property
    def others(self) -> tuple[Floats, Floats]:
        """Ratios and ranks that the others play, each (POOL, DEVICES)."""
        rng = numpy_rng(self.seed, "bench", "others")
        ratio = rng.uniform(0, self.space.largest, (POOL, DEVICES))
        return ratio, rng.choice(np.array(self.space.ranks, np.float64), (POOL, DEVICES))

    @cached_property
    def speeds(self) -> Floats:
        """Relative speeds, (DEVICES,): everybody's mode drawn once, the device's own as given."""
        config, rng = EdgeConfig(), numpy_rng(self.seed, "bench", "modes")
        kinds = deal_kinds(config, self.seed, DEVICES)
        speeds = np.array([mode_speed(config, kind, int(rng.integers(MODES[kind]))) for kind in kinds])
        speeds[self.index] = mode_speed(config, kinds[self.index], self.mode)
        return speeds

    @cached_property
    def gains(self) -> Floats:
        """How much loss each device's data give away, (DEVICES,): they are not identically distributed."""
        return np.exp(0.3 * numpy_rng(self.seed, "bench", "gains").standard_normal(DEVICES))

    def outcomes(self, arm: Arm) -> Floats:
        """Return the rewards of an arm under every noise of the pool, (POOL,)."""
        bandwidth, jitter, loss_noise, update_noise = self.noise
        ratio, rank = (each.copy() for each in self.others)
        ratio[:, self.index], rank[:, self.index] = arm.ratio, arm.rank
        damage = np.square(ratio / self.space.largest)
        drop = self.gains * (1 - np.exp(-rank / 10)) * (1 - 0.6 * damage) * loss_noise
        update = (1 - np.exp(-rank / 16)) * update_noise
        compute = ITERATIONS * ITERATION_S * (1 - SPARSITY - ratio + RANK_SHARE * rank) / self.speeds * jitter
        seconds = compute + 2 * 8 * RANK_BYTES * rank / bandwidth
        progress = pruning_progress(np.full_like(ratio, SPARSITY), SPARSITY + ratio, TARGET)
        return np.asarray(rewards(RewardConfig(), drop, progress, update, seconds)[:, self.index])


Surface = Concave | Device


@dataclass
class Game:
    """A sequence of rewards: one surface, or one until the change and another from there on."""

    space: Space
    surfaces: tuple[Surface, ...]
    horizon: int
    seed: int

    def __post_init__(self) -> None:
        self._outcomes: dict[tuple[int, Arm], Floats] = {}
        self._places = numpy_rng(self.seed, "bench", "rounds").integers(POOL, size=self.horizon)

    def part(self, step: int) -> int:
        """Return the index of the surface in force, steps counted from 0."""
        return step * len(self.surfaces) // self.horizon

    def outcomes(self, part: int, arm: Arm) -> Floats:
        """Return an arm's rewards on one surface, (POOL,)."""
        if (part, arm) not in self._outcomes:
            self._outcomes[part, arm] = self.surfaces[part].outcomes(arm)
        return self._outcomes[part, arm]

    def mean(self, step: int, arm: Arm) -> float:
        """Return the mean reward of an arm in a step."""
        return float(self.outcomes(self.part(step), arm).mean())

    def reward(self, step: int, arm: Arm) -> float:
        """Return what playing an arm in a step gives; the noise of a step is the same whatever is played."""
        return float(self.outcomes(self.part(step), arm)[self._places[step]])

    def grid(self) -> list[Arm]:
        """Return the arms among which the best one is looked for."""
        ratios = np.linspace(0, self.space.largest, PER_RATIO)
        return [Arm(float(ratio), rank) for rank in self.space.ranks for ratio in ratios]

    @cached_property
    def table(self) -> Floats:
        """Mean rewards, (steps, arms of the grid)."""
        each = [[self.outcomes(part, arm).mean() for arm in self.grid()] for part in range(len(self.surfaces))]
        return np.asarray(each)[[self.part(step) for step in range(self.horizon)]]


@functools.lru_cache(maxsize=12)  # all games of a seed: every policy plays them
def make_game(kind: str, changes: bool, horizon: int, seed: int) -> Game:
    """Return the game of a seed; with a change, the second half has another optimum or another power mode."""
    rng = numpy_rng(seed, "bench", "game", kind)
    if kind == "device":
        space, index = Space(0.1, RANKS), int(rng.integers(DEVICES))
        modes = MODES[deal_kinds(EdgeConfig(), seed, DEVICES)[index]]
        # from one half of the modes to the other: a factor between 1.6 (TX2) and 10 (AGX) in speed
        first = int(rng.integers(modes))
        second = int(rng.integers(modes // 2)) + (modes // 2 if first < modes // 2 else 0)
        surfaces: tuple[Surface, ...] = tuple(Device(space, seed, index, mode) for mode in (first, second))
    else:
        space = Space(0.9, (8,)) if kind == "1-D" else Space(0.1, RANKS)
        first_at, second_at = rng.uniform(0.05, 0.4, 2), rng.uniform(0.6, 0.95, 2)
        flip = rng.integers(2, size=2).astype(bool)  # which end of each axis comes first
        starts, ends = np.where(flip, second_at, first_at), np.where(flip, first_at, second_at)
        surfaces = tuple(Concave(space, (float(at[0]), float(at[1]))) for at in (starts, ends))
    return Game(space, surfaces if changes else surfaces[:1], horizon, seed)
