"""Image data sets in the formats of Hugging Face: hub name, `save_to_disk` folder, image folder, parquet folder.

Columns and splits are found by type and name, and can be given in the config. Everything that can be wrong with a data
set ends in a DataError of one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_edge.data.config import DataConfig
from fl_edge.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_HUB_TIMEOUT_S = 10.0
_TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
_IMAGE_NAMES = ("image", "img", "picture")
_LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "F")


@dataclass(frozen=True, eq=False)
class Table:
    """One split, images still encoded: a device decodes no more than its own.

    Attributes
    ----------
    rows
        The Hugging Face data set.
    image_column
        Where its images are.
    labels
        int64 (n,), place of each row's label in the data set's list of classes.
    mode
        Mode of PIL that images are converted to, RGB or L.
    """

    rows: Dataset
    image_column: str
    labels: NDArray[np.int64]
    mode: str

    def images(self, indices: Sequence[int] | NDArray[np.int64], size: int) -> Tensor:
        """Decode some rows: uint8 (len(indices), channels, height, width); ``size`` 0 leaves them as they are.

        Raises
        ------
        DataError
            Images of different sizes with ``size`` 0, a missing or broken image.
        """
        arrays: list[NDArray[np.uint8]] = []
        for index in indices:
            pixels = self._decode(int(index), size)
            if arrays and pixels.shape != arrays[0].shape:
                raise DataError(
                    f"images differ in size, {_times(arrays[0])} and {_times(pixels)} pixels; set image_size"
                )
            arrays.append(pixels)
        stacked = torch.from_numpy(np.stack(arrays))
        return stacked.unsqueeze(1) if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous()

    def _decode(self, index: int, size: int) -> NDArray[np.uint8]:
        try:
            image = _eight_bits(self.rows[index][self.image_column]).convert(self.mode)
        except Exception as error:  # PIL raises several unrelated classes; a missing image is None
            raise DataError(f"row {index} holds no readable image in {self.image_column}: {_line(error)}") from None
        return np.array(image.resize((size, size)) if size else image, dtype=np.uint8)


def open_tables(config: DataConfig) -> tuple[Table, Table | None, list[str]]:
    """Open a data set and return (training split, test split or None, class names)."""
    splits = _splits(config)
    train_name = _train_name(config, list(splits))
    test_name = _test_name(config, [name for name in splits if name != train_name])
    image, label = _columns(config, splits[train_name])
    names = [train_name] + ([test_name] if test_name else [])
    values = {name: _label_values(config, splits[name], label) for name in names}
    classes, numbers = _classes(config, splits[train_name].features[label], values)
    mode = {"rgb": "RGB", "gray": "L"}.get(config.color) or _first_mode(config, splits[train_name], image)
    tables = {name: Table(splits[name], image, numbers[name], mode) for name in names}
    return tables[train_name], tables[test_name] if test_name else None, classes


def _splits(config: DataConfig) -> dict[str, Dataset]:
    import datasets  # noqa: PLC0415 - heavy

    folder = Path(config.source).expanduser()
    try:
        with _quiet():
            if folder.is_dir():
                loaded = _load_folder(folder, config.subset)
            elif _looks_like_path(config.source):
                raise DataError(
                    f"source={config.source} is not a folder; it must be digits, a folder, or a data set on the hub"
                )
            else:
                loaded = _load_hub(config.source, config.subset)
    except DataError:
        raise
    except Exception as error:  # datasets raises a wide choice of classes of its own and of others
        raise DataError(f"source={config.source} cannot be loaded: {_line(error)}") from None
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    if empty := [name for name, split in loaded.items() if not len(split)]:
        raise DataError(f"source={config.source}: split {empty[0]} is empty")
    return dict(loaded)


def _load_folder(folder: Path, subset: str) -> DatasetDict | Dataset:
    import datasets  # noqa: PLC0415 - heavy

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return datasets.load_from_disk(str(folder))
    return datasets.load_dataset(str(folder), subset or None)


def _load_hub(name: str, subset: str) -> DatasetDict | Dataset:
    """Load from the hub, or from what an earlier run left in the cache when the hub cannot be reached.

    Left alone, `datasets` tries an unreachable hub for 23 s and prints every attempt. One request with a time limit
    tells beforehand.
    """
    import datasets  # noqa: PLC0415 - heavy
    from huggingface_hub import HfApi  # noqa: PLC0415 - heavy
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415 - heavy

    known = f"source={name} is neither digits, nor a folder here, nor"
    before = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
        return datasets.load_dataset(name, subset or None)
    except HFValidationError:
        raise DataError(f"{known} a name that the Hugging Face hub can have") from None
    except HfHubHTTPError as error:
        raise DataError(f"{known} a data set that the Hugging Face hub gives out: {_line(error)}") from None
    except OSError as error:
        # huggingface_hub 0.x reports a dead network as an OSError, datasets a disk error as one too
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        unreachable = error
    except Exception as error:  # and 1.x as errors of httpx, which has a root of its own
        if not type(error).__module__.startswith("httpx"):
            raise
        unreachable = error  # type: ignore[assignment]
    datasets.config.HF_HUB_OFFLINE = True  # the only way to ask for the cache without a try of the network
    try:
        return datasets.load_dataset(name, subset or None)
    except ConnectionError:
        raise DataError(
            f"{known} in the cache, and the Hugging Face hub cannot be reached ({_line(unreachable)})"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _train_name(config: DataConfig, names: list[str]) -> str:
    wanted = config.train_split or ("train" if "train" in names else names[0] if len(names) == 1 else "")
    if wanted not in names:
        raise DataError(f"train_split={wanted or 'auto'} is not in {config.source}; it must be {_one_of(names)}")
    return wanted


def _test_name(config: DataConfig, names: list[str]) -> str | None:
    if not config.test_split:
        return next((name for name in _TEST_SPLITS if name in names), None)
    if config.test_split not in names:
        raise DataError(
            f"test_split={config.test_split} is not in {config.source} beside the training split; it must be "
            + (f"{_one_of(names)}, or empty" if names else "empty, for a part of the training split")
        )
    return config.test_split


def _columns(config: DataConfig, rows: Dataset) -> tuple[str, str]:
    """Return the names of the image and the label column: what was given, else the only one of its type or name."""
    import datasets  # noqa: PLC0415 - heavy

    features = dict(rows.features)
    image = _pick(
        config,
        "image_column",
        [n for n, feature in features.items() if isinstance(feature, datasets.Image)],
        _IMAGE_NAMES,
        list(features),
    )
    others = [name for name in features if name != image]
    typed = [name for name in others if isinstance(features[name], datasets.ClassLabel)]
    named = [name for name in others if name in _LABEL_NAMES]
    label = _pick(config, "label_column", typed or named, _LABEL_NAMES, others)
    return image, label


def _pick(config: DataConfig, key: str, found: list[str], usual: Sequence[str], columns: list[str]) -> str:
    wanted = getattr(config, key)
    if wanted:
        allowed = found if key == "image_column" else columns  # any values can be labels, not any can be images
        if wanted not in allowed:
            raise DataError(f"{key}={wanted} will not do for {config.source}; it must be {_one_of(allowed)}")
        return str(wanted)
    if len(found) > 1:
        found = [name for name in usual if name in found][:1] or found
    if len(found) != 1:
        problem = "several columns may be it" if found else "no column is of that kind"
        raise DataError(f"{key} of {config.source} is not clear, {problem}; it must be {_one_of(found or columns)}")
    return found[0]


def _label_values(config: DataConfig, rows: Dataset, column: str) -> NDArray[Any]:
    if column not in rows.column_names:
        raise DataError(f"label_column={column} is not in every split of {config.source}")
    values = np.asarray(rows[column][:])
    if values.ndim != 1 or values.dtype.kind not in "iubU":
        raise DataError(f"label_column={column} of {config.source} must hold one integer or text a row")
    return values


def _classes(
    config: DataConfig, feature: Any, values: dict[str, NDArray[Any]]
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


def _first_mode(config: DataConfig, rows: Dataset, column: str) -> str:
    try:
        return "L" if rows[0][column].mode in _GRAY_MODES else "RGB"
    except Exception as error:  # PIL raises several unrelated classes; a missing image is None
        raise DataError(f"row 0 of {config.source} holds no readable image in {column}: {_line(error)}") from None


def _eight_bits(image: Any) -> Any:
    """Scale an image of 16 bits to 8; PIL alone would cut everything above 255 off."""
    if not image.mode.startswith("I"):
        return image
    from PIL import Image  # noqa: PLC0415 - heavy

    return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _one_of(names: Sequence[str]) -> str:
    return "one of " + ", ".join(names) if len(names) > 1 else ", ".join(names) or "there, and none is"


def _times(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars of `datasets` off the terminal."""
    import datasets  # noqa: PLC0415 - heavy

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
