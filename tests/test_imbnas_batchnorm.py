"""BatchNorm statistics estimated anew: against one batch of everything, in any order, over any devices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_edge.errors import DataError
from fl_edge.imbnas.batchnorm import Moments, Statistics, next_moments, norms, pool, statistics, store
from fl_edge.imbnas.space import cifar_space, digits_space, random
from fl_edge.imbnas.supernet import Supernet
from fl_edge.seeding import numpy_rng, torch_rng

SPACES = [digits_space(), cifar_space(4)]
CUTS = st.lists(st.integers(0, 150), max_size=4)


def make(seed: int) -> tuple[Supernet, tuple[int, ...], Tensor]:
    space = SPACES[seed % 2]
    images = torch.randn(150, 1, 8, 8, generator=torch_rng(seed, "images")) * 3 + 1
    return Supernet(space, 1, torch_rng(seed)), random(space, numpy_rng(seed)), images


def shards(images: Tensor, cuts: list[int], seed: int) -> list[Tensor]:
    """Images in another order, cut at some places; empty shards may be among them."""
    mixed = images[torch.randperm(len(images), generator=torch_rng(seed, "order"))]
    return list(mixed.tensor_split(sorted(cuts)))


def close(one: Statistics, other: Statistics) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        a.count == b.count
        and torch.allclose(a.mean, b.mean, atol=1e-5)
        and torch.allclose(a.variance, b.variance, rtol=1e-4, atol=1e-5)
        for a, b in pairs
    )


def same(one: Statistics, other: Statistics) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a.count == b.count and a.total.equal(b.total) and a.squares.equal(b.squares) for a, b in pairs)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99))
def test_they_are_those_of_one_batch_of_everything(seed: int) -> None:
    supernet, architecture, images = make(seed)
    expected = supernet.train()(images, architecture)
    found = statistics(supernet, architecture, [images])
    store(supernet, architecture, found)
    assert torch.allclose(supernet.eval()(images, architecture), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), CUTS)
def test_layerwise_they_do_not_depend_on_batches_or_order(seed: int, cuts: list[int]) -> None:
    supernet, architecture, images = make(seed)
    whole = statistics(supernet, architecture, [images])
    assert same(statistics(supernet, architecture, shards(images, cuts, seed)), whole)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), CUTS)
def test_devices_and_a_server_find_what_one_process_finds(seed: int, cuts: list[int]) -> None:
    supernet, architecture, images = make(seed)
    devices = shards(images, cuts, seed)
    known: Statistics = ()
    for _ in norms(supernet, architecture):
        parts = [(next_moments(supernet, architecture, [device], known),) for device in devices]
        pooled = pool(parts)
        assert same(pool(reversed(parts)), pooled)
        known = (*known, *pooled)
    assert same(known, statistics(supernet, architecture, [images]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.permutations(range(5)))
def test_batch_by_batch_they_do_not_depend_on_the_order(seed: int, order: list[int]) -> None:
    supernet, architecture, images = make(seed)
    batches = list(images.tensor_split(5))
    one = statistics(supernet, architecture, batches, layerwise=False)
    other = statistics(supernet, architecture, [batches[place] for place in order], layerwise=False)
    devices = [statistics(supernet, architecture, batches[:2], layerwise=False)]
    devices += [statistics(supernet, architecture, batches[2:], layerwise=False)]
    assert same(one, other)
    assert same(one, pool(devices))


def test_batch_by_batch_is_another_estimate_and_the_first_norm_the_same() -> None:
    supernet, architecture, images = make(1)
    batches = list(images.tensor_split(5))
    layerwise = statistics(supernet, architecture, batches)
    single = statistics(supernet, architecture, batches, layerwise=False)
    assert same(single[:1], layerwise[:1])
    assert not close(single, layerwise)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=40))
def test_moments_against_torch(values: list[float]) -> None:
    supernet, architecture, _ = make(0)
    image = torch.tensor(values).reshape(1, 1, 1, -1)
    weight = next(supernet.stem.parameters()).data
    weight.zero_()
    weight[:, :, 1, 1] = 1.0
    moments = statistics(supernet, architecture, [image])[0]
    assert moments.count == len(values)
    assert torch.allclose(moments.mean, image.mean().expand(8), rtol=1e-4, atol=1e-4)
    expected = image.double().var(correction=0).float()
    assert torch.allclose(moments.variance, expected.expand(8), rtol=1e-4, atol=1e-2)


def test_statistics_of_nothing() -> None:
    supernet, architecture, images = make(0)
    for layerwise in (True, False):
        nothing = statistics(supernet, architecture, [], layerwise=layerwise)
        assert [moments.count for moments in nothing] == [0] * len(norms(supernet, architecture))
        with pytest.raises(DataError, match="at least 1"):
            store(supernet, architecture, nothing)
        something = statistics(supernet, architecture, [images], layerwise=layerwise)
        assert same(pool([nothing, something]), something)  # a device without images changes nothing
    with pytest.raises(DataError, match="1 device"):
        pool([])


def test_statistics_of_another_path() -> None:
    supernet, architecture, images = make(0)
    found = statistics(supernet, architecture, [images])
    with pytest.raises(DataError, match="do not fit"):
        store(supernet, architecture, found[1:])


def test_a_constant_channel_has_no_variance_below_zero() -> None:
    third = 1 / 3
    moments = Moments(3, torch.tensor([3 * third], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64))
    assert moments.variance.tolist() == [0.0]
