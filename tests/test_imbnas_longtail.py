"""Long-tailed tasks: class sizes of the specification's table, splits, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.config import resolve
from fl_edge.data.images import ImageSet
from fl_edge.errors import ConfigError, DataError
from fl_edge.imbnas.config import LossConfig, TailConfig
from fl_edge.imbnas.longtail import LongTailTask, make_task, tail_counts

TABLE = {  # section 3: largest and number of classes, ratio, total and smallest class
    (5000, 10, 10): (20431, 500),
    (5000, 10, 50): (13996, 100),
    (5000, 10, 100): (12406, 50),
    (5000, 10, 200): (11203, 25),
    (500, 100, 10): (19573, 50),
    (500, 100, 50): (12608, 10),
    (500, 100, 100): (10847, 5),
    (500, 100, 200): (9502, 2),
}


def image_set(sizes: list[int], first: int = 0) -> ImageSet:
    """One pixel an image, and no two alike."""
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)]).flip(0)
    images = torch.arange(first, first + len(labels), dtype=torch.float32).reshape(-1, 1, 1, 1)
    return ImageSet(images, labels, [f"c{label}" for label in range(len(sizes))])


def names(images: ImageSet) -> set[int]:
    return {int(value) for value in images.images.flatten()}


def task(sizes: list[int], seed: int = 1, **changes: Any) -> LongTailTask:
    return make_task(image_set(sizes), image_set([3] * len(sizes), 10**6), TailConfig(**changes), seed)


@pytest.mark.parametrize(("setting", "expected"), TABLE.items())
def test_counts_are_those_of_the_table(setting: tuple[int, int, int], expected: tuple[int, int]) -> None:
    largest, classes, ratio = setting
    counts = tail_counts("exponential", largest, classes, ratio)
    assert (sum(counts), counts[-1], counts[0]) == (*expected, largest)
    assert counts == sorted(counts, reverse=True)
    cut = task([largest] * classes, ratio=ratio, validation_per_class=0)
    assert cut.counts.tolist() == counts
    assert len(cut.validation) == 0


def test_step_profile() -> None:
    assert tail_counts("step", 5000, 10, 100) == [5000] * 5 + [50] * 5
    assert tail_counts("step", 7, 5, 2) == [7, 7, 3, 3, 3]


@settings(deadline=None)
@given(largest=st.integers(1, 6000), classes=st.integers(2, 200), profile=st.sampled_from(["exponential", "step"]))
def test_a_ratio_as_large_as_the_largest_class_leaves_one_image(largest: int, classes: int, profile: str) -> None:
    counts = tail_counts(profile, largest, classes, largest)
    assert (counts[0], counts[-1]) == (largest, 1)
    with pytest.raises(DataError, match=f"it must be at most {largest}"):
        tail_counts(profile, largest, classes, largest + 0.5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(20, 40), min_size=2, max_size=6), held=st.integers(0, 9))
def test_splits_are_disjoint_and_the_validation_split_is_balanced(seed: int, sizes: list[int], held: int) -> None:
    made = task(sizes, seed, ratio=10, validation_per_class=held)
    assert made.counts.tolist() == tail_counts("exponential", min(sizes) - held, len(sizes), 10)
    assert made.validation.label_counts().tolist() == [held] * len(sizes)
    train, validation = names(made.train), names(made.validation)
    assert len(train) == len(made.train)
    assert len(validation) == len(made.validation)
    assert not train & validation
    whole = image_set(sizes)
    for part in (made.train, made.validation):  # every image kept its label
        assert torch.equal(whole.labels[part.images.flatten().long()], part.labels)


def test_the_seed_decides_and_a_steeper_tail_is_a_part_of_a_flatter_one() -> None:
    flat, steep, again = (task([50] * 5, ratio=ratio) for ratio in (5, 20, 20))
    assert names(steep.train) < names(flat.train)
    assert names(steep.validation) == names(flat.validation)
    assert torch.equal(steep.train.images, again.train.images)
    assert names(task([50] * 5, seed=2, ratio=20).validation) != names(steep.validation)


def test_a_natural_tail_is_kept_as_it_is() -> None:
    made = task([50, 20, 11], profile="natural", validation_per_class=10)
    assert made.counts.tolist() == [40, 10, 1]
    whole = make_task(
        image_set([9, 0, 3]), image_set([1] * 3), TailConfig(profile="natural", validation_per_class=0), 1
    )
    assert whole.counts.tolist() == [9, 0, 3]


def test_a_given_validation_split_holds_nothing_out() -> None:
    given_split = image_set([4, 6, 5], 500)
    made = make_task(image_set([30] * 3), image_set([5] * 3), TailConfig(ratio=30), 1, given_split)
    assert made.validation is given_split
    assert made.counts.tolist() == [30, 5, 1]


@pytest.mark.parametrize(
    ("sizes", "changes", "says"),
    [
        ([30] * 4, {"ratio": 21}, "ratio=21 leaves the smallest of 4 classes without images; it must be at most 20"),
        ([30, 10, 30], {}, "class c1 has 10 images; with validation_per_class=10 it must have at least 11"),
        ([30, 0, 30], {"validation_per_class": 0}, "class c1 has 0 images; with validation_per_class=0 .* at least 1"),
        ([30, 9, 3], {"profile": "natural"}, "class c2 has 3 images; with validation_per_class=10"),
        ([30], {}, "1 classes and ratio=100 make no tail"),
    ],
)
def test_what_makes_no_task_is_said_in_one_line(sizes: list[int], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        task(sizes, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [[20, 10, 2], [5, 0, 5], [11, 5, 11]])
def test_a_long_tailed_validation_split_is_refused(sizes: list[int]) -> None:
    with pytest.raises(
        DataError, match=r"the validation split has \d+ images of one class and \d of another"
    ) as caught:
        make_task(image_set([30] * 3), image_set([5] * 3), TailConfig(ratio=10), 1, image_set(sizes))
    assert "\n" not in str(caught.value)


def test_settings_are_checked() -> None:
    assert resolve(TailConfig, None, {"ratio": "50", "profile": "step"}).ratio == 50
    assert resolve(LossConfig, None, {}) == LossConfig()
    with pytest.raises(ConfigError, match=r"ratio=0\.5 is not allowed; it must be a number, at least 1\.0"):
        resolve(TailConfig, None, {"ratio": 0.5})
    with pytest.raises(ConfigError, match=r"few=200\.0 is above many=100\.0"):
        resolve(TailConfig, None, {"few": 200})
    with pytest.raises(DataError, match="profile=natural has no class sizes of its own"):
        tail_counts("natural", 10, 3, 2)
