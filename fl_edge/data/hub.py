"""Data sets in the formats of Hugging Face: hub name, `save_to_disk` folder, folder of images, parquet, JSON or CSV.

Columns and splits are found by type and name, and can be given in the config. Everything that can be wrong with a data
set ends in a DataError of one line.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fl_edge.data.columns import classes, columns, label_values, testing_split, training_split
from fl_edge.data.config import DataConfig, SourceConfig
from fl_edge.data.table import Table, first_line, first_mode
from fl_edge.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_HUB_TIMEOUT_S = 10.0


def open_tables(config: DataConfig) -> tuple[Table, Table | None, list[str]]:
    """Open a data set of images and return (training split, test split or None, class names)."""
    splits = open_splits(config)
    train = training_split(config, list(splits))
    test = testing_split(config, [name for name in splits if name != train])
    image, label = columns(config, splits[train])
    values = {name: label_values(config, splits[name], label) for name in (train, test) if name}
    names, labels = classes(config, splits[train].features[label], values)
    mode = {"rgb": "RGB", "gray": "L"}.get(config.color) or first_mode(splits[train], image)
    tables = {name: Table(splits[name], image, labels[name], mode) for name in values}
    return tables[train], tables[test] if test else None, names


def open_splits(config: SourceConfig) -> dict[str, Dataset]:
    """Open a data set and return its splits by name, none of them empty."""
    import datasets  # noqa: PLC0415 - heavy

    folder, bundled = Path(config.source).expanduser(), ", ".join(config.BUNDLED)
    try:
        with _quiet():
            if folder.is_dir():
                loaded = _load_folder(folder, config.subset)
            elif _looks_like_path(config.source):
                raise DataError(
                    f"source={config.source} is not a folder; it must be {bundled}, a folder, or a data set on the hub"
                )
            else:
                loaded = _load_hub(config.source, config.subset, bundled)
    except DataError:
        raise
    except Exception as error:  # datasets raises a wide choice of classes of its own and of others
        raise DataError(f"source={config.source} cannot be loaded: {first_line(error)}") from None
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


def _load_hub(name: str, subset: str, bundled: str) -> DatasetDict | Dataset:
    """Load from the hub, or from what an earlier run left in the cache when the hub cannot be reached.

    Left alone, `datasets` tries an unreachable hub for 23 s and prints every attempt. One request with a time limit
    tells beforehand.
    """
    import datasets  # noqa: PLC0415 - heavy
    from huggingface_hub import HfApi  # noqa: PLC0415 - heavy
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415 - heavy

    unreachable: Exception
    known = f"source={name} is neither {bundled}, nor a folder here, nor"
    if name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}"):
        raise DataError(f"{known} a data set; {name} is a file format")  # load_dataset would read the working directory
    before = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
        return datasets.load_dataset(name, subset or None)
    except HFValidationError:
        raise DataError(f"{known} a name that the Hugging Face hub can have") from None
    except HfHubHTTPError as error:
        raise DataError(f"{known} a data set that the Hugging Face hub gives out: {first_line(error)}") from None
    except OSError as error:
        # huggingface_hub 0.x reports a dead network as an OSError, datasets a disk error as one too
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        unreachable = error
    except Exception as error:  # and 1.x as errors of httpx, which has a root of its own
        if not type(error).__module__.startswith("httpx"):
            raise
        unreachable = error
    datasets.config.HF_HUB_OFFLINE = True  # the only way to ask for the cache without a try of the network
    try:
        return datasets.load_dataset(name, subset or None)
    except ConnectionError:
        raise DataError(
            f"{known} in the cache, and the Hugging Face hub cannot be reached ({first_line(unreachable)})"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


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
