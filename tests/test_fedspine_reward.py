"""Rewards stay in [0, 1] and rise with what is good, whatever the devices report."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_edge.config import check
from fl_edge.errors import ConfigError
from fl_edge.fedspine.reward import (
    RewardConfig,
    loss_drop,
    min_max,
    pruning_progress,
    rewards,
    time_difference,
    waiting_time,
)

FORMS = st.sampled_from(["ratio", "product"])
POSITIVE = st.one_of(st.just(0.0), st.floats(1e-9, 1e9))


@st.composite
def rounds(draw: st.DrawFn) -> list[Any]:
    count = draw(st.integers(1, 6))
    some = st.lists(POSITIVE, min_size=count, max_size=count)
    progress = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    pruning = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return [draw(some), progress, draw(some), draw(some), pruning]


@given(each=rounds(), form=FORMS)
def test_rewards_are_in_zero_to_one(each: list[Any], form: str) -> None:
    found = rewards(RewardConfig(form=form), *each)
    assert found.shape == (len(each[0]),)
    assert ((found >= 0) & (found <= 1)).all()


@given(each=rounds(), form=FORMS, place=st.integers(0, 2), share=st.floats(0.01, 1))
def test_more_of_an_ingredient_is_never_worse(each: list[Any], form: str, place: int, share: float) -> None:
    config, better = RewardConfig(form=form), [np.array(part, dtype=np.float64) for part in each]
    better[place][0] = min(1.0, better[1][0] + share) if place == 1 else better[place][0] * (1 + share) + share
    assert rewards(config, *better)[0] >= rewards(config, *each)[0] - 1e-12


@given(each=rounds(), form=FORMS, factor=st.floats(1.01, 10))
def test_farther_from_the_mean_time_is_never_better(each: list[Any], form: str, factor: float) -> None:
    each[3] = [1.0] * len(each[3])
    later = [*each[:3], [factor, *each[3][1:]], each[4]]
    latest = [*each[:3], [2 * factor, *each[3][1:]], each[4]]
    config = RewardConfig(form=form)
    found = [rewards(config, *which)[0] for which in (each, later, latest)]
    assert found[0] >= found[1] - 1e-12
    assert found[1] >= found[2] - 1e-12


def test_a_round_by_hand() -> None:
    found = rewards(RewardConfig(), [0.0, 0.5, 1.0], [1.0, 0.0, 0.5], [2.0, 4.0, 3.0], [1.0, 2.0, 3.0])
    np.testing.assert_allclose(found, [0.3 / 1.5, 0.25 + 0.2, (0.5 + 0.15 + 0.1) / 1.5])
    product = rewards(RewardConfig(form="product"), [0.0, 0.5, 1.0], [1.0, 0.0, 0.5], [2.0, 4.0, 3.0], [1.0, 2.0, 3.0])
    np.testing.assert_allclose(product, [0, 0.5 * 0.5, 0.75 * 0.5 * 0.1 / 0.6])


def test_the_weight_of_progress_goes_to_the_others_when_pruning_is_over() -> None:
    found = rewards(RewardConfig(), [1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [False, True])
    np.testing.assert_allclose(found, [1.0, 0.0])
    product = RewardConfig(form="product")
    np.testing.assert_allclose(rewards(product, [1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0], False), [1.0, 0.0])


def test_one_device_equal_values_and_no_time() -> None:
    np.testing.assert_array_equal(min_max([3.0]), [0.5])
    np.testing.assert_array_equal(min_max([2.0, 2.0]), [0.5, 0.5])
    np.testing.assert_array_equal(time_difference([0.0, 0.0]), [0.0, 0.0])
    np.testing.assert_allclose(rewards(RewardConfig(), [1.0], [0.5], [1.0], [0.0]), [0.25 + 0.15 + 0.1])


def test_min_max_of_values_whose_difference_overflows() -> None:
    np.testing.assert_array_equal(min_max([-1.7e308, 0.0, 1.7e308]), [0, 0.5, 1])


def test_ingredients() -> None:
    np.testing.assert_array_equal(loss_drop([2.0, 1.0], [1.5, 3.0]), [0.5, 0.0])
    np.testing.assert_allclose(pruning_progress([0.3, 0.5, 0.5], [0.4, 0.5, 0.6], 0.5), [0.5, 0, 0])
    assert waiting_time([1.0, 2.0, 6.0]) == pytest.approx(3.0)


def test_axes_before_the_last_are_rounds_of_their_own() -> None:
    rng = np.random.default_rng(0)
    parts = rng.random((4, 3, 5))
    together = rewards(RewardConfig(), *parts)
    for index in range(3):
        np.testing.assert_array_equal(together[index], rewards(RewardConfig(), *parts[:, index]))
    np.testing.assert_array_equal(waiting_time(parts[3]), [waiting_time(each) for each in parts[3]])


def test_a_reward_without_loss_and_importance_is_refused() -> None:
    check(RewardConfig())
    with pytest.raises(ConfigError, match="learn nothing"):
        check(RewardConfig(loss_weight=0.0, importance_weight=0.0))
