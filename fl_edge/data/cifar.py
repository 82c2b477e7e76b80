"""CIFAR-10 and CIFAR-100 from the folders that their authors give out, in the binary version.

A record is one byte of label (CIFAR-100: coarse label, fine label) and 3,072 of pixels: 32x32 of red, of green, of
blue. The Python version of the same folders holds pickles, which are never opened here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_edge.data.config import DataConfig
from fl_edge.errors import DataError

Labelled = tuple[Tensor, NDArray[np.int64]]

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Layout:
    """Files of one of the two sets; ``names`` has the file of class names for every kind of label, in their order."""

    train: tuple[str, ...]
    test: str
    pickled: tuple[str, ...]
    names: dict[str, str]


_LAYOUTS = (
    _Layout(
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        "test_batch.bin",
        ("data_batch_1", "batches.meta"),
        {"label": "batches.meta.txt"},
    ),
    _Layout(
        ("train.bin",),
        "test.bin",
        ("train", "meta"),
        {"coarse_label": "coarse_label_names.txt", "fine_label": "fine_label_names.txt"},
    ),
)


def is_cifar(source: str) -> bool:
    """Return whether a source is a folder of CIFAR, of either version."""
    folder = Path(source).expanduser()
    return any(
        all((folder / name).is_file() for name in names)
        for layout in _LAYOUTS
        for names in (layout.train[:1], layout.pickled)
    )


def open_cifar(config: DataConfig) -> tuple[Labelled, Labelled, list[str]]:
    """Return training images uint8 (n, 3, 32, 32) and labels int64 (n,), the same of the test set, and class names.

    Parameters
    ----------
    config
        ``source`` is the folder; ``label_column`` may be ``coarse_label`` for CIFAR-100.

    Raises
    ------
    DataError
        A folder of pickles, a file that is missing or cut off, a label that does not exist.
    """
    folder = Path(config.source).expanduser()
    layout = next((layout for layout in _LAYOUTS if (folder / layout.train[0]).is_file()), None)
    if layout is None:
        raise DataError(f"source={config.source} holds pickles, which are not opened; take CIFAR's binary version")
    kinds = list(layout.names)
    kind = config.label_column or kinds[-1]
    if kind not in kinds:
        raise DataError(f"label_column={kind} is not in {config.source}; it must be {' or '.join(kinds)}")
    try:
        lines = (folder / layout.names[kind]).read_text().split("\n")
        classes = [line.strip() for line in lines if line.strip()]
        train = [_read(folder / name, kinds.index(kind), len(kinds), len(classes)) for name in layout.train]
        test = _read(folder / layout.test, kinds.index(kind), len(kinds), len(classes))
    except OSError as error:
        raise DataError(f"source={config.source}: cannot read {error.filename}: {error.strerror}") from None
    images, labels = zip(*train, strict=True)
    return (torch.cat(images), np.concatenate(labels)), test, classes


def _read(file: Path, place: int, labels: int, classes: int) -> Labelled:
    found = np.fromfile(file, np.uint8)
    if not len(found) or len(found) % (labels + _PIXELS):
        raise DataError(f"{file} has {len(found)} bytes; it must be a multiple of {labels + _PIXELS}, and some")
    records = found.reshape(-1, labels + _PIXELS)
    chosen = records[:, place].astype(np.int64)
    if chosen.max() >= classes:
        raise DataError(f"{file} holds the label {chosen.max()}; it must be below {classes}")
    return torch.from_numpy(records[:, labels:].reshape(-1, 3, 32, 32).copy()), chosen
