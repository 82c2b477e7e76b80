from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fl_edge.config import resolve
from fl_edge.data.config import DataConfig
from fl_edge.data.images import load_test, load_train
from fl_edge.data.partition import load_device
from fl_edge.errors import DataError

CLASSES = ("cat", "dog", "eel")


def picture(label: int, number: int, size: int = 6) -> Image.Image:
    """An image that tells its label by its first channel and its number by its second."""
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 40 * label + 10, number
    return Image.fromarray(pixels)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def table(rows: int = 30, **more: Any) -> Any:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageColumn

    labels = [row % 3 for row in range(rows)]
    kinds = {"name": Value("string"), "image": ImageColumn(), "label": ClassLabel(names=list(CLASSES))}
    values = {
        "name": [str(row) for row in range(rows)],
        "image": [picture(label, row) for row, label in enumerate(labels)],
        "label": labels,
    }
    return Dataset.from_dict(values | more, features=Features({k: kinds[k] for k in values}))


def image_folder(root: Path, splits: dict[str, int], size: int = 6) -> Path:
    for split, count in splits.items():
        for number in range(count):
            folder = root / split / CLASSES[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            picture(number % 3, number, size).save(folder / f"{number:03}.png")
    return root


def test_digits_are_split_80_to_20_by_class() -> None:
    train, test = load_train(DataConfig(), 1), load_test(DataConfig(), 1)
    assert (len(train), len(test)) == (1437, 360)
    assert train.shape == (1, 8, 8)
    assert train.classes == [str(digit) for digit in range(10)]
    assert train.labels.dtype == torch.int64
    assert (int(test.label_counts().min()), int(test.label_counts().max())) == (35, 37)
    images, labels = train.batch(torch.tensor([3, 0, 3]))
    assert images.shape == (3, 1, 8, 8)
    assert images.dtype == torch.float32
    assert torch.equal(images[0], images[2])
    assert torch.equal(labels, train.labels[[3, 0, 3]])
    whole, _ = train.batch()
    assert (float(whole.min()), float(whole.max())) == (0.0, 1.0)


def test_the_seed_decides_the_split_and_loading_is_cached() -> None:
    first, second = load_train(DataConfig(), 1), load_train(DataConfig(), 2)
    assert not torch.equal(first.labels, second.labels)
    assert load_train(DataConfig(alpha=7.0, partition="iid"), 1) is first


def test_digits_can_be_resized_coloured_and_normalised() -> None:
    small = load_train(DataConfig(image_size=4, color="rgb", mean=0.5, std=0.25), 1)
    assert small.shape == (3, 4, 4)
    images, _ = small.batch(torch.arange(5))
    torch.testing.assert_close(images, (small.images[:5] - 0.5) / 0.25)


@pytest.mark.parametrize("splits", [{"train": 30, "test": 9}, {"train": 30, "validation": 9}])
def test_image_folder_with_a_test_split(tmp_path: Path, splits: dict[str, int]) -> None:
    config = DataConfig(source=str(image_folder(tmp_path / "pictures", splits)))
    train, test = load_train(config, 1), load_test(config, 1)
    assert (len(train), len(test)) == (30, 9)
    assert train.classes == list(CLASSES)
    assert train.images.dtype == torch.uint8
    assert train.shape == (3, 6, 6)
    # every picture kept its own label
    assert torch.equal(train.images[:, 0, 0, 0].long(), 40 * train.labels + 10)
    images, _ = test.batch(torch.tensor([0]))
    assert float(images[0, 0, 0, 0]) == pytest.approx(int(test.images[0, 0, 0, 0]) / 255)


def test_saved_data_set_without_test_split_gets_a_stratified_one(tmp_path: Path) -> None:
    table(30).save_to_disk(str(tmp_path / "saved"))
    config = DataConfig(source=str(tmp_path / "saved"), test_fraction=0.3)
    train, test = load_train(config, 1), load_test(config, 1)
    assert train.label_counts().tolist() == [7, 7, 7]
    assert test.label_counts().tolist() == [3, 3, 3]
    numbers = torch.cat([train.images[:, 1, 0, 0], test.images[:, 1, 0, 0]])
    assert sorted(numbers.tolist()) == list(range(30))


def test_saved_dict_and_image_folder_agree(tmp_path: Path) -> None:
    from datasets import DatasetDict

    DatasetDict({"train": table(30), "test": table(9)}).save_to_disk(str(tmp_path / "saved"))
    folder = image_folder(tmp_path / "pictures", {"train": 30, "test": 9})
    one, two = (load_test(DataConfig(source=str(path)), 1) for path in (tmp_path / "saved", folder))

    def ordered(images: torch.Tensor) -> torch.Tensor:
        return images[images[:, 1, 0, 0].argsort()]

    assert torch.equal(ordered(one.images), ordered(two.images))


def test_parquet_folder_with_text_labels(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    (tmp_path / "rows").mkdir()
    features = Features({"photo": ImageColumn(), "animal": Value("string")})
    values = {"photo": [picture(n % 2, n) for n in range(10)], "animal": [("dog", "cat")[n % 2] for n in range(10)]}
    Dataset.from_dict(values, features=features).to_parquet(str(tmp_path / "rows" / "train.parquet"))
    config = DataConfig(source=str(tmp_path / "rows"), label_column="animal", color="gray", image_size=3)
    train = load_train(config, 1)
    assert train.classes == ["cat", "dog"]
    assert train.shape == (1, 3, 3)
    assert train.label_counts().tolist() == [4, 4]
    with pytest.raises(
        DataError, match=r"label_column of .* is not clear, no column is of that kind; it must be animal"
    ):
        load_train(DataConfig(source=str(tmp_path / "rows")), 1)


def test_devices_decode_only_their_share(tmp_path: Path) -> None:
    table(30).save_to_disk(str(tmp_path / "saved"))
    config = DataConfig(source=str(tmp_path / "saved"), partition="iid")
    parts = [load_device(config, 1, device, 4) for device in range(4)]
    assert sum(len(part) for part in parts) == len(load_train(config, 1)) == 24
    numbers = torch.cat([part.images[:, 1, 0, 0] for part in parts]).tolist()
    assert sorted(numbers) == sorted(load_train(config, 1).images[:, 1, 0, 0].tolist())
    assert load_device(config, 1, 0, 4) is parts[0]


def test_images_of_16_bits_are_scaled(tmp_path: Path) -> None:
    for name, value in (("a", 0), ("b", 65535)):
        (tmp_path / "deep" / "train" / name).mkdir(parents=True)
        for number in range(5):
            path = tmp_path / "deep" / "train" / name / f"{number}.png"
            Image.fromarray(np.full((4, 4), value, np.uint16)).save(path)
    train = load_train(DataConfig(source=str(tmp_path / "deep")), 1)
    assert train.shape == (1, 4, 4)
    assert torch.equal(train.images[:, 0, 0, 0].long(), 255 * train.labels)


def test_different_sizes_need_image_size(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "pictures", {"train": 9})
    picture(0, 99, size=12).save(root / "train" / "cat" / "large.png")
    (root / "train").rename(root / "test")
    image_folder(root, {"train": 3})
    with pytest.raises(DataError, match=r"images differ in size, .* pixels; set image_size"):
        load_test(DataConfig(source=str(root)), 1)
    assert load_test(DataConfig(source=str(root), image_size=8), 1).shape == (3, 8, 8)


def saved(tmp_path: Path, kind: str) -> str:
    """Make a data set with something wrong and return its folder."""
    from datasets import ClassLabel, Dataset, DatasetDict

    path = str(tmp_path / kind)
    if kind == "no_images":
        Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).save_to_disk(path)
    elif kind == "two_labels":
        more = table(9)
        more = more.add_column("first", more["label"][:]).rename_column("label", "second")
        more.cast_column("first", ClassLabel(names=list(CLASSES))).save_to_disk(path)
    elif kind == "hidden":
        DatasetDict({"train": table(9), "test": table(3, label=[-1, -1, -1])}).save_to_disk(path)
    elif kind == "hole":
        table(9, image=[picture(0, 0), *[None] * 8]).save_to_disk(path)
    elif kind == "nothing":
        Path(path).mkdir()
    else:
        table(9).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("no_images", {}, "image_column of .* no column is of that kind; it must be one of text, label"),
        ("two_labels", {}, "label_column of .* several columns may be it; it must be one of second, first"),
        ("hidden", {}, "split test of .* holds the label -1; it must be at least 0 and below 3"),
        ("hole", {"test_fraction": 0.34}, "row [1-8] holds no readable image in image"),
        ("nothing", {}, "cannot be loaded: .*"),
        ("good", {"image_column": "label"}, "image_column=label will not do for .*; it must be image"),
        ("good", {"label_column": "x"}, "label_column=x will not do for .*; it must be one of name, label"),
        ("good", {"train_split": "x"}, "train_split=x is not in .*; it must be train"),
        ("good", {"test_split": "x"}, "test_split=x is not in .* it must be empty"),
        ("good", {"test_fraction": 0.9}, "test_fraction=0.9 of 9 samples cannot be cut off class by class"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path: Path, kind: str, settings: Any, says: str) -> None:
    config = DataConfig(source=saved(tmp_path, kind), **settings)
    with pytest.raises(DataError, match=says) as caught:
        load_train(config, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/no/such/folder", "is not a folder"),
        ("./missing", "is not a folder"),
        ("no such name", "nor a name that the Hugging Face hub can have"),
        ("parquet", "parquet is a file format"),
        ("somebody/pictures", "nor in the cache, and the Hugging Face hub cannot be reached"),
    ],
)
@pytest.mark.usefixtures("_no_network")
def test_missing_sources_fail_at_once(source: str, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=says) as caught:
        load_train(DataConfig(source=source), 1)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A hub that has one data set; the list holds whether each load was asked to stay offline."""
    import datasets
    from huggingface_hub import HfApi

    asked: list[bool] = []

    def load(name: str, subset: str | None) -> Any:
        asked.append(datasets.config.HF_HUB_OFFLINE)
        return {"train": table(30), "test": table(9)}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: None)
    return asked


def test_hub_data_set_by_name(hub: list[bool]) -> None:
    assert len(load_test(DataConfig(source="somebody/animals"), 1)) == 9
    assert hub == [False]


def test_an_empty_split(hub: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: {"train": table(9), "test": table(9).select([])})
    with pytest.raises(DataError, match="source=somebody/half: split test is empty"):
        load_train(DataConfig(source="somebody/half"), 1)


@pytest.mark.usefixtures("_no_network")
def test_hub_data_set_from_the_cache(hub: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import HfApi

    def unreachable(self: Any, name: str, timeout: float) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    assert len(load_test(DataConfig(source="somebody/cached"), 1)) == 9
    assert hub == [True]
    assert not datasets.config.HF_HUB_OFFLINE


def test_config_goes_through_resolve() -> None:
    assert resolve(DataConfig, None, {"alpha": "0.5", "partition": "iid"}).alpha == 0.5


def test_importing_the_room_is_light() -> None:
    code = (
        "import sys, fl_edge.data.images, fl_edge.data.partition; "
        "print(sorted({'datasets', 'flwr_datasets', 'sklearn', 'flwr', 'PIL', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
