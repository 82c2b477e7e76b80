"""S-UCB: one device's bandit over (pruning ratio, LoRA rank), a tree partition refined where it plays.

FedSpine (arXiv 2501.02438) names a "Smooth UCB" over a progressively refined partition; its bound and its split rule
were not to be had. What stands here is *ours*, on the frame of FedMP's E-UCB (ICDE 2022): leaves are boxes, evidence
may be discounted, the leaf of the highest upper confidence bound is played and the leaf that was played is split.
"Smooth" is read as sharing evidence between neighbours. With N(x) the discounted count of pulls of an arm x
that was played before and R(x) their discounted mean reward,

::

    k(x, z)  = exp(-|x - z|^2 / (2 reach^2))               on axes rescaled to [0, 1]
    mean(z)  = m + k(z)' (K + D)^-1 (R - m),   D = diag(noise / N)
    width(z) = sqrt(1 - k(z)' (K + D)^-1 k(z))
    choose     argmax over leaves of mean + exploration * width      at the point z that the leaf would play

with m the least-squares mean of the surface. This is the bound of a Gaussian process; as ``reach`` goes to 0 an arm
keeps only its own evidence, and width^2 becomes noise / (N + noise): E-UCB's 1 / sqrt(N) again, without its logarithm.

A device whose speed changes makes all that was learned wrong at once, which a discount forgets too slowly or pays for
in every other round. So rewards are watched by a cumulative sum (Page's test): how far each falls short of what was
predicted, in standard deviations, less a slack, and bounded so that one outlier raises no alarm. When it exceeds
``alarm``, all but the latest pulls are forgotten.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_edge.config import setting
from fl_edge.errors import ConfigError

Floats = NDArray[np.float64]

MEMORY = 256  # pulls that an agent remembers
_SLACK = 0.5  # Page's test: a shortfall up to so many standard deviations is no evidence
_OUTLIER = 3.0  # and none counts for more than so many: one delayed round is no change
_RECENT = 5  # pulls that an alarm leaves, and that must be there before one can be raised
_NOISE, _NOISE_PULLS = 0.07, 2  # standard deviation assumed of a reward, and the number of pulls that this is worth


@dataclass(frozen=True)
class Arm:
    """What a device is given for one round: pruning ratio and LoRA rank."""

    ratio: float
    rank: int


@dataclass(frozen=True)
class Space:
    """All arms: ratios in [0, largest] times the allowed ranks.

    Raises
    ------
    ConfigError
        No rank, ranks that are not ascending and positive, or a largest ratio outside (0, 1).
    """

    largest: float
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < self.largest < 1:
            raise ConfigError(f"the largest ratio of a round is {self.largest}; it must be above 0 and below 1")
        if not self.ranks or self.ranks[0] < 1 or list(self.ranks) != sorted(set(self.ranks)):
            raise ConfigError(f"the allowed ranks are {list(self.ranks)}; they must be ascending, at least 1 each")

    def rescale(self, arms: Sequence[Arm]) -> Floats:
        """Return arms as points of [0, 1]^2, (n, 2): ratio over the largest, place of the rank among the allowed."""
        places = {rank: place / max(len(self.ranks) - 1, 1) for place, rank in enumerate(self.ranks)}
        return np.array([(arm.ratio / self.largest, places[arm.rank]) for arm in arms]).reshape(-1, 2)


@dataclass(frozen=True)
class Box:
    """A leaf: ratios in [low, high), closed at the space's end, times the ranks at the places [first, last)."""

    low: float
    high: float
    first: int
    last: int


@dataclass(frozen=True)
class Pull:
    """An arm as it was really played, and what it gave."""

    arm: Arm
    reward: float


@dataclass
class BanditConfig:
    """S-UCB. All defaults are ours, tuned on ``python -m benchmarks bandit``."""

    exploration: float = setting(0.2, "weight of the confidence width, in units of reward", low=0.0)
    reach: float = setting(0.5, "distance, on axes of length 1, over which neighbours share evidence", low=1e-3)
    noise: float = setting(0.2, "variance of one reward over the variance of the mean reward across arms", low=1e-6)
    discount: float = setting(1.0, "weight of a pull by that of the next one", low=0.01, high=1.0)
    alarm: float = setting(6.0, "shortfall of rewards that empties the memory, standard deviations; 0 for never", low=0)
    resolution: float = setting(0.13, "a leaf is split until no side is longer, on axes of length 1", low=0.01)
    play: str = setting("centre", "the point of a leaf that is played", choices=("centre", "uniform"))


