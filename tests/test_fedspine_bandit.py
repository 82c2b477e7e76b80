"""S-UCB: its partition stays a partition, it finds the optimum, and it remembers to the bit what it must."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.config import check
from fl_edge.errors import ConfigError
from fl_edge.fedspine.bandit import MEMORY, Agent, Arm, BanditConfig, Box, Pull, Space, leaf_of, quadrants, split

RANKS = (4, 8, 12, 16, 24, 32)
SPACE = Space(0.1, RANKS)
seeds = st.integers(0, 2**32 - 1)
rank_sets = st.lists(st.integers(1, 64), min_size=1, max_size=8, unique=True).map(lambda found: tuple(sorted(found)))


def make_agent(space: Space = SPACE, **changes: Any) -> Agent:
    return Agent(replace(BanditConfig(), **changes), space)


def concave(arm: Arm, ratio: float = 0.07, rank: int = 12) -> float:
    across = (arm.ratio - ratio) / 0.1, (RANKS.index(arm.rank) - RANKS.index(rank)) / 5
    return 0.8 - 0.6 * float(np.mean(np.square(across)))


def run(agent: Agent, seed: int, rounds: int, reward: Callable[[Arm, int], float], noise: float = 0.1) -> list[Arm]:
    arms = []
    for step in range(rounds):
        arms.append(agent.choose(np.random.default_rng([seed, step])))
        drawn = float(np.random.default_rng([seed, step, 1]).uniform(-1, 1)) * noise * 3**0.5
        agent.learn(arms[-1], reward(arms[-1], step) + drawn)
    return arms


def assert_partition(space: Space, leaves: list[Box]) -> None:
    """Check that every pair of a ratio and a rank lies in exactly one leaf."""
    edges = sorted({edge for leaf in leaves for edge in (leaf.low, leaf.high)})
    assert (edges[0], edges[-1]) == (0, space.largest)
    inside = [*edges[:-1], *((low + high) / 2 for low, high in itertools.pairwise(edges))]
    for place, rank in enumerate(space.ranks):
        for ratio in inside:
            holders = [leaf for leaf in leaves if leaf.low <= ratio < leaf.high and leaf.first <= place < leaf.last]
            assert len(holders) == 1
            assert leaves[leaf_of(space, leaves, Arm(ratio, rank))] == holders[0]
        assert leaves[leaf_of(space, leaves, Arm(space.largest, rank))].high == space.largest


@settings(max_examples=30, deadline=None)
@given(ranks=rank_sets, seed=seeds, resolution=st.floats(0.05, 1), play=st.sampled_from(["centre", "uniform"]))
def test_leaves_never_overlap_and_cover_the_space(
    ranks: tuple[int, ...], seed: int, resolution: float, play: str
) -> None:
    space, rng = Space(0.3, ranks), np.random.default_rng(seed)
    agent = make_agent(space, resolution=resolution, play=play)
    assert_partition(space, agent.leaves)
    for _ in range(25):
        floor = float(rng.uniform(0, 0.3)) if rng.random() < 0.5 else 0.0
        cap = float(rng.uniform(floor, 0.3)) if rng.random() < 0.5 else 0.3
        arm = agent.choose(rng, floor, cap)
        assert floor <= arm.ratio <= cap
        assert arm.rank in ranks
        agent.learn(Arm(float(rng.uniform(0, 0.3)), arm.rank) if rng.random() < 0.3 else arm, float(rng.random()))
    assert_partition(space, agent.leaves)


def test_leaves_are_split_until_the_resolution_and_no_further() -> None:
    agent = make_agent(resolution=0.26, alarm=0.0)
    run(agent, 0, 150, lambda arm, _: concave(arm))
    assert len(agent.leaves) > 4
    for leaf in agent.leaves:
        assert leaf.high - leaf.low >= 0.1 / 4 - 1e-12  # a side of half the space is split, one of a quarter is not
    assert split(SPACE, Box(0.0, 0.025, 2, 3), 0.26) is None
    assert split(SPACE, Box(0.0, 0.05, 2, 3), 0.26) == (Box(0.0, 0.025, 2, 3), Box(0.025, 0.05, 2, 3))
    assert split(SPACE, Box(0.0, 0.025, 0, 3), 0.26) == (Box(0.0, 0.025, 0, 2), Box(0.0, 0.025, 2, 3))


@pytest.mark.parametrize("ranks", [RANKS, (8,), (4, 8, 16)])
def test_each_quadrant_is_pulled_once_first(ranks: tuple[int, ...]) -> None:
    space = Space(0.1, ranks)
    first = quadrants(space)
    assert len(first) == 4
    starts = set()
    for seed in range(8):
        agent, order = make_agent(space), []
        for step in range(4):
            arm = agent.choose(np.random.default_rng([seed, step]))
            order.append(leaf_of(space, first, arm))
            agent.learn(arm, 0.5)
        assert sorted(order) == [0, 1, 2, 3]
        starts.add(order[0])
    assert len(starts) > 1  # a fleet does not begin in step


def test_a_quadrant_that_the_bounds_exclude_waits() -> None:
    agent, rng = make_agent(), np.random.default_rng(0)
    for step in range(3):
        arm = agent.choose(rng, 0.0, 0.0)
        assert arm.ratio == 0
        agent.learn(arm, 0.5)
        assert len(agent.cold) == max(4 - step - 1, 2)
    arm = agent.choose(rng)
    assert arm.ratio > 0.05
    agent.learn(arm, 0.5)
    assert len(agent.cold) == 1


def test_with_the_ratio_fixed_the_best_rank_is_found() -> None:
    agent, ranks = make_agent(), []
    for step in range(60):
        arm = agent.choose(np.random.default_rng(step), 0.0, 0.0)
        agent.learn(arm, 0.6 - 0.08 * abs(RANKS.index(arm.rank) - 4))
        ranks.append(arm.rank)
    assert Counter(ranks[-20:]).most_common(1)[0][0] == 24


@pytest.mark.parametrize(("ratio", "rank"), [(0.07, 12), (0.02, 32)])
def test_plays_gather_around_the_optimum(ratio: float, rank: int) -> None:
    def reward(arm: Arm, _: int) -> float:
        return concave(arm, ratio, rank)

    gaps = np.array([[0.8 - reward(arm, 0) for arm in run(make_agent(), seed, 150, reward)] for seed in range(8)])
    assert gaps[:, -50:].mean() < 0.03  # random play: 0.08 and 0.16
    assert (gaps[:, -50:].mean(axis=1) < gaps[:, :8].mean(axis=1)).all()


def test_neighbours_share_evidence_and_reach_says_how_far() -> None:
    for reach, near in ((0.5, 0.9), (0.01, 0.5)):
        agent = make_agent(reach=reach, noise=1e-3)
        for arm, reward in ((Arm(0.01, 4), 0.9), (Arm(0.09, 32), 0.1)):
            agent.learn(arm, reward)
        mean, width = agent.predict([Arm(0.012, 4), Arm(0.01, 4)])
        assert mean[0] == pytest.approx(near, abs=0.06)
        assert mean[1] == pytest.approx(0.9, abs=0.01)
        assert (width[0] < 0.2) == (reach == 0.5)


def test_prediction_is_that_of_a_gaussian_process() -> None:
    agent, rng = make_agent(alarm=0.0), np.random.default_rng(0)
    pulls = [Arm(float(rng.choice([0.01, 0.05, 0.09])), int(rng.choice(RANKS))) for _ in range(12)]
    values = rng.random(12)
    for arm, value in zip(pulls, values, strict=True):
        agent.learn(arm, float(value))
    asked = [Arm(0.03, 8), Arm(0.1, 32)]

    def kernel(ones: list[Arm], others: list[Arm]) -> Any:
        points = [np.array([(a.ratio / 0.1, RANKS.index(a.rank) / 5) for a in arms]) for arms in (ones, others)]
        return np.exp(-np.square(points[0][:, None] - points[1]).sum(-1) / (2 * agent.config.reach**2))

    # every pull for itself, though several are of one arm
    inverse = np.linalg.inv(kernel(pulls, pulls) + agent.config.noise * np.eye(12))
    level = inverse.sum(0) @ values / inverse.sum()
    cross = kernel(asked, pulls)
    mean, width = agent.predict(asked)
    np.testing.assert_allclose(mean, level + cross @ inverse @ (values - level), atol=1e-10)
    np.testing.assert_allclose(width, np.sqrt(1 - np.diag(cross @ inverse @ cross.T)), atol=1e-10)


def test_discount_forgets() -> None:
    means = []
    for discount in (1.0, 0.8):
        agent = make_agent(discount=discount, alarm=0.0)
        for reward in [0.2] * 20 + [0.8] * 5:
            agent.learn(Arm(0.05, 8), reward)
        arms, count, mean = agent.evidence()
        assert arms == [Arm(0.05, 8)]
        assert count[0] == pytest.approx(25 if discount == 1 else (1 - 0.8**25) / 0.2)
        means.append(mean[0])
    assert means[0] == pytest.approx(0.32)
    assert means[1] == pytest.approx(0.2 + 0.6 * (1 - 0.8**5) / (1 - 0.8**25))


def test_a_fall_of_the_rewards_empties_the_memory_and_noise_does_not() -> None:
    steady, fallen, silent = make_agent(), make_agent(), make_agent(alarm=0.0)
    for agent, later in ((steady, 0.6), (fallen, 0.2), (silent, 0.2)):
        for step in range(40):
            level = 0.6 if step < 30 else later
            agent.learn(Arm(0.05, 8), level + 0.05 * (-1) ** step)
    assert len(steady.history) == len(silent.history) == 40
    assert len(fallen.history) < 15
    assert max(pull.reward for pull in fallen.history[-8:]) < 0.3


def test_one_outlier_is_no_change() -> None:
    agent = make_agent()
    for step in range(30):
        agent.learn(Arm(0.05, 8), 0.0 if step == 20 else 0.6)
    assert len(agent.history) == 30


def test_after_a_change_it_finds_the_new_optimum() -> None:
    arms = run(make_agent(), 1, 240, lambda arm, step: concave(arm, *((0.02, 8) if step < 120 else (0.09, 32))))
    assert np.mean([0.8 - concave(arm, 0.09, 32) for arm in arms[-40:]]) < 0.04


def test_it_learns_from_what_was_really_played() -> None:
    agent = make_agent()
    agent.learn(Arm(0.031, 24), 0.4)
    assert agent.history == [Pull(Arm(0.031, 24), 0.4)]
    assert agent.cold == [0, 2, 3]
    assert leaf_of(SPACE, agent.leaves, Arm(0.031, 24)) != leaf_of(SPACE, agent.leaves, Arm(0.01, 24))


def test_memory_is_bounded_and_keeps_what_was_tried_once() -> None:
    agent, rare, common = make_agent(resolution=1.0), Arm(0.09, 32), Arm(0.05, 8)
    agent.learn(rare, 0.1)
    for step in range(MEMORY + 20):
        agent.learn(common, 0.5 + 1e-4 * step)
    assert len(agent.history) == MEMORY
    assert agent.history[0] == Pull(rare, 0.1)
    assert agent.history[1].reward == pytest.approx(0.5 + 1e-4 * 21)
    for step in range(2 * MEMORY):  # nothing is pulled twice: the oldest goes
        agent.learn(Arm(0.1 * step / (2 * MEMORY), 8), 0.5)
    assert len(agent.history) == MEMORY
    assert agent.history[-1].arm.ratio > 0.099


@pytest.mark.parametrize("play", ["centre", "uniform"])
@pytest.mark.parametrize("stop", [0, 2, 37])
def test_a_record_goes_on_to_the_bit(play: str, stop: int) -> None:
    whole = make_agent(play=play)
    arms = run(whole, 3, 60, lambda arm, _: concave(arm))
    first = make_agent(play=play)
    run(first, 3, stop, lambda arm, _: concave(arm))
    agent = Agent.from_record(first.config, SPACE, json.loads(json.dumps(first.to_record())))
    assert agent == first
    later = []
    for step in range(stop, 60):
        later.append(agent.choose(np.random.default_rng([3, step])))
        drawn = float(np.random.default_rng([3, step, 1]).uniform(-1, 1)) * 0.1 * 3**0.5
        agent.learn(later[-1], concave(later[-1]) + drawn)
    assert later == arms[stop:]
    assert json.dumps(agent.to_record()) == json.dumps(whole.to_record())


def test_a_record_keeps_a_shortfall_that_is_no_alarm_yet() -> None:
    agent = make_agent()
    for step in range(12):
        agent.learn(Arm(0.05, 8), 0.6 if step < 10 else 0.3)
    assert 0 < agent.shortfall < agent.config.alarm
    again = Agent.from_record(agent.config, SPACE, json.loads(json.dumps(agent.to_record())))
    assert again == agent


def test_ties_go_to_the_lowest_leaf() -> None:
    agent = make_agent()
    agent.cold = []
    agent.history = [Pull(Arm(0.05, 8), 0.5)]
    agent.leaves = [Box(0.0, 0.1, 0, 3), Box(0.0, 0.1, 3, 6)]
    agent.space = Space(0.1, RANKS)
    agent.config.exploration = 0.0
    assert agent.choose(np.random.default_rng(0)) == Arm(0.05, 8)


@pytest.mark.parametrize(
    ("largest", "ranks"), [(0.0, (4,)), (1.0, (4,)), (0.1, ()), (0.1, (0, 4)), (0.1, (8, 4)), (0.1, (4, 4))]
)
def test_a_space_that_cannot_be_is_refused(largest: float, ranks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Space(largest, ranks)


@pytest.mark.parametrize("bounds", [(-0.1, 0.1), (0.08, 0.05), (0.0, 0.2)])
def test_bounds_outside_the_space_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="bounds"):
        make_agent().choose(np.random.default_rng(0), *bounds)


def test_the_defaults_are_allowed() -> None:
    check(BanditConfig())
    with pytest.raises(ConfigError):
        check(BanditConfig(discount=0.0))
