"""Where the super-network comes from, and the long tails that it is adapted to, for :mod:`benchmarks.imbnas`.

* *digits*: from the balanced digits to the same ten classes with a tail: all images of the target are the source's too.
* *digits, other classes*: from the even digits to the odd ones with a tail; no class and no image is in both.
* *synthetic*: from the first five classes of :mod:`fl_edge.data.synthetic` to the other five; 32x32 pixels, the options
  of the space for CIFAR in fewer and narrower blocks.

The truth of a path is class-mean accuracy on everything that no search and no training of the target sees: the test
images, and those that the tail leaves out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from fl_edge.data.config import DataConfig
from fl_edge.data.images import ImageSet, load_test, load_train
from fl_edge.imbnas.adaptation import Source
from fl_edge.imbnas.config import HeadConfig, RetrainConfig, SuperConfig, TailConfig
from fl_edge.imbnas.longtail import LongTailTask, make_task
from fl_edge.imbnas.source import balanced_source, load_source
from fl_edge.imbnas.space import Architecture, Space, Stage, cifar_space, digits_space
from fl_edge.seeding import numpy_rng

SAME, OTHER, SYNTHETIC = "digits", "digits, other classes", "synthetic"
RATIOS = (10, 50, 100)
BALANCED = 1
_SAMPLED = 20  # paths of a space in which not all can be trained


@dataclass(frozen=True)
class Pair:
    """A source and a target.

    Attributes
    ----------
    data
        Both are cut from.
    source_classes, target_classes
        Which of its classes each has.
    space
        Searched.
    ratios
        Of the tails.
    all_paths
        Every path is looked at; else a fixed draw of them.
    at_once
        Trainings of a path that run side by side; larger networks gain nothing by it.
    supernet
        Training of the super-network.
    head
        Training of heads on it; epochs such that P1 costs a small part of a training from scratch.
    truth, steps
        Training of a path for what it is worth, and how many steps it has.
    final
        Training of what was found, with every loss.
    """

    data: DataConfig
    source_classes: slice
    target_classes: slice
    space: Space
    ratios: tuple[int, ...]
    all_paths: bool
    at_once: int
    supernet: SuperConfig
    head: HeadConfig
    truth: RetrainConfig
    steps: int
    final: RetrainConfig


_SMALL = RetrainConfig(batch_size=16, learning_rate=0.05, crop_padding=0, flip=False)
_HEAD = HeadConfig(epochs=80, batch_size=64, learning_rate=1.0, ridge=1e-2)
_DIGITS = Pair(
    data=DataConfig(),
    source_classes=slice(None),
    target_classes=slice(None),
    space=digits_space(),
    ratios=RATIOS,
    all_paths=True,
    at_once=12,
    supernet=SuperConfig(),
    head=_HEAD,
    truth=_SMALL,
    steps=400,
    final=replace(_SMALL, epochs=160, batch_size=32),
)
_TEXTURED = Pair(
    data=DataConfig(source="synthetic", per_class=3000),
    source_classes=slice(0, 5),
    target_classes=slice(5, 10),
    space=Space(8, (Stage(8, 2, 2), Stage(16, 2, 2), Stage(32, 2, 2)), cifar_space().options),
    ratios=(100,),
    all_paths=False,
    at_once=1,
    supernet=SuperConfig(epochs=12),
    head=replace(_HEAD, epochs=8),
    truth=replace(_SMALL, batch_size=32, learning_rate=0.1),
    steps=1600,
    final=replace(_SMALL, epochs=12, batch_size=32, learning_rate=0.1),
)
PAIRS = {
    SAME: _DIGITS,
    OTHER: replace(
        _DIGITS,
        source_classes=slice(0, None, 2),
        target_classes=slice(1, None, 2),
        ratios=(100,),
        head=replace(_HEAD, epochs=60),
    ),
    SYNTHETIC: _TEXTURED,
}


def architectures(pair: str, quick: bool) -> list[Architecture]:
    """Return the paths whose truth is known: all of the space, or a fixed draw with the small ResNet among it."""
    space = PAIRS[pair].space
    if PAIRS[pair].all_paths and not quick:
        return list(space.all())
    rng, sizes = numpy_rng(0, "sampled paths"), [len(options) for options in space.choices]
    drawn = {fixed(pair)}
    while len(drawn) < _SAMPLED:
        drawn.add(tuple(int(rng.integers(size)) for size in sizes))
    return sorted(drawn)


def fixed(pair: str) -> Architecture:
    """Return the small ResNet: a residual 3x3 convolution in every block."""
    return (0,) * len(PAIRS[pair].space.choices)


def tail(ratio: float) -> TailConfig:
    """Return the tail of a ratio; groups have the shares that they have in CIFAR-100."""
    return TailConfig(ratio=float(ratio), group_scale=500)


@functools.lru_cache(maxsize=32)
def make_target(pair: str, ratio: float, seed: int) -> LongTailTask:
    """Return the target: its tail, a balanced validation split, the test set."""
    train, test = _images(pair, seed)
    chosen = PAIRS[pair].target_classes
    return make_task(_classes(train, chosen), _classes(test, chosen), tail(ratio), seed)


@functools.lru_cache(maxsize=32)
def unseen(pair: str, ratio: float, seed: int) -> ImageSet:
    """Return what truth is measured on: test images, and those of the target's classes that the tail leaves out."""
    task, whole = make_target(pair, ratio, seed), make_target(pair, BALANCED, seed)
    flat = whole.train.images.flatten(1)
    kept = {row.numpy().tobytes() for row in task.train.images.flatten(1)}
    left = torch.tensor([row.numpy().tobytes() not in kept for row in flat])
    rest = whole.train.subset(left.nonzero().squeeze(1))
    return replace(
        task.test,
        images=torch.cat([task.test.images, rest.images]),
        labels=torch.cat([task.test.labels, rest.labels]),
    )


@functools.lru_cache(maxsize=8)
def make_source(pair: str, seed: int, quick: bool) -> Source:
    """Return the super-network, trained at the first use; nothing of the target's validation or test is in it."""
    train, test = _images(pair, seed)
    recipe = PAIRS[pair].supernet
    recipe = replace(recipe, epochs=recipe.epochs // 8) if quick else recipe
    chosen = PAIRS[pair].source_classes
    images = balanced_source(_classes(train, chosen), _classes(test, chosen), tail(BALANCED), seed)
    return load_source(PAIRS[pair].space, images, recipe, seed)


def _images(pair: str, seed: int) -> tuple[ImageSet, ImageSet]:
    config = PAIRS[pair].data
    return load_train(config, seed), load_test(config, seed)


def _classes(images: ImageSet, chosen: slice) -> ImageSet:
    """Return the images of some classes, numbered anew in their order."""
    labels = list(range(len(images.classes)))[chosen]
    if len(labels) == len(images.classes):
        return images
    rows = torch.isin(images.labels, torch.tensor(labels)).nonzero().squeeze(1)
    names = [images.classes[label] for label in labels]
    renamed = torch.full((len(images.classes),), -1).index_copy(0, torch.tensor(labels), torch.arange(len(labels)))
    return replace(images.subset(rows), labels=renamed[images.labels[rows]], classes=names)
