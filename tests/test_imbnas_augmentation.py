"""Random crops and flips against a search through all crops that there are."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fl_edge.imbnas.augmentation import augment
from fl_edge.seeding import torch_rng


def crops(image: Tensor, padding: int) -> dict[tuple[int, int, bool], Tensor]:
    """All crops of one image (c, h, w), plain and mirrored."""
    _, height, width = image.shape
    padded = functional.pad(image, (padding,) * 4)
    found: dict[tuple[int, int, bool], Tensor] = {}
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[:, row : row + height, column : column + width]
            found |= {(row, column, False): crop, (row, column, True): crop.flip(2)}
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), st.booleans(), st.integers(0, 99))
def test_every_image_is_one_of_its_crops(padding: int, flip: bool, seed: int) -> None:
    images = torch.rand(3, 2, 3, 4, generator=torch_rng(seed)) + 1
    for image, seen in zip(images, augment(images, padding, flip, torch_rng(seed, "draws")), strict=True):
        ways = [way for way, crop in crops(image, padding).items() if torch.equal(crop, seen)]
        assert ways
        assert flip or any(not mirrored for _, _, mirrored in ways)


def test_all_places_occur_and_half_are_mirrored() -> None:
    image = torch.rand(1, 3, 3, generator=torch_rng(1)) + 1
    seen = augment(image.expand(900, -1, -1, -1), 1, True, torch_rng(2))
    counts = [int((seen == crop).flatten(1).all(1).sum()) for crop in crops(image, 1).values()]
    assert sum(counts) == 900
    assert all(25 <= count <= 80 for count in counts)  # 50 expected of each of the 18


def test_nothing_asked_for_draws_nothing() -> None:
    generator, images = torch_rng(1), torch.rand(2, 1, 3, 3)
    state = generator.get_state()
    assert augment(images, 0, False, generator) is images
    assert torch.equal(generator.get_state(), state)
