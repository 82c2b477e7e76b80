"""The policies that :mod:`benchmarks.bandit` compares, behind one interface: ours, libraries, and rules of a few lines.

Every policy has one main parameter with :data:`GRIDS` of equal size. ``python -m benchmarks.bandit_policies`` plays
each value on seeds that the benchmark does not report, prints the mean regret over all games, and the best one is what
:data:`TUNED` holds. Second parameters were looked at beforehand: reach, noise, resolution and alarm of ours; HCT's nu
(0.1, 0.3, 1; 0.3 did best); river's grid of arms (4 ratios by 3 ranks did best, 8 ratios where there is one rank).
Discounts and windows of the others are the customary ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from benchmarks.bandit_surfaces import Game, make_game
from fl_edge.fedspine.bandit import Agent, Arm, BanditConfig, Box, Space, leaf_of, quadrants, split
from fl_edge.seeding import derive_seed, numpy_rng


class Policy(Protocol):
    """Something that plays arms and learns from rewards."""

    def choose(self) -> Arm:
        """Return the arm to play."""

    def learn(self, arm: Arm, reward: float) -> None:
        """Take in the reward of the arm chosen last."""


def lattice(space: Space) -> list[Arm]:
    """Return the arms of the policies that need a finite number of them."""
    if len(space.ranks) == 1:
        return [Arm(space.largest * (part + 0.5) / 8, space.ranks[0]) for part in range(8)]
    ranks = [space.ranks[place] for place in (0, len(space.ranks) // 2, len(space.ranks) - 1)]
    return [Arm(space.largest * (part + 0.5) / 4, rank) for part in range(4) for rank in ranks]


class Ours:
    """S-UCB as FedSpine runs it; some settings replaced."""

    def __init__(self, space: Space, seed: int, **changes: float | str) -> None:
        self.agent = Agent(replace(BanditConfig(), **changes), space)  # type: ignore[arg-type]
        self.rng = numpy_rng(seed, "bench", "ours")

    def choose(self) -> Arm:
        """Ask the agent."""
        return self.agent.choose(self.rng)

    def learn(self, arm: Arm, reward: float) -> None:
        """Tell the agent."""
        self.agent.learn(arm, reward)


class EUCB:
    """E-UCB as the specification has it (4.7): evidence of a leaf is its own, uniform play, midpoint split."""

    def __init__(self, space: Space, seed: int, exploration: float, discount: float = 0.98, side: float = 0.26) -> None:
        self.space, self.exploration, self.discount, self.side = space, exploration, discount, side
        self.leaves: list[Box] = quadrants(space)
        self.history: list[Arm] = []
        self.rewards: list[float] = []
        self.holders = np.zeros(0, dtype=np.int64)  # the leaf of every arm played
        self.rng = numpy_rng(seed, "bench", "eucb")

    def choose(self) -> Arm:
        """Play a random point of the leaf of the highest bound."""
        weights = self.discount ** np.arange(len(self.history) - 1, -1, -1, dtype=np.float64)
        count = np.bincount(self.holders, weights, minlength=len(self.leaves))
        total = np.bincount(self.holders, weights * self.rewards, minlength=len(self.leaves))
        pulled = np.maximum(count, 1e-12)
        width = self.exploration * np.sqrt(2 * np.log(max(float(count.sum()), 1.0)) / pulled)
        box = self.leaves[int(np.argmax(np.where(count > 0, total / pulled + width, np.inf)))]
        rank = self.space.ranks[int(self.rng.integers(box.first, box.last))]
        return Arm(float(self.rng.uniform(box.low, box.high)), rank)

    def learn(self, arm: Arm, reward: float) -> None:
        """Remember, and split the leaf that was played."""
        index = leaf_of(self.space, self.leaves, arm)
        self.history.append(arm)
        self.rewards.append(reward)
        self.holders = np.append(self.holders, index)
        if halves := split(self.space, self.leaves[index], self.side):
            self.leaves[index : index + 1] = halves
            self.holders[self.holders > index] += 1
            for place in np.flatnonzero(self.holders == index):
                self.holders[place] = index + leaf_of(self.space, halves, self.history[place])


class LatticeUCB:
    """Discounted or sliding-window UCB1 (Garivier and Moulines) on the lattice."""

    def __init__(self, space: Space, seed: int, exploration: float, discount: float = 1.0, window: int = 10**9) -> None:
        self.arms, self.exploration, self.discount, self.window = lattice(space), exploration, discount, window
        self.played: list[int] = []
        self.rewards: list[float] = []
        self.first = numpy_rng(seed, "bench", "lattice").permutation(len(self.arms))

    def choose(self) -> Arm:
        """Play the arm of the highest bound; those without evidence first."""
        played = np.array(self.played[-self.window :], dtype=np.int64)
        weights = self.discount ** np.arange(len(played) - 1, -1, -1, dtype=np.float64)
        count = np.bincount(played, weights, minlength=len(self.arms))
        total = np.bincount(played, weights * self.rewards[-self.window :], minlength=len(self.arms))
        pulled = np.maximum(count, 1e-12)
        width = self.exploration * np.sqrt(2 * np.log(max(float(count.sum()), 1.0)) / pulled)
        bound = np.where(count > 0, total / pulled + width, np.inf)[self.first]
        return self.arms[int(self.first[int(np.argmax(bound))])]

    def learn(self, arm: Arm, reward: float) -> None:
        """Remember."""
        self.played.append(self.arms.index(arm))
        self.rewards.append(reward)


class River:
    """river's UCB on the lattice."""

    def __init__(self, space: Space, seed: int, delta: float) -> None:
        from river import bandit

        self.arms = lattice(space)
        self.policy = bandit.UCB(delta=delta, seed=derive_seed(seed, "bench", "river"))

    def choose(self) -> Arm:
        """Pull."""
        return self.arms[int(self.policy.pull(range(len(self.arms))))]

    def learn(self, arm: Arm, reward: float) -> None:
        """Update."""
        self.policy.update(self.arms.index(arm), reward)


