"""Which split, which column, which classes: found by type and name, or as the config says.

Everything that is not clear ends in a DataError of one line that names the choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fl_edge.data.config import DataConfig, SourceConfig
from fl_edge.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
_IMAGE_NAMES = ("image", "img", "picture")
_LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")


def training_split(config: SourceConfig, names: list[str]) -> str:
    """Return the name of the training split."""
    wanted = config.train_split or ("train" if "train" in names else names[0] if len(names) == 1 else "")
    if wanted not in names:
        raise DataError(f"train_split={wanted or 'auto'} is not in {config.source}; it must be {_one_of(names)}")
    return wanted


def testing_split(config: SourceConfig, names: list[str]) -> str | None:
    """Return the name of the test split among the other splits; None: there is none."""
    if not config.test_split:
        return next((name for name in _TEST_SPLITS if name in names), None)
    if config.test_split not in names:
        raise DataError(
            f"test_split={config.test_split} is not in {config.source} beside the training split; it must be "
            + (f"{_one_of(names)}, or empty" if names else "empty, for a part of the training split")
        )
    return config.test_split


def columns(config: DataConfig, rows: Dataset) -> tuple[str, str]:
    """Return the names of the image and the label column: what was given, else the only one of its type or name."""
    import datasets  # noqa: PLC0415 - heavy

    features = dict(rows.features)
    image = pick(
        config,
        "image_column",
        [n for n, feature in features.items() if isinstance(feature, datasets.Image)],
        _IMAGE_NAMES,
        list(features),
    )
    return image, label_column(config, rows, [name for name in features if name != image])


def label_column(config: SourceConfig, rows: Dataset, others: list[str]) -> str:
    """Return the name of the label column among the columns that are nothing else."""
    import datasets  # noqa: PLC0415 - heavy

    typed = [name for name in others if isinstance(rows.features[name], datasets.ClassLabel)]
    named = [name for name in others if name in _LABEL_NAMES]
    return pick(config, "label_column", typed or named, _LABEL_NAMES, others)


def pick(config: SourceConfig, key: str, found: list[str], usual: Sequence[str], columns: list[str]) -> str:
    """Return the one column for a setting: what was given, else the only one found, else the first of usual name."""
    wanted = getattr(config, key)
    if wanted:
        # any values can be labels, not any can be images or texts
        allowed = columns if key == "label_column" else found
        if wanted not in allowed:
            raise DataError(f"{key}={wanted} will not do for {config.source}; it must be {_one_of(allowed)}")
        return str(wanted)
    if len(found) > 1:
        found = [name for name in usual if name in found][:1] or found
    if len(found) != 1:
        problem = "several columns may be it" if found else "no column is of that kind"
        raise DataError(f"{key} of {config.source} is not clear, {problem}; it must be {_one_of(found or columns)}")
    return found[0]


def label_values(config: SourceConfig, rows: Dataset, column: str) -> NDArray[Any]:
    """Return a column as integers or text, (n,)."""
    if column not in rows.column_names:
        raise DataError(f"label_column={column} is not in every split of {config.source}")
    values = np.asarray(rows[column][:])
    if values.ndim != 1 or values.dtype.kind not in "iubU":
        raise DataError(f"label_column={column} of {config.source} must hold one integer or text a row")
    return values


def classes(
    config: SourceConfig, feature: Any, values: dict[str, NDArray[Any]]
) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
    """Return class names, and labels as places in them; without names of its own, a data set's classes are its values.

    Raises
    ------
    DataError
        A label outside the classes; some hub data sets hide the labels of their test split as -1.
    """
    names = getattr(feature, "names", None)
    if not names:
        found = np.unique(np.concatenate(list(values.values())))
        return [str(value) for value in found], {k: np.searchsorted(found, v) for k, v in values.items()}
    for split, labels in values.items():
        if len(outside := labels[(labels < 0) | (labels >= len(names))]):
            raise DataError(
                f"split {split} of {config.source} holds the label {outside[0]}; it must be at least 0 and below "
                f"{len(names)}; choose another split"
            )
    return list(names), {k: v.astype(np.int64) for k, v in values.items()}


def _one_of(names: Sequence[str]) -> str:
    return "one of " + ", ".join(names) if len(names) > 1 else ", ".join(names) or "there, and none is"
