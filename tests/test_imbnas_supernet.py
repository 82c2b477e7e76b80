"""The super-network: one path runs and learns, and a path taken out gives what it gave inside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fl_edge.errors import ConfigError
from fl_edge.imbnas.batchnorm import statistics, store
from fl_edge.imbnas.blocks import OPTIONS
from fl_edge.imbnas.extraction import extract, fresh_network
from fl_edge.imbnas.losses import make_head
from fl_edge.imbnas.space import Space, Stage, cifar_space, digits_space, random
from fl_edge.imbnas.supernet import Supernet
from fl_edge.seeding import numpy_rng, torch_rng

SPACES = {
    "digits": digits_space(),
    "cifar": cifar_space(4),
    "everything": Space(3, (Stage(3, 2, 1), Stage(5, 2, 2)), tuple(OPTIONS)),
}
CHANNELS = 2


def make(name: str) -> tuple[Supernet, Tensor]:
    images = torch.randn(6, CHANNELS, 9, 8, generator=torch_rng(1, "images"))
    return Supernet(SPACES[name], CHANNELS, torch_rng(1, "supernet")), images


def drawn_parameters(supernet: Supernet, architecture: tuple[int, ...]) -> set[str]:
    """Names of the path's parameters, from the names of its options."""
    names = supernet.space.names(architecture)
    starts = ("stem.", *(f"blocks.{place}.{option}." for place, option in enumerate(names)))
    return {name for name, _ in supernet.named_parameters() if name.startswith(starts)}


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(SPACES)), st.integers(0, 999))
def test_only_the_drawn_path_gets_gradients(name: str, seed: int) -> None:
    supernet, images = make(name)
    architecture = random(supernet.space, numpy_rng(seed))
    features = supernet(images, architecture)
    assert features.shape == (6, supernet.space.features)
    if features.requires_grad:  # behind a zero there is nothing to learn
        features.square().sum().backward()
    touched = {name for name, weight in supernet.named_parameters() if weight.grad is not None}
    assert touched <= drawn_parameters(supernet, architecture)
    if "zero" not in supernet.space.names(architecture):
        assert touched == drawn_parameters(supernet, architecture)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(SPACES)), st.integers(0, 999), st.booleans())
def test_an_extracted_path_gives_equal_outputs(name: str, seed: int, training: bool) -> None:
    supernet, images = make(name)
    architecture = random(supernet.space, numpy_rng(seed))
    head = make_head("ce", supernet.space.features, 3, torch_rng(seed))
    store(supernet, architecture, statistics(supernet, architecture, [torch.randn(20, CHANNELS, 9, 8)]))
    supernet.train(training)
    network = extract(supernet, architecture, head)
    assert network.training == training
    expected = head(supernet(images, architecture))
    assert torch.equal(network(images), expected)
    assert torch.equal(network.features(images), supernet(images, architecture))
    layers = [type(layer) for layer in network.modules() if "Norm" in type(layer).__name__]
    assert set(layers) == {nn.BatchNorm2d}
    for weight in network.parameters():  # a copy: what is done to it leaves the super-network alone
        weight.data.zero_()
    assert torch.equal(head(supernet(images, architecture)), expected)


def test_extraction_without_a_head_gives_features() -> None:
    supernet, images = make("digits")
    architecture = random(supernet.space, numpy_rng(1))
    assert torch.equal(extract(supernet, architecture)(images), supernet(images, architecture))


@pytest.mark.parametrize("name", ["digits", "cifar"])
def test_fresh_weights_copied_into_the_super_network_give_the_path(name: str) -> None:
    """The two are built by different code: equal outputs say that they are the same architecture."""
    supernet, images = make(name)
    for seed in range(8):
        architecture = random(supernet.space, numpy_rng(seed))
        network = fresh_network(supernet.space, architecture, CHANNELS, 3, torch_rng(seed))
        fresh = convolutions(network.features)
        inside = [layer for block in supernet.path(architecture) for layer in convolutions(block)]
        for theirs, mine in zip(fresh, inside, strict=True):
            mine.weight.data.copy_(theirs.weight)
        assert torch.equal(supernet(images, architecture), network.features(images))
        assert network(images).shape == (6, 3)


def test_weights_depend_on_the_generator_alone() -> None:
    state = torch.get_rng_state()
    one, other, third = (Supernet(SPACES["digits"], 1, torch_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(one.parameters(), other.parameters(), third.parameters(), strict=True))
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)


def test_training_mode_uses_the_batch_and_keeps_nothing() -> None:
    supernet, images = make("digits")
    before = {name: value.clone() for name, value in supernet.named_buffers()}
    supernet.train()
    scaled = supernet(images * 5 + 3, (0,) * 4)
    assert not torch.allclose(scaled, supernet.eval()(images * 5 + 3, (0,) * 4), atol=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in supernet.named_buffers())
    assert not any("norm" in key or "mean" in key for key in supernet.state_dict())


def test_an_architecture_of_another_space() -> None:
    supernet, images = make("digits")
    with pytest.raises(ConfigError, match="not in the space"):
        supernet(images, (0,) * 9)


def test_images_as_small_as_one_pixel_behind_the_strides() -> None:
    supernet = Supernet(SPACES["cifar"], 1, torch_rng(1))
    assert supernet(torch.zeros(2, 1, 3, 3), (0,) * 9).isfinite().all()


def test_the_residual_is_there() -> None:
    """With weights of zero a residual block passes its input on."""
    supernet, _ = make("digits")
    block = supernet.path((0,) * 4)[1]
    convolutions(block)[0].weight.data.zero_()
    inputs = functional.relu(torch.randn(3, 8, 4, 4))
    assert torch.equal(block(inputs), inputs)