class HCT:
    """PyXAB's HCT on the box; a rank is the one whose share of the second axis the point lies in."""

    def __init__(self, space: Space, seed: int, c: float, nu: float = 0.3) -> None:
        from PyXAB.algos import HCT as library  # noqa: N811 - a module

        np.random.seed(derive_seed(seed, "bench", "hct") % 2**32)  # noqa: NPY002 - PyXAB draws from the global generator
        self.space, self.step = space, 0
        axes = [[0, space.largest]] + ([[0, 1]] if len(space.ranks) > 1 else [])
        self.search = library.HCT(nu=nu, rho=0.5, c=c, domain=axes)

    def choose(self) -> Arm:
        """Pull."""
        self.step += 1
        point = self.search.pull(self.step)
        place = int(point[1] * len(self.space.ranks)) if len(point) > 1 else 0
        return Arm(float(point[0]), self.space.ranks[min(place, len(self.space.ranks) - 1)])

    def learn(self, arm: Arm, reward: float) -> None:  # noqa: ARG002 - it knows what it played
        """Receive."""
        self.search.receive_reward(self.step, reward)


class Random:
    """Any arm of the space."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.rng = space, numpy_rng(seed, "bench", "random")

    def choose(self) -> Arm:
        """Draw."""
        ratio = float(self.rng.uniform(0, self.space.largest))
        return Arm(ratio, self.space.ranks[int(self.rng.integers(len(self.space.ranks)))])

    def learn(self, arm: Arm, reward: float) -> None:
        """Learn nothing."""


OURS, RIVER, PYXAB = "ours", "river UCB", "PyXAB HCT"
Maker = Callable[[Space, int, float], Policy]
MAKERS: dict[str, Maker] = {
    OURS: lambda space, seed, value: Ours(space, seed, exploration=value),
    RIVER: River,
    PYXAB: HCT,
    "E-UCB": EUCB,
    "discounted UCB": lambda space, seed, value: LatticeUCB(space, seed, value, discount=0.97),
    "sliding-window UCB": lambda space, seed, value: LatticeUCB(space, seed, value, window=60),
}
ABLATIONS: dict[str, dict[str, float | str]] = {
    "ours, no alarm": {"alarm": 0.0},
    "ours, discount 0.97 for alarm": {"alarm": 0.0, "discount": 0.97},
    "ours, not smooth": {"reach": 0.02},
    "ours, uniform play": {"play": "uniform"},
}
GRIDS: dict[str, tuple[float, ...]] = {
    OURS: (0.05, 0.1, 0.15, 0.2, 0.3, 0.4),
    RIVER: (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    PYXAB: (0.01, 0.03, 0.06, 0.1, 0.2, 0.4),
    "E-UCB": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "discounted UCB": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "sliding-window UCB": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
}
TUNED: dict[str, float] = {
    OURS: BanditConfig().exploration,
    RIVER: 0.03,
    PYXAB: 0.03,
    "E-UCB": 0.003,
    "discounted UCB": 0.01,
    "sliding-window UCB": 0.01,
}


def play(game: Game, policy: Policy) -> tuple[list[Arm], list[float]]:
    """Return what a policy played, and the regret of each step against the best arm of that step."""
    arms, regrets = [], []
    best = game.table.max(axis=1)
    for step in range(game.horizon):
        arm = policy.choose()
        policy.learn(arm, game.reward(step, arm))
        arms.append(arm)
        regrets.append(float(best[step]) - game.mean(step, arm))
    return arms, regrets


def tune(seeds: range = range(1000, 1010)) -> None:
    """Print the mean regret of every policy and value over all games of some seeds."""
    kinds = [(kind, changes) for kind in ("device", "2-D", "1-D") for changes in (False, True)]
    games = [make_game(kind, changes, 100, seed) for kind, changes in kinds for seed in seeds]
    for name, values in GRIDS.items():
        found = [
            np.mean([np.mean(play(game, MAKERS[name](game.space, game.seed, v))[1]) for game in games]) for v in values
        ]
        print(f"{name:20}", "  ".join(f"{v:g}: {mean:.4f}" for v, mean in zip(values, found, strict=True)), flush=True)


if __name__ == "__main__":
    tune()
