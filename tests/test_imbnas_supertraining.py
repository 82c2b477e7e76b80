"""Training of a super-network against references: plain SGD, gradients of single paths, counts of what was drawn."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fl_edge.data.images import ImageSet
from fl_edge.errors import DataError, TrainingError
from fl_edge.imbnas.config import SuperConfig
from fl_edge.imbnas.losses import Loss, make_head
from fl_edge.imbnas.space import Space, Stage, cifar_space, digits_space
from fl_edge.imbnas.supernet import Supernet
from fl_edge.imbnas.supertraining import draw_paths, train_supernet
from fl_edge.seeding import numpy_rng, torch_rng

SMALL = Space(3, (Stage(3, 1, 1), Stage(4, 2, 2)), ("conv3", "sep3", "identity"))
SINGLE = Space(3, (Stage(3, 1, 1), Stage(4, 1, 2)), ("sep3",))
CLASSES = 3


def make_images(count: int = 30) -> ImageSet:
    """Stripes in three directions, in noise."""
    labels = torch.arange(count) % CLASSES
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    waves = torch.stack([torch.sin(1.5 * axis) for axis in (rows, columns, rows + columns)])
    noise = torch.randn(count, 1, 8, 8, generator=torch_rng(1, "noise"))
    return ImageSet(waves[labels][:, None] + 0.5 * noise, labels, [str(label) for label in range(CLASSES)])


def make(space: Space = SMALL) -> tuple[Supernet, nn.Module]:
    return Supernet(space, 1, torch_rng(1)), make_head("ce", space.features, CLASSES, torch_rng(2))


def weights(*modules: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for module in modules for weight in module.parameters()]


def trained(recipe: SuperConfig, seed: int = 1, space: Space = SMALL, loss: Loss | None = None) -> list[Tensor]:
    supernet, head = make(space)
    train_supernet(supernet, head, make_images(), recipe, seed, loss=loss)
    return weights(supernet, head)


def test_with_a_single_path_it_is_plain_sgd() -> None:
    recipe = SuperConfig(epochs=2, batch_size=30, learning_rate=0.2, momentum=0.5, weight_decay=0.01)
    supernet, head = make(SINGLE)
    reference, images = nn.ModuleList(copy.deepcopy([supernet, head])).train(), make_images()
    train_supernet(supernet, head, images, recipe, 1)
    momenta = [torch.zeros_like(weight) for weight in reference.parameters()]
    for rate in (0.2, 0.1):  # cosine at 0 and at the middle; a batch is the whole set, in any order
        scores = reference[1](reference[0](images.images, (0, 0)))
        parameters = list(reference.parameters())
        gradients = torch.autograd.grad(functional.cross_entropy(scores, images.labels), parameters)
        for weight, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
            momentum.mul_(0.5).add_(gradient + 0.01 * weight.detach())
            weight.data -= rate * momentum
    for mine, theirs in zip(weights(supernet, head), weights(reference), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_what_is_not_drawn_keeps_its_bits() -> None:
    """Neither weight decay nor momentum touches it, also after steps in which it was drawn."""
    supernet, head = make()
    before = dict(zip([name for name, _ in supernet.named_parameters()], weights(supernet), strict=True))
    recipe = SuperConfig(epochs=1, batch_size=30, weight_decay=0.1)
    train_supernet(supernet, head, make_images(), recipe, 5)
    (path,) = draw_paths(SMALL, "uniform", numpy_rng(5, "paths", 0, 0))
    names = SMALL.names(path)
    starts = ("stem.", *(f"blocks.{place}.{option}." for place, option in enumerate(names)))
    changed = {name for name, weight in supernet.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.startswith(starts)}
    assert len(changed) < len(before)


def test_a_fair_step_takes_the_mean_gradient_of_the_paths_that_share_a_weight() -> None:
    recipe = SuperConfig(epochs=1, batch_size=30, learning_rate=0.1, momentum=0.0, weight_decay=0.0, sampling="fair")
    supernet, head = make()
    reference, images = nn.ModuleList(copy.deepcopy([supernet, head])).train(), make_images()
    train_supernet(supernet, head, images, recipe, 2)
    found: list[list[Tensor]] = [[] for _ in reference.parameters()]
    for path in draw_paths(SMALL, "fair", numpy_rng(2, "paths", 0, 0)):
        reference.zero_grad()
        scores = reference[1](reference[0](images.images, path))
        functional.cross_entropy(scores, images.labels).backward()  # type: ignore[no-untyped-call]
        for place, weight in enumerate(reference.parameters()):
            found[place] += [] if weight.grad is None else [weight.grad.clone()]
    assert len({len(gradients) for gradients in found}) > 1
    for weight, mine, gradients in zip(reference.parameters(), weights(supernet, head), found, strict=True):
        assert gradients  # every option had its turn
        assert torch.allclose(mine, weight.detach() - 0.1 * torch.stack(gradients).mean(0), atol=1e-5)


@given(st.sampled_from([SMALL, digits_space(), cifar_space()]), st.integers(0, 999))
def test_fair_paths_give_every_option_its_turn(space: Space, seed: int) -> None:
    paths = draw_paths(space, "fair", numpy_rng(seed))
    assert len(paths) == max(map(len, space.choices))
    for column, options in zip(zip(*paths, strict=True), space.choices, strict=True):
        counts = [Counter(column)[option] for option in range(len(options))]
        assert max(counts) - min(counts) <= 1 <= min(counts)
    assert all(space.check(path) == path for path in paths)


def test_fair_draws_are_uniform_in_every_block() -> None:
    draws = [path for seed in range(400) for path in draw_paths(SMALL, "fair", numpy_rng(seed))]
    for column, options in zip(zip(*draws, strict=True), SMALL.choices, strict=True):
        expected = len(draws) / len(options)
        assert all(abs(count - expected) < 0.1 * expected for count in Counter(column).values())
    pairs = Counter((path[0], path[2]) for path in draws)  # blocks are drawn apart from each other
    assert len(pairs) == 9
    assert max(pairs.values()) < 1.4 * min(pairs.values())


@pytest.mark.parametrize("sampling", ["uniform", "fair"])
def test_it_learns(sampling: str) -> None:
    supernet, head = make()
    losses: list[float] = []
    recipe = SuperConfig(epochs=20, batch_size=16, sampling=sampling)
    train_supernet(supernet, head, make_images(90), recipe, 1, on_epoch=lambda _, loss: losses.append(loss))
    assert len(losses) == 20
    assert losses[-1] < 0.4 * math.log(CLASSES) < 0.8 * math.log(CLASSES) < losses[0]


@settings(max_examples=4, deadline=None)
@given(st.sampled_from(["uniform", "fair"]), st.integers(0, 2))
def test_the_seed_decides_everything(sampling: str, padding: int) -> None:
    recipe = SuperConfig(epochs=2, batch_size=10, sampling=sampling, crop_padding=padding, flip=padding > 1)
    state = torch.get_rng_state()
    one, again, other = trained(recipe, 1), trained(recipe, 1), trained(recipe, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, one, again))
    assert not torch.equal(one[0], other[0])  # the stem's, which every step trains
    if padding:
        plain = trained(replace(recipe, crop_padding=0, flip=False), 1)
        assert not torch.equal(one[0], plain[0])


def test_an_epoch_takes_every_image_once_and_progress_grows() -> None:
    seen: list[tuple[float, Tensor]] = []

    def loss(scores: Tensor, labels: Tensor, progress: float) -> Tensor:
        seen.append((progress, labels))
        return functional.cross_entropy(scores, labels)

    supernet, head = make()
    images = replace(make_images(31), labels=torch.arange(31), classes=[str(label) for label in range(31)])
    head = make_head("ce", SMALL.features, 31, torch_rng(1))
    train_supernet(supernet, head, images, SuperConfig(epochs=2, batch_size=10), 1, loss=loss)
    steps, labels = zip(*seen, strict=True)
    assert list(steps) == pytest.approx([step / 8 for step in range(8)])
    assert [len(batch) for batch in labels] == [8, 8, 8, 7] * 2
    for epoch in (labels[:4], labels[4:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(31))
    assert not torch.equal(labels[0], labels[4])


def test_pixels_as_bytes_are_the_same_images() -> None:
    images = make_images()
    raw = ((images.images - images.images.min()) * 40).clamp(0, 255).to(torch.uint8)
    results = []
    for stored in (raw, raw.float() / 255):
        supernet, head = make()
        train_supernet(supernet, head, replace(images, images=stored), SuperConfig(epochs=1), 1)
        results.append(weights(supernet, head))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_loss_that_is_not_a_number() -> None:
    with pytest.raises(TrainingError, match=r"loss is nan in epoch [01]; a learning rate below 1e\+30"):
        trained(SuperConfig(epochs=3, batch_size=5, learning_rate=1e30))


def test_a_set_without_images() -> None:
    supernet, head = make()
    with pytest.raises(DataError, match="without images"):
        train_supernet(supernet, head, make_images().subset(torch.arange(0)), SuperConfig(), 1)
