"""Search spaces against references: enumeration, a count by hooks, draws against the uniform distribution."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fl_edge.errors import ConfigError
from fl_edge.imbnas.blocks import OPTIONS
from fl_edge.imbnas.extraction import fresh_network
from fl_edge.imbnas.space import Limit, Space, Stage, cifar_space, digits_space, random
from fl_edge.seeding import numpy_rng, torch_rng

EVERYTHING = Space(3, (Stage(3, 2, 1), Stage(5, 2, 2)), tuple(OPTIONS))
DIGITS, CIFAR = (1, 8, 8), (3, 32, 32)


def counted(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-adds of all convolutions, from the shapes that really occur."""
    total = 0

    def hook(layer: nn.Module, _: object, outputs: Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d)
        total += layer.weight[0].numel() * outputs[0].numel()

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(hook)
    network.eval()(torch.zeros(1, *shape))
    return total


def uniform(counts: list[int]) -> bool:
    """Pearson's test with a normal bound: for many classes chi square has mean and half variance dof."""
    expected, dof = sum(counts) / len(counts), len(counts) - 1
    statistic = math.fsum((count - expected) ** 2 for count in counts) / expected
    return statistic < dof + 4 * math.sqrt(2 * dof) + 4


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([digits_space(), cifar_space(4), EVERYTHING]), st.integers(0, 999), st.integers(5, 11))
def test_cost_and_parameters_are_those_of_the_network(space: Space, seed: int, height: int) -> None:
    architecture, shape = random(space, numpy_rng(seed)), (2, height, 8)
    network = fresh_network(space, architecture, 2, 4, torch_rng(seed))
    assert space.cost(architecture, shape) == counted(network, shape)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert space.parameters(architecture, 2) == sum(layer.weight.numel() for layer in convolutions)


def test_sizes_of_the_two_spaces() -> None:
    assert 64 <= digits_space().size <= 256
    assert cifar_space().size == 4**7 * 3**2  # blocks with stride 2 have no identity
    assert cifar_space().features == 64


@pytest.mark.parametrize("space", [digits_space(), EVERYTHING])
def test_all_yields_every_path_once(space: Space) -> None:
    paths = list(space.all())
    assert len(set(paths)) == len(paths) == space.size
    assert all(space.check(path) == path for path in paths)


def test_identity_stands_only_where_nothing_changes() -> None:
    assert ["identity" in options for options in EVERYTHING.choices] == [True, True, False, True]
    wider = Space(2, (Stage(3, 1, 1),), ("conv3", "identity"))
    assert wider.choices == (("conv3",),)


def test_a_path_in_words() -> None:
    space = digits_space()
    assert space.describe((0,) * len(space.places)).replace(" |", "").split() == [row[0] for row in space.choices]
    assert space.describe((0,) * len(space.places)).count("|") == len(space.stages) - 1


@pytest.mark.parametrize("wrong", [(), (0, 0), (0, 0, 0, 9), (0, 0, 0, -1)])
def test_an_architecture_that_is_not_in_the_space(wrong: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"not in the space; its 4 blocks have \[6, 6, 5, 6\] options"):
        EVERYTHING.check(wrong)


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ((Stage(4, 1, 1),), ("conv9",), "option conv9"),
        ((Stage(4, 1, 1),), ("conv3", "conv3"), "once each"),
        ((Stage(4, 0, 1),), ("conv3",), "blocks=0"),
        ((Stage(4, 1, 3),), ("conv3",), "stride=3"),
        ((Stage(4, 1, 2),), ("identity",), "an option for every block"),
        ((), ("conv3",), "at least one stage"),
    ],
)
def test_impossible_spaces(stages: tuple[Stage, ...], options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Space(4, stages, options)


def test_the_cheapest_path() -> None:
    costs = [EVERYTHING.cost(path, DIGITS) for path in EVERYTHING.all()]
    assert EVERYTHING.cost(EVERYTHING.cheapest(DIGITS), DIGITS) == min(costs)


def test_an_impossible_limit_names_the_cheapest_cost() -> None:
    space = digits_space()
    least = min(space.cost(path, DIGITS) for path in space.all())
    random(space, numpy_rng(1), Limit(least, DIGITS))
    with pytest.raises(ConfigError, match=f"limit of {least - 1} multiply-adds .* costs {least}$"):
        random(space, numpy_rng(1), Limit(least - 1, DIGITS))


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_draws_are_uniform_over_what_the_limit_allows(share: float) -> None:
    space = digits_space()
    costs = sorted(space.cost(path, DIGITS) for path in space.all())
    limit = Limit(costs[int(share * (len(costs) - 1))], DIGITS)
    allowed = [path for path in space.all() if limit.allows(space, path)]
    rng = numpy_rng(3, "draws")
    drawn = Counter(random(space, rng, limit) for _ in range(20 * len(allowed)))
    assert set(drawn) <= set(allowed)
    assert uniform([drawn[path] for path in allowed])


def test_draws_without_a_limit_are_uniform() -> None:
    rng = numpy_rng(4, "draws")
    drawn = Counter(random(EVERYTHING, rng) for _ in range(20 * EVERYTHING.size))
    assert uniform([drawn[path] for path in EVERYTHING.all()])