def quadrants(space: Space) -> list[Box]:
    """Return the first leaves: halves of the ratios times halves of the ranks; one rank: quarters of the ratios."""
    if len(space.ranks) == 1:
        edges, rows = [space.largest * part / 4 for part in range(4)] + [space.largest], [(0, 1)]
    else:
        middle = (len(space.ranks) + 1) // 2
        edges, rows = [0.0, space.largest / 2, space.largest], [(0, middle), (middle, len(space.ranks))]
    return [Box(low, high, *row) for low, high in itertools.pairwise(edges) for row in rows]


def leaf_of(space: Space, leaves: Sequence[Box], arm: Arm) -> int:
    """Return the index of the one leaf that holds an arm."""
    place = space.ranks.index(arm.rank)
    ratio = min(arm.ratio, np.nextafter(space.largest, 0.0))  # the outermost boxes are closed
    return next(
        index for index, leaf in enumerate(leaves) if leaf.low <= ratio < leaf.high and leaf.first <= place < leaf.last
    )


def split(space: Space, box: Box, resolution: float) -> tuple[Box, Box] | None:
    """Return the halves of a box along its longest side; None where no side is longer than the resolution."""
    wide = (box.high - box.low) / space.largest
    tall = (box.last - box.first) / len(space.ranks) if box.last - box.first > 1 else 0.0
    if max(wide, tall) <= resolution:
        return None
    if wide >= tall:
        middle = (box.low + box.high) / 2
        return Box(box.low, middle, box.first, box.last), Box(middle, box.high, box.first, box.last)
    place = (box.first + box.last + 1) // 2
    return Box(box.low, box.high, box.first, place), Box(box.low, box.high, place, box.last)


def _spare(history: Sequence[Pull]) -> int:
    """Return the oldest pull of the arm pulled most often: an arm tried once is not forgotten for it."""
    often = Counter(pull.arm for pull in history).most_common(1)[0][0]
    return next(index for index, pull in enumerate(history) if pull.arm == often)


