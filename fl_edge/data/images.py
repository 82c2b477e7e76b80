"""Images and labels in memory, loaded once a process.

Two sets need no network: the default, scikit-learn's bundled handwritten digits (1,797 of 8x8 pixels, 10 classes), and
what :mod:`fl_edge.data.synthetic` draws. CIFAR's own folders are read by :mod:`fl_edge.data.cifar`, and everything else
through :mod:`fl_edge.data.hub`.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fl_edge.data.cifar import is_cifar, open_cifar
from fl_edge.data.config import DataConfig
from fl_edge.data.holdout import hold_out
from fl_edge.data.hub import open_tables
from fl_edge.data.synthetic import CLASSES, synthetic_images
from fl_edge.data.table import Table

_LOADING = threading.RLock()  # clients in threads of one process would load the same data side by side


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class ImageSet:
    """Labelled images. Sets are shared inside a process: read them, do not write to them.

    Attributes
    ----------
    images
        (n, channels, height, width), uint8, or float32 in [0, 1].
    labels
        int64 (n,), in [0, len(classes)).
    classes
        Names.
    mean, std
        Subtracted from pixels in [0, 1], and the divisor after that.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    mean: float = 0.0
    std: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one image."""
        return tuple(self.images.shape[1:])

    def batch(self, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (images float32 (d, c, h, w) normalised, labels int64 (d,)) of some samples, or of all.

        Parameters
        ----------
        indices
            int64 (d,); None for every sample in order.
        """
        images, labels = (self.images, self.labels) if indices is None else (self.images[indices], self.labels[indices])
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return (scaled - self.mean) / self.std, labels

    def label_counts(self) -> Tensor:
        """Return the samples of every class, int64 (classes,)."""
        return torch.bincount(self.labels, minlength=len(self.classes))

    def subset(self, indices: Tensor) -> ImageSet:
        """Return a set of some samples, int64 (d,), in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True, eq=False)
class Split:
    """One split that may still be encoded; `rows` are its places in the table or tensor that it was cut from."""

    pixels: Table | Tensor
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: list[str]

    def read(self, config: DataConfig, indices: NDArray[np.int64] | None = None) -> ImageSet:
        """Decode some samples, or all, and return them as tensors."""
        chosen = np.arange(len(self.rows)) if indices is None else indices
        rows = self.rows[chosen]
        images = (
            self.pixels.images(rows, config.image_size)
            if isinstance(self.pixels, Table)
            else self.pixels[torch.from_numpy(rows)]
        )
        return ImageSet(images, torch.from_numpy(self.labels[chosen]), self.classes, config.mean, config.std)


def load_train(config: DataConfig, seed: int) -> ImageSet:
    """Return the whole training set; cached by process.

    Parameters
    ----------
    config
        What to load. The partition's fields play no part.
    seed
        Of the experiment; decides the split where a data set has no test split.

    Raises
    ------
    DataError
        A data set that is not there, has no images, or does not hold what the config names.
    """
    return _images(config.loading(), seed, train=True)


def load_test(config: DataConfig, seed: int) -> ImageSet:
    """Return the test set; see :func:`load_train`."""
    return _images(config.loading(), seed, train=False)


def open_splits(config: DataConfig, seed: int) -> tuple[Split, Split]:
    """Return (training, test) split without decoding images; cached by process. See :func:`load_train`."""
    with _LOADING:
        return _open(config.loading(), seed)


def _images(config: DataConfig, seed: int, *, train: bool) -> ImageSet:
    with _LOADING:
        return _read(config, seed, train)


@functools.lru_cache(maxsize=4)
def _read(config: DataConfig, seed: int, train: bool) -> ImageSet:
    return _open(config, seed)[0 if train else 1].read(config)


@functools.lru_cache(maxsize=2)
def _open(config: DataConfig, seed: int) -> tuple[Split, Split]:
    if config.source in config.BUNDLED:
        pixels, labels, classes = _digits() if config.source == "digits" else _synthetic(config)
        return _stratified(_as_asked(pixels, config), labels, classes, config, seed)
    if is_cifar(config.source):
        training, testing, classes = open_cifar(config)
        whole = [_whole(_as_asked(images, config), labels, classes) for images, labels in (training, testing)]
        return whole[0], whole[1]
    train, test, classes = open_tables(config)
    if test is None:
        return _stratified(train, train.labels, classes, config, seed)
    return _whole(train, train.labels, classes), _whole(test, test.labels, classes)


def _whole(pixels: Table | Tensor, labels: NDArray[np.int64], classes: list[str]) -> Split:
    return Split(pixels, np.arange(len(labels)), labels, classes)


def _digits() -> tuple[Tensor, NDArray[np.int64], list[str]]:
    from sklearn.datasets import load_digits  # noqa: PLC0415 - heavy

    loaded = load_digits()
    images = torch.from_numpy(loaded.images).float().div(16).unsqueeze(1)  # pixels are 0 to 16
    return images, loaded.target.astype(np.int64), [str(digit) for digit in range(10)]


def _synthetic(config: DataConfig) -> tuple[Tensor, NDArray[np.int64], list[str]]:
    return *synthetic_images(config.per_class), list(CLASSES)


def _as_asked(images: Tensor, config: DataConfig) -> Tensor:
    """Resize and recolour images, uint8 or float in [0, 1]; what is resized becomes float."""
    if config.image_size:
        size = (config.image_size, config.image_size)
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images
        images = functional.interpolate(scaled, size, mode="bilinear", antialias=True)
    if config.color == "gray" and images.shape[1] == 3:
        images = images.float().mean(dim=1, keepdim=True).to(images.dtype)
    return images.expand(-1, 3, -1, -1) if config.color == "rgb" else images


def _stratified(
    pixels: Table | Tensor, labels: NDArray[np.int64], classes: list[str], config: DataConfig, seed: int
) -> tuple[Split, Split]:
    """Cut a test set off that has as much of every class as the whole has."""
    splits = [Split(pixels, rows, labels[rows], classes) for rows in hold_out(labels, config, seed)]
    return splits[0], splits[1]
