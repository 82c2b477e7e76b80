"""Long-tailed tasks from balanced image sets (specification, section 3).

Source: the two profiles are those of LDAM-DRW's released code. *Ours*: the balanced validation split that is held out
before the tail is cut, draws that make the tail of a higher ratio a part of that of a lower one, and the refusals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_edge.data.images import ImageSet
from fl_edge.errors import DataError
from fl_edge.imbnas.config import TailConfig
from fl_edge.seeding import torch_rng

_ROUNDING = 1e-9  # 49 * (1 / 49) is a hair below 1, and must still be one image


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class LongTailTask:
    """A classification task whose training set has a long tail.

    Attributes
    ----------
    train
        Long-tailed.
    validation
        Balanced, disjoint from ``train``; empty where none was asked for. Search scores candidates on it.
    test
        As it came: never searched on.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    @property
    def counts(self) -> Tensor:
        """n_c, training images of every class, int64 (C,)."""
        return self.train.label_counts()


def tail_counts(profile: str, largest: int, classes: int, ratio: float) -> list[int]:
    """Return how many images each class keeps, in the order of the labels (section 3).

    Exponential: n_c = floor(n_max * (1 / rho)^(c / (C - 1))). Step: the first C // 2 classes keep n_max, the others
    floor(n_max / rho); that an odd class belongs to the small ones is ours.

    Parameters
    ----------
    profile
        ``exponential`` or ``step``.
    largest
        n_max, images of a class in the balanced set.
    classes
        C, at least 2.
    ratio
        rho, at least 1.

    Raises
    ------
    DataError
        Fewer than two classes, a ratio below 1, or one that leaves a class without images.
    """
    if profile not in ("exponential", "step"):
        raise DataError(f"profile={profile} has no class sizes of its own; it must be exponential or step")
    if classes < 2 or not ratio >= 1:
        raise DataError(f"{classes} classes and ratio={ratio:g} make no tail; it must be at least 2 and at least 1")
    if ratio > largest * (1 + _ROUNDING):
        raise DataError(
            f"ratio={ratio:g} leaves the smallest of {classes} classes without images; it must be at most {largest}, "
            "the images of the largest class"
        )
    if profile == "step":
        exponents = [float(c >= classes // 2) for c in range(classes)]
    else:
        exponents = [c / (classes - 1) for c in range(classes)]
    return [int(largest * (1 / ratio) ** exponent * (1 + _ROUNDING)) for exponent in exponents]


def make_task(
    train: ImageSet, test: ImageSet, config: TailConfig, seed: int, validation: ImageSet | None = None
) -> LongTailTask:
    """Hold out a balanced validation split, then cut the tail.

    n_max is what the smallest class has left. With ``validation_per_class=0`` nothing is held out, and a balanced set
    gives the counts of section 3's table. For one seed the validation split does not depend on the ratio, and the
    images of a higher ratio are a part of those of a lower one.

    Parameters
    ----------
    train
        The set to cut; for a tail of an exact ratio it must be balanced.
    test
        Passed through.
    config
        Profile, ratio, images held out of every class.
    seed
        Of the experiment; decides which images are held out and which are kept.
    validation
        A split that comes with the data; nothing is held out then.

    Raises
    ------
    DataError
        A class too small for the validation split, a ratio that leaves a class without images, a validation split that
        came with the data and is long-tailed itself.
    """
    held_out = 0 if validation is not None else config.validation_per_class
    sizes = train.label_counts()
    natural = config.profile == "natural"
    rarest = int(sizes.argmin())
    if int(sizes[rarest]) <= held_out and (held_out or not natural):
        raise DataError(
            f"class {train.classes[rarest]} has {int(sizes[rarest])} images; with validation_per_class={held_out} it "
            f"must have at least {held_out + 1}"
        )
    left = sizes - held_out
    kept = left.tolist() if natural else tail_counts(config.profile, int(left.min()), len(left), config.ratio)
    held_rows, kept_rows = [], []
    for label, count in enumerate(kept):
        rows = (train.labels == label).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=torch_rng(seed, "imbnas", "tail", label))]
        held_rows.append(rows[:held_out])
        kept_rows.append(rows[held_out : held_out + count])
    if validation is None:
        validation = train.subset(torch.cat(held_rows).sort().values)
    else:
        _require_balanced(validation, config)
    return LongTailTask(train.subset(torch.cat(kept_rows).sort().values), validation, test)


def _require_balanced(validation: ImageSet, config: TailConfig) -> None:
    sizes = validation.label_counts()
    most, least = int(sizes.max()), int(sizes.min())
    if not least or most > least * config.validation_ratio:
        raise DataError(
            f"the validation split has {most} images of one class and {least} of another, and would favour the head of "
            f"the tail; its ratio must be at most validation_ratio={config.validation_ratio:g}"
        )