@dataclass
class Agent:
    """The bandit of one device. Everything it knows is in its record.

    Attributes
    ----------
    leaves
        Boxes that never overlap and cover the space.
    cold
        Quadrants that are still to be pulled once.
    history
        The pulls since the last alarm, in the order they were learned; beyond :data:`MEMORY` the oldest of the arm
        pulled most often goes.
    shortfall
        Page's sum: by how many standard deviations the latest rewards fell short of their prediction.
    """

    config: BanditConfig
    space: Space
    leaves: list[Box] = field(default_factory=list)
    cold: list[int] = field(default_factory=list)
    history: list[Pull] = field(default_factory=list)
    shortfall: float = 0.0

    def __post_init__(self) -> None:
        if not self.leaves:
            self.leaves = quadrants(self.space)
            self.cold = list(range(len(self.leaves)))

    def choose(self, rng: np.random.Generator, floor: float = 0.0, cap: float | None = None) -> Arm:
        """Return the arm for the next round.

        While quadrants are left that were never pulled, one of them that the bounds allow, drawn at random: a fleet
        whose devices all begin in the same one would see no difference among them. Ties go to the lowest leaf.

        Parameters
        ----------
        rng
            Draws among unpulled quadrants, and points of leaves with ``play="uniform"``.
        floor, cap
            Bounds on the ratio in this round; both 0 when the device is done pruning, and only the rank is free.
        """
        cap = self.space.largest if cap is None else cap
        if not 0 <= floor <= cap <= self.space.largest:
            raise ValueError(f"bounds [{floor}, {cap}] are not within [0, {self.space.largest}]")
        new = [box for box in self._unpulled() if box.low <= cap and floor <= box.high]
        if new:
            return self._point(new[int(rng.integers(len(new)))], floor, cap, rng)
        points = [self._point(leaf, floor, cap, rng) for leaf in self.leaves]
        if not self.history:
            return points[int(rng.integers(len(points)))]
        mean, width = self.predict(points)
        return points[int(np.argmax(mean + self.config.exploration * width))]

    def learn(self, arm: Arm, reward: float) -> None:
        """Take in what was really played, which may differ from what was chosen, and what it gave, in [0, 1]."""
        if self.config.alarm > 0:
            self.shortfall = max(0.0, self.shortfall - self._surprise(arm, reward) - _SLACK)
        self.history = [*self.history, Pull(arm, reward)]
        if len(self.history) > MEMORY:
            self.history.pop(_spare(self.history))
        if self.shortfall > self.config.alarm > 0:
            self.history, self.shortfall = self.history[-_RECENT:], 0.0
        self.cold = [index for index in self.cold if index != leaf_of(self.space, quadrants(self.space), arm)]
        index = leaf_of(self.space, self.leaves, arm)
        leaf = self.leaves[index]
        if halves := split(self.space, leaf, self.config.resolution):
            self.leaves[index : index + 1] = halves

    def predict(self, points: Sequence[Arm]) -> tuple[Floats, Floats]:
        """Return mean and width of the reward at some arms, each (n,), from a history that is not empty.

        Costs O(d^3 + n d^2) with d the number of different arms in the history.
        """
        arms, count, mean = self.evidence()
        known, asked = self.space.rescale(arms), self.space.rescale(points)
        shared = self._kernel(known, asked)
        matrix = self._kernel(known, known) + np.diag(self.config.noise / count)
        solved = np.linalg.solve(matrix, np.column_stack([shared, mean, np.ones(len(arms))]))
        overall = solved[:, -2].sum() / solved[:, -1].sum()
        variance = 1 - np.einsum("dn,dn->n", shared, solved[:, :-2])
        return overall + shared.T @ (solved[:, -2] - overall * solved[:, -1]), np.sqrt(np.maximum(variance, 0.0))

    def evidence(self) -> tuple[list[Arm], Floats, Floats]:
        """Return the different arms pulled, their discounted counts N and their discounted mean rewards R."""
        weights = self.config.discount ** np.arange(len(self.history) - 1, -1, -1, dtype=np.float64)
        places: dict[Arm, int] = {}
        index = [places.setdefault(pull.arm, len(places)) for pull in self.history]
        count = np.bincount(index, weights).astype(np.float64)
        total = np.bincount(index, weights * np.array([pull.reward for pull in self.history]))
        return list(places), count, total / count

    def to_record(self) -> dict[str, Any]:
        """Return plain JSON values; the settings and the space are the caller's to keep."""
        return {
            "leaves": [[box.low, box.high, box.first, box.last] for box in self.leaves],
            "cold": list(self.cold),
            "history": [[pull.arm.ratio, pull.arm.rank, pull.reward] for pull in self.history],
            "shortfall": self.shortfall,
        }

    @classmethod
    def from_record(cls, config: BanditConfig, space: Space, record: Mapping[str, Any]) -> Agent:
        """Return the agent of a record, equal to the bit to the one that wrote it."""
        return cls(
            config,
            space,
            [Box(*leaf) for leaf in record["leaves"]],
            list(record["cold"]),
            [Pull(Arm(ratio, rank), reward) for ratio, rank, reward in record["history"]],
            record["shortfall"],
        )

    def _surprise(self, arm: Arm, reward: float) -> float:
        """Return reward minus prediction in standard deviations, never below -3; 0 while little is known."""
        if len(self.history) <= _RECENT:
            return 0.0
        mean, width = self.predict([arm, *(pull.arm for pull in self.history)])
        errors = np.array([pull.reward for pull in self.history]) - mean[1:]
        variance = (float(errors @ errors) + _NOISE_PULLS * _NOISE**2) / (len(errors) + _NOISE_PULLS)
        deviation = np.sqrt(variance + np.square(self.config.exploration * width[0]))
        return max(float((reward - mean[0]) / deviation), -_OUTLIER)

    def _unpulled(self) -> list[Box]:
        every = quadrants(self.space)
        return [every[index] for index in self.cold]

    def _point(self, box: Box, floor: float, cap: float, rng: np.random.Generator) -> Arm:
        low, high = (min(max(edge, floor), cap) for edge in (box.low, box.high))
        if self.config.play == "uniform":
            return Arm(float(rng.uniform(low, high)), self.space.ranks[int(rng.integers(box.first, box.last))])
        return Arm((low + high) / 2, self.space.ranks[(box.first + box.last - 1) // 2])

    def _kernel(self, ones: Floats, others: Floats) -> Floats:
        square = np.square(ones[:, None] - others[None]).sum(axis=-1)
        return np.asarray(np.exp(square / (-2 * self.config.reach**2)))
