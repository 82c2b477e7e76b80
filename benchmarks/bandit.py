"""FedSpine's bandit: mean regret against river, PyXAB and simple rules, stationary and with a change half-way.

Every policy plays the same games (:mod:`benchmarks.bandit_surfaces`) with one value of its main parameter for all of
them, chosen on other seeds from as many values as ours (:mod:`benchmarks.bandit_policies`). Regret is against the best
arm of each step, a step's mean over the horizon. The best fixed arm and the best fixed rank (at half the largest ratio)
are known in hindsight only; without a change, the best fixed arm has no regret by definition.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bandit_policies import ABLATIONS, GRIDS, MAKERS, OURS, PYXAB, RIVER, TUNED, Ours, Policy, Random, play
from benchmarks.bandit_surfaces import Game, make_game
from benchmarks.harness import Benchmark, Case, Column, Results, Target
from fl_edge.fedspine.bandit import Arm

KINDS, HORIZONS, POINTS = ("device", "2-D", "1-D"), (100, 300), 25
FIXED_ARM, FIXED_RANK, RANDOM = "best fixed arm", "best fixed rank", "random"
GAMES = [(kind, changes, horizon) for horizon in HORIZONS for kind in KINDS for changes in (False, True)]


def game_name(kind: str, changes: bool, horizon: int) -> str:
    """Return what tables call a game."""
    return f"{kind} {'change' if changes else 'stationary'} {horizon}"


class Fixed:
    """Always the same arm, the best one in hindsight among those offered."""

    def __init__(self, game: Game, arms: Sequence[Arm]) -> None:
        steps = range(0, game.horizon, max(game.horizon // 10, 1))
        self.arm = max(arms, key=lambda arm: sum(game.mean(step, arm) for step in steps))

    def choose(self) -> Arm:
        """Return it."""
        return self.arm

    def learn(self, arm: Arm, reward: float) -> None:
        """Learn nothing."""


def make_policy(case: str, game: Game) -> Policy:
    """Return a fresh policy for a game."""
    space = game.space
    if case == RANDOM:
        return Random(space, game.seed)
    if case == FIXED_ARM:
        return Fixed(game, game.grid())
    if case == FIXED_RANK:
        return Fixed(game, [Arm(space.largest / 2, rank) for rank in space.ranks])
    if case in ABLATIONS:
        return Ours(space, game.seed, **ABLATIONS[case])
    return MAKERS[case](space, game.seed, TUNED[case])


def measure(case: str, seed: int, quick: bool) -> Mapping[str, Any]:
    """Play all games of a seed with one policy."""
    values: dict[str, Any] = {}
    curves: dict[str, str] = {}  # numbers as text: one line of the record, not one each
    spent, steps = 0.0, 0
    for kind, changes, horizon in GAMES:
        if quick and horizon > HORIZONS[0]:
            continue
        game, name = make_game(kind, changes, horizon, seed), game_name(kind, changes, horizon)
        for arm in game.grid():  # means known beforehand: the time below is the policy's
            game.outcomes(0, arm)
        policy = make_policy(case, game)
        arms, regrets, seconds = timed_play(game, policy)
        spent, steps = spent + seconds, steps + horizon
        values[name] = float(np.mean(regrets))
        curves[name] = " ".join(
            f"{each:.4f}" for each in np.cumsum(regrets)[horizon // POINTS - 1 :: horizon // POINTS]
        )
        if case == OURS and kind == "device":
            values[f"plays {name}"] = " ".join(f"{arm.ratio:.5f}:{arm.rank}" for arm in arms)
    return {**values, "curves": curves, "decision_ms": 1000 * spent / steps}


def timed_play(game: Game, policy: Policy) -> tuple[list[Arm], list[float], float]:
    """Return arms, regrets, and the CPU seconds that choosing and learning took."""

    class Timed:
        seconds = 0.0

        def choose(self) -> Arm:
            started = time.process_time()
            arm = policy.choose()
            self.seconds += time.process_time() - started
            return arm

        def learn(self, arm: Arm, reward: float) -> None:
            started = time.process_time()
            policy.learn(arm, reward)
            self.seconds += time.process_time() - started

    timed = Timed()
    arms, regrets = play(game, timed)
    return arms, regrets, timed.seconds


def prepare(seeds: Sequence[int], quick: bool) -> None:  # noqa: ARG001
    """One BLAS thread: a second one does not help matrices of this size."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)


