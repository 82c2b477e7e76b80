"""Search spaces: chains of choice blocks in stages, what a path costs, and uniform draws under a cost limit.

Source: IMB-NAS (arXiv 2210.00136) by way of the project's specification, section 5; the papers' own space could not be
read. *Ours*, all of it: the CIFAR-sized space (a stem of 16 channels, three stages of three blocks, about 1.5e5 paths),
the digits space, which is small enough to train every path, and exact draws under a limit.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fl_edge.errors import ConfigError
from fl_edge.imbnas.blocks import OPTIONS, STEM_KERNEL, Size, half

Architecture = tuple[int, ...]  # for every block the place of its option among those that the block may have
Shape = tuple[int, int, int]  # of one image: channels, height, width


@dataclass(frozen=True)
class Stage:
    """Blocks of equal width; the first of them carries the stride and the change of width.

    Attributes
    ----------
    channels
        Width of the stage's outputs.
    blocks
        At least 1.
    stride
        1 or 2, of the first block.
    """

    channels: int
    blocks: int
    stride: int


@dataclass(frozen=True)
class Place:
    """One choice block: what goes in, what comes out, and which options may stand there."""

    inputs: int
    outputs: int
    stride: int
    options: tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """A chain of choice blocks behind a 3x3 stem; a global average and a linear head follow, the same for all paths.

    Attributes
    ----------
    stem
        Channels of the stem.
    stages
        At least one.
    options
        Names from :data:`fl_edge.imbnas.blocks.OPTIONS`. A block has those that can change size and width as it must:
        ``identity`` stands only where neither changes.

    Raises
    ------
    ConfigError
        An unknown option, an option twice, a stage without blocks or of another stride, a block without options.
    """

    stem: int
    stages: tuple[Stage, ...]
    options: tuple[str, ...]

    def __post_init__(self) -> None:
        for option in self.options:
            if option not in OPTIONS or self.options.count(option) > 1:
                raise ConfigError(f"option {option} is not allowed; options are, once each, of {', '.join(OPTIONS)}")
        for stage in self.stages:
            if stage.channels < 1 or stage.blocks < 1 or stage.stride not in (1, 2):
                raise ConfigError(f"{stage} is not allowed; it must have channels, blocks and stride 1 or 2")
        if self.stem < 1 or not self.stages or not all(place.options for place in self.places):
            raise ConfigError("a space must have a stem, at least one stage and an option for every block")

    @functools.cached_property
    def places(self) -> tuple[Place, ...]:
        """Return the choice blocks in order."""
        places, inputs = [], self.stem
        for stage in self.stages:
            for block in range(stage.blocks):
                stride = 1 if block else stage.stride
                same = stride == 1 and inputs == stage.channels
                options = tuple(name for name in self.options if same or OPTIONS[name].resizes)
                places.append(Place(inputs, stage.channels, stride, options))
                inputs = stage.channels
        return tuple(places)

    @property
    def choices(self) -> tuple[tuple[str, ...], ...]:
        """Return, for every block, the options it may have; an architecture counts in them."""
        return tuple(place.options for place in self.places)

    @property
    def features(self) -> int:
        """Return d, the length of a path's feature."""
        return self.stages[-1].channels

    @property
    def size(self) -> int:
        """Return the number of paths."""
        return math.prod(map(len, self.choices))

    def all(self) -> Iterator[Architecture]:
        """Yield every path once, in lexical order."""
        return itertools.product(*(range(len(options)) for options in self.choices))

    def check(self, architecture: Sequence[int]) -> Architecture:
        """Return the architecture as a tuple of int if the space has it.

        Raises
        ------
        ConfigError
            Too many or too few blocks, an option that a block does not have.
        """
        counts = [len(options) for options in self.choices]
        fits = len(architecture) == len(counts)
        if not fits or not all(0 <= one < count for one, count in zip(architecture, counts, strict=True)):
            shown = tuple(architecture)
            raise ConfigError(
                f"architecture {shown} is not in the space; its {len(counts)} blocks have {counts} options"
            )
        return tuple(int(one) for one in architecture)

    def names(self, architecture: Architecture) -> tuple[str, ...]:
        """Return the option of every block by name."""
        return tuple(place.options[one] for place, one in zip(self.places, architecture, strict=True))

    def describe(self, architecture: Architecture) -> str:
        """Return a path in one line, for example ``conv3 identity | sep3 sep3``, stages apart."""
        names = iter(self.names(architecture))
        return " | ".join(" ".join(itertools.islice(names, stage.blocks)) for stage in self.stages)

    def cost(self, architecture: Architecture, image_shape: Shape) -> int:
        """Return the multiply-adds of one image's forward pass up to the feature.

        Convolutions are counted, one for every weight and place, also where the kernel stands on padding; norms,
        activations, the average and the head are not.
        """
        stem, table = self._table(image_shape)
        return stem + sum(row[one] for row, one in zip(table, architecture, strict=True))

    def parameters(self, architecture: Architecture, channels: int) -> int:
        """Return the weights of a path's convolutions, for images of so many channels; norms and head not counted."""
        stem = channels * self.stem * STEM_KERNEL**2
        named = zip(self.places, self.names(architecture), strict=True)
        return stem + sum(OPTIONS[name].weights(place.inputs, place.outputs) for place, name in named)

    def cheapest(self, image_shape: Shape) -> Architecture:
        """Return the path of least cost, the first of them in lexical order."""
        return tuple(row.index(min(row)) for row in self._table(image_shape)[1])

    def _table(self, image_shape: Shape) -> tuple[int, tuple[tuple[int, ...], ...]]:
        return _costs(self, image_shape)


