"""A small set of CIFAR's shape made on the spot: textured shapes on textured grounds, ten classes (ours).

A class is a shape (disc, square, triangle, cross, ring) filled with a texture (stripes or a checkerboard): one needs a
wide view to tell, the other a close one. Colours, place, size, turn, period, phase, ground, a bar in front and noise
are drawn from the same distributions for all classes, so neither mean colours nor single pixels tell classes apart.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fl_edge.seeding import numpy_rng

SHAPES = ("disc", "square", "triangle", "cross", "ring")
TEXTURES = ("stripes", "checks")
CLASSES = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]
SIZE = 32

_CLOUDS = 4  # the ground's colour changes smoothly over so many places along an axis
_NOISE = 0.06  # standard deviation, for pixels in [0, 1]

Floats = NDArray[np.float32]


def synthetic_images(per_class: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Return images uint8 (10 per_class, 3, 32, 32) and labels int64, class after class; always the same ones."""
    drawn = [_draw(label, per_class) for label in range(len(CLASSES))]
    images = torch.from_numpy(np.concatenate(drawn)).mul(255).round().clamp(0, 255).to(torch.uint8)
    return images, np.repeat(np.arange(len(CLASSES)), per_class)


def _draw(label: int, count: int) -> Floats:
    """Return images of one class, (count, 3, 32, 32), about [0, 1]; the draws of no class differ from another's."""
    shape, texture = divmod(label, len(TEXTURES))
    rng = numpy_rng(0, "data", "synthetic", label)

    def uniform(low: float, high: float, *axes: int) -> Floats:
        return rng.uniform(low, high, (count, *(axes or (1, 1)))).astype(np.float32)

    def color(low: float, high: float) -> Floats:
        return uniform(low, high, 3, 1, 1)

    def phase() -> Floats:
        return uniform(0, 2 * np.pi, 2, 1, 1)

    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    x, y = columns - SIZE / 2 - uniform(-4, 4), rows - SIZE / 2 - uniform(-4, 4)
    # every colour is uniform by itself, and the three are never close to each other
    dark, step = color(0, 1), color(0.3, 0.6)
    light, plain = (dark + step) % 1, (dark + step / 2 + 0.5) % 1

    clouds = torch.from_numpy(uniform(-0.25, 0.25, 3, _CLOUDS, _CLOUDS))
    image = plain + functional.interpolate(clouds, (SIZE, SIZE), mode="bicubic", align_corners=True).numpy()
    waves = _texture("stripes", _turned(x, y, uniform(0, np.pi)), uniform(5, 12), phase())
    image = _over(image, color(0, 1), waves * uniform(0, 0.3))

    ink = _texture(TEXTURES[texture], _turned(x, y, uniform(0, np.pi)), uniform(3.5, 6), phase())
    radius = uniform(9, 13)
    distance = _SHAPES[SHAPES[shape]](*_turned(x / radius, y / radius, uniform(-0.5, 0.5))) * radius
    image = _over(image, dark + (light - dark) * ink[:, None], _edge(distance))

    across, _ = _turned(x, y, uniform(0, np.pi))
    image = _over(image, color(0, 1), _edge(np.abs(across - uniform(-12, 12)) - uniform(-0.5, 1)))
    return np.asarray(image + _NOISE * rng.standard_normal(image.shape, dtype=np.float32))


def _over(image: Floats, paint: Floats, share: Floats) -> Floats:
    """Lay paint over images, (n, 3, 32, 32), where its share (n, 32, 32) is above 0."""
    return np.asarray(image + (paint - image) * share[:, None])


def _turned(x: Floats, y: Floats, angle: Floats) -> tuple[Floats, Floats]:
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _edge(distance: Floats) -> Floats:
    """Return 1 inside (negative distance in pixels), 0 outside, and what lies between on the edge."""
    return np.asarray(np.clip(0.5 - distance, 0, 1))


def _texture(kind: str, place: tuple[Floats, Floats], period: Floats, phase: Floats) -> Floats:
    """Return stripes or checks in [0, 1], smooth, of a period in pixels."""
    one, two = (np.sin(2 * np.pi / period * axis + phase[:, i]) for i, axis in enumerate(place))
    return np.asarray(np.clip(0.5 + 1.5 * (one if kind == "stripes" else one * two), 0, 1))


def _disc(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - np.float32(0.85)


def _square(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.75)


def _triangle(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u) * np.float32(0.866) + v * np.float32(0.5), -v) - np.float32(0.55)


def _cross(u: Floats, v: Floats) -> Floats:
    narrow, wide = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return np.maximum(narrow - np.float32(0.35), wide - np.float32(0.95))


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.hypot(u, v) - np.float32(0.72)) - np.float32(0.25)


_SHAPES = dict(zip(SHAPES, (_disc, _square, _triangle, _cross, _ring), strict=True))