def targets(results: Results) -> list[Target]:
    """Return the mean regret of ours over each library's, game by game."""
    return [
        Target.at_most(f"{name}: mean regret of ours / {peer}", results.ratio(OURS, peer, name), 1.0)
        for name in (game_name(*game) for game in GAMES)
        if results.center(OURS, name) is not None
        for peer in (RIVER, PYXAB)
    ]


def figure(results: Results, path: Path) -> None:
    """Draw cumulative regret of every game of the longest horizon played, and where ours plays over time."""
    from matplotlib.figure import Figure

    horizon = max(game[2] for game in GAMES if results.center(OURS, game_name(*game)) is not None)
    drawing = Figure(figsize=(12, 10), layout="constrained")
    panels = drawing.subplots(3, 3)
    colors = {OURS: "tab:orange", RIVER: "tab:blue", PYXAB: "tab:green", "E-UCB": "tab:purple"}
    colors |= {"sliding-window UCB": "tab:cyan", FIXED_ARM: "black", FIXED_RANK: "tab:gray"}
    for column, kind in enumerate(KINDS):
        for row, changes in enumerate((False, True)):
            axes, name = panels[row][column], game_name(kind, changes, horizon)
            for case, color in colors.items():
                curves = [np.array(values[name].split(), float) for values in results.values(case, "curves")]
                if curves:
                    _band(axes, np.array(curves), horizon, case, color)
            axes.set_title(name, fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("cumulative regret: mean, quartiles")
    panels[1][0].set_ylabel("cumulative regret: mean, quartiles")
    panels[0][0].legend(fontsize=7)
    _draw_plays(panels[2][0], results, game_name("device", False, horizon), 0)
    _draw_plays(panels[2][1], results, game_name("device", True, horizon), 0)
    _draw_plays(panels[2][2], results, game_name("device", True, horizon), 1)
    drawing.supxlabel("round")
    drawing.savefig(path, dpi=130)


def _band(axes: Any, curves: Any, horizon: int, case: str, color: str) -> None:
    rounds = np.linspace(horizon / curves.shape[1], horizon, curves.shape[1])
    low, high = np.quantile(curves, (0.25, 0.75), axis=0)
    axes.fill_between(rounds, low, high, color=color, alpha=0.12, linewidth=0)
    axes.plot(rounds, curves.mean(axis=0), color=color, label=case, linewidth=2 if case == OURS else 1.2)


def _draw_plays(axes: Any, results: Results, name: str, index: int) -> None:
    """Draw what ours played with one seed: ratio over rounds, rank as colour."""
    every = results.values(OURS, f"plays {name}")
    plays = np.array([arm.split(":") for arm in every[min(index, len(every) - 1)].split()], dtype=float)
    points = axes.scatter(np.arange(1, len(plays) + 1), plays[:, 0], c=plays[:, 1], s=8, cmap="viridis")
    axes.figure.colorbar(points, ax=axes, label="rank")
    axes.set_ylabel("ratio")
    axes.set_title(f"plays of ours, {name}, {('first', 'second')[index]} seed", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


BENCHMARK = Benchmark(
    cases=[
        Case(OURS),
        Case(RIVER, needs=("river",)),
        Case(PYXAB, needs=("PyXAB",)),
        *(Case(name) for name in MAKERS if name not in (OURS, RIVER, PYXAB)),
        *(Case(name) for name in (FIXED_ARM, FIXED_RANK, RANDOM, *ABLATIONS)),
    ],
    columns={
        **{game_name(*game): Column(game_name(*game), digits=4) for game in GAMES},
        "decision_ms": Column("CPU of a decision", "real_ms", 2),
    },
    measure=measure,
    targets=targets,
    figure=figure,
    prepare=prepare,
    seeds=tuple(range(20)),
    quick_seeds=(0, 1, 2, 3, 4),
    settings={"tuned": TUNED, "grids": GRIDS, "ablations": ABLATIONS},
    packages=("river", "PyXAB"),
)