@dataclass(frozen=True)
class Limit:
    """The most that a path may cost.

    Attributes
    ----------
    multiply_adds
        Of one image, see :meth:`Space.cost`; inclusive.
    image_shape
        (channels, height, width) of that image.
    """

    multiply_adds: int
    image_shape: Shape

    def allows(self, space: Space, architecture: Architecture) -> bool:
        """Say whether a path is cheap enough."""
        return space.cost(architecture, self.image_shape) <= self.multiply_adds

    def check(self, space: Space) -> None:
        """Raise ConfigError, with the cheapest cost, if no path of the space is cheap enough."""
        least = space.cost(space.cheapest(self.image_shape), self.image_shape)
        if self.multiply_adds < least:
            raise ConfigError(
                f"a limit of {self.multiply_adds} multiply-adds is not allowed; the cheapest path of the space, for "
                f"images of shape {self.image_shape}, costs {least}"
            )


def random(space: Space, rng: np.random.Generator, limit: Limit | None = None) -> Architecture:
    """Draw a path, every one that the limit allows with the same probability.

    Exact, without rejected tries: an option's probability is its share of the allowed ways to go on from there (ours).

    Raises
    ------
    ConfigError
        A limit below the cheapest path.
    """
    if limit is None:
        return tuple(int(rng.integers(len(options))) for options in space.choices)
    limit.check(space)
    stem, table = _costs(space, limit.image_shape)
    budget, drawn = limit.multiply_adds - stem, []
    for block, row in enumerate(table):
        ways = [_ways(table, block + 1, budget - cost) for cost in row]
        below = int(rng.integers(sum(ways)))
        option = next(one for one, total in enumerate(itertools.accumulate(ways)) if below < total)
        budget -= row[option]
        drawn.append(option)
    return tuple(drawn)


def digits_space() -> Space:
    """Return the space for images of 8x8 pixels (ours)."""
    return Space(8, (Stage(8, 2, 1), Stage(16, 2, 2)), ("conv3", "sep3", "narrow3", "identity"))


def cifar_space(width: int = 16) -> Space:
    """Return the space for images of 32x32 or 16x16 pixels, 147,456 paths (ours, specification section 5).

    Parameters
    ----------
    width
        Channels of stem and first stage; the later stages have twice and four times as many.
    """
    stages = (Stage(width, 3, 1), Stage(2 * width, 3, 2), Stage(4 * width, 3, 2))
    return Space(width, stages, ("conv3", "sep3", "sep5", "identity"))


@functools.lru_cache(maxsize=64)
def _costs(space: Space, image_shape: Shape) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Return the multiply-adds of the stem, and of every option of every block: sizes do not depend on the path."""
    channels, height, width = image_shape
    size: Size = (height, width)
    stem = channels * space.stem * STEM_KERNEL**2 * height * width
    table = []
    for place in space.places:
        after = half(size) if place.stride == 2 else size
        row = (OPTIONS[name].multiply_adds(place.inputs, place.outputs, size, after) for name in place.options)
        table.append(tuple(row))
        size = after
    return stem, tuple(table)


@functools.lru_cache(maxsize=65536)
def _ways(table: tuple[tuple[int, ...], ...], block: int, budget: int) -> int:
    """Return how many paths through the blocks from ``block`` on cost at most ``budget``."""
    rest = table[block:]
    if budget < sum(map(min, rest)):
        return 0
    if budget >= sum(map(max, rest)):
        return math.prod(map(len, rest))
    return sum(_ways(table, block + 1, budget - cost) for cost in rest[0])
