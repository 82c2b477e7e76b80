"""Settings of the data room: where samples come from, and how they are spread over the devices.

Source of the partitions: MergeSFL (ICDE 2024) and its released code. *Ours* marks choices that neither states.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Self

from fl_edge.config import setting


@dataclass(unsafe_hash=True)
class PartitionConfig:
    """How samples are spread over the devices."""

    partition: str = setting(
        "dirichlet",
        "each class by a Dirichlet draw, few classes a device, evenly, or one class mostly on one device",
        choices=("dirichlet", "pathological", "iid", "dominant"),
    )
    alpha: float = setting(0.1, "concentration of the Dirichlet draw; the smaller, the more unequal", low=1e-6)
    classes_per_device: int = setting(2, "classes that a device holds in the pathological partition", low=1)
    dominant_share: float = setting(0.4, "rho: part of class j that goes to device j mod N", low=0.0, high=1.0)
    min_samples: int = setting(1, "least samples that a device must hold (ours)", low=1)


# fields that say how samples are spread; they do not change what is loaded
PARTITION_FIELDS = tuple(field.name for field in fields(PartitionConfig))


@dataclass(unsafe_hash=True)
class SourceConfig(PartitionConfig):
    """What every data set in a format of Hugging Face has: a source, splits, a column of labels."""

    BUNDLED: ClassVar[tuple[str, ...]] = ()  # sources that need no file and no network

    source: str = setting("", "a local folder, or the name of a data set on the hub")
    subset: str = setting("", "configuration of the data set, where it has several; empty: its only one")
    label_column: str = setting("", "column of the labels; empty: found by its type or name")
    train_split: str = setting("", "split to train on; empty: train, or the only one")
    test_split: str = setting("", "split to test on; empty: test, validation, or a part of the training split")
    test_fraction: float = setting(
        0.2, "part of the training split to test on where there is no test split (ours)", low=0.01, high=0.9
    )

    def loading(self) -> Self:
        """Return a copy with the partition's fields at their defaults: equal copies load equal samples."""
        return type(self)(**{f.name: getattr(self, f.name) for f in fields(self) if f.name not in PARTITION_FIELDS})


@dataclass(unsafe_hash=True)  # hashed by value, as the key of a cache
class DataConfig(SourceConfig):
    """Data set of images and partition."""

    BUNDLED: ClassVar[tuple[str, ...]] = ("digits", "synthetic")

    source: str = setting(
        "digits",
        "digits (comes with scikit-learn), synthetic (shapes and textures of CIFAR's size, made on the spot), a local "
        "folder, or the name of an image data set on the hub",
    )
    per_class: int = setting(600, "images of a class of synthetic, before a part is kept to test on", low=2)
    image_column: str = setting("", "column of the images; empty: found by its type")
    image_size: int = setting(0, "height and width in pixels after resizing; 0: as they are", low=0)
    color: str = setting("auto", "channels of an image; auto: as the first image has", choices=("auto", "rgb", "gray"))
    mean: float = setting(0.0, "subtracted from every pixel in [0, 1] (ours)", low=0.0, high=1.0)
    std: float = setting(1.0, "every pixel is divided by it after that (ours)", low=1e-6)


@dataclass(unsafe_hash=True)
class TextConfig(SourceConfig):
    """Data set of texts, to classify or to answer, and partition."""

    BUNDLED: ClassVar[tuple[str, ...]] = ("docstrings", "instructions")

    source: str = setting(
        "docstrings",
        "docstrings (of installed libraries, class = library), instructions (signatures of the standard library's "
        "functions), a local folder, or the name of a data set on the hub",
    )
    text_column: str = setting("", "column of the texts or instructions; empty: found by its type or name")
    pair_column: str = setting("", "column of second texts to classify together with the first; empty: none")
    response_column: str = setting("", "column of the answers to learn; empty: the texts are classified")
    libraries: str = setting("", "classes of docstrings, separated by spaces; empty: six that fl_edge depends on")
    per_class: int = setting(1000, "most docstrings of a class, or most instructions of a category", low=2)
    max_length: int = setting(64, "tokens of a text; what is longer is cut", low=4)
    alpha: float = setting(0.5, "concentration of the Dirichlet draw; the smaller, the more unequal", low=1e-6)

    @property
    def answers(self) -> bool:
        """Whether a causal language model learns to answer; otherwise texts are classified."""
        return self.source == "instructions" or bool(self.response_column)
