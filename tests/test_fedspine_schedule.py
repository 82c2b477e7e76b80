"""The pruning schedule: every device ends at the target, whatever its bandit chooses within the bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_edge.config import check
from fl_edge.fedspine.schedule import (
    ScheduleConfig,
    cubic_sparsity,
    deadline_round,
    next_sparsity,
    one_shot_sparsity,
    ratio_bounds,
    shortfall,
)

readings = st.sampled_from(["increment", "fraction"])


@given(
    target=st.floats(0.01, 0.95),
    largest=st.floats(0.02, 0.9),
    warmup=st.integers(0, 5),
    rounds=st.integers(5, 40),
    reading=readings,
    shares=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=1, max_size=7),
)
def test_every_choice_within_the_bounds_ends_exactly_at_the_target_in_time(
    target: float, largest: float, warmup: int, rounds: int, reading: str, shares: list[float]
) -> None:
    config = ScheduleConfig(target, largest, 0.6, warmup, reading)
    reachable, sparsity = shortfall(config, rounds) is None, 0.0
    for server_round in range(1, rounds + 1):
        least, most = ratio_bounds(config, sparsity, server_round, rounds)
        assert 0 <= least <= most <= largest
        if server_round <= warmup:
            assert most == 0
        share = shares[server_round % len(shares)]
        grown = next_sparsity(config, sparsity, least + share * (most - least))
        assert sparsity <= grown <= target
        sparsity = grown
        if reachable and server_round >= deadline_round(config, rounds):
            assert sparsity == target
            assert ratio_bounds(config, sparsity, server_round + 1, rounds) == (0, 0)
    assert sparsity == target or not reachable


@given(reading=readings, missed=st.sets(st.integers(1, 12)), eager=st.booleans())
def test_missed_rounds_raise_the_floor_up_to_the_largest_ratio(reading: str, missed: set[int], eager: bool) -> None:
    config, rounds, sparsity = ScheduleConfig(reading=reading), 20, 0.0
    for server_round in range(1, rounds + 1):
        if server_round in missed:
            continue
        least, most = ratio_bounds(config, sparsity, server_round, rounds)
        if server_round >= deadline_round(config, rounds):
            assert least == most  # too late to choose
            assert most == config.largest or next_sparsity(config, sparsity, most) == config.target
        sparsity = next_sparsity(config, sparsity, most if eager else least)
        if server_round == deadline_round(config, rounds) and (not missed or (eager and len(missed) <= 4)):
            assert sparsity == config.target
    assert sparsity == config.target  # 8 rounds of p_max behind T_prune are enough, in either reading


def test_a_device_that_comes_too_late_goes_on_at_the_largest_ratio_to_the_end() -> None:
    config, sparsity = ScheduleConfig(target=0.5, largest=0.1), 0.0
    for server_round in (18, 19, 20):
        assert ratio_bounds(config, sparsity, server_round, 20) == (0.1, 0.1)
        sparsity = next_sparsity(config, sparsity, 0.1)
    assert sparsity == pytest.approx(0.3)


def test_the_floor_is_what_the_rounds_left_cannot_do() -> None:
    config = ScheduleConfig(target=0.5, largest=0.1, deadline=0.6, warmup_rounds=1)
    assert deadline_round(config, 20) == 12
    assert ratio_bounds(config, 0.1, 8, 20) == (0.0, 0.1)
    assert ratio_bounds(config, 0.15, 10, 20) == (0.1, 0.1)
    assert ratio_bounds(config, 0.25, 10, 20) == pytest.approx((0.05, 0.1))
    assert ratio_bounds(config, 0.47, 3, 20) == pytest.approx((0.0, 0.03))


@given(sparsity=st.floats(0, 1), ratio=st.floats(0, 0.5), reading=readings)
def test_sparsity_never_falls(sparsity: float, ratio: float, reading: str) -> None:
    config = ScheduleConfig(reading=reading)
    assert next_sparsity(config, sparsity, ratio) >= sparsity
    assert next_sparsity(config, sparsity, ratio) <= max(sparsity, config.target)


def test_the_two_readings_differ() -> None:
    assert next_sparsity(ScheduleConfig(), 0.2, 0.1) == pytest.approx(0.3)
    assert next_sparsity(ScheduleConfig(reading="fraction"), 0.2, 0.1) == pytest.approx(0.28)


def test_a_target_out_of_reach_is_named() -> None:
    assert shortfall(ScheduleConfig(), 20) is None
    line = shortfall(ScheduleConfig(), 8)
    assert line
    assert "8 rounds" in line
    check(ScheduleConfig())


@given(target=st.floats(0.1, 0.9), rounds=st.integers(2, 200))
def test_the_baselines_schedules_grow_to_the_target(target: float, rounds: int) -> None:
    cubic = [cubic_sparsity(server_round, rounds, target) for server_round in range(1, rounds + 1)]
    assert cubic == sorted(cubic)
    assert cubic[-1] == target
    assert cubic_sparsity(0, rounds, target) == 0
    assert [one_shot_sparsity(server_round, target, 2) for server_round in (1, 2, 3)] == [0, target, target]


def test_the_cubic_schedule_is_steep_first() -> None:
    assert cubic_sparsity(50, 100, 0.5) == pytest.approx(0.5 * (1 - 0.5**3))
    assert cubic_sparsity(10, 100, 0.5) == 0
    assert cubic_sparsity(90, 100, 0.5) == 0.5
