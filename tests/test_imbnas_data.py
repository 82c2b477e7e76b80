"""Data of IMB-NAS: CIFAR by hub name or local folder, and the synthetic set."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.ensemble import RandomForestClassifier

from fl_edge.data.config import DataConfig
from fl_edge.data.images import ImageSet, load_test, load_train
from fl_edge.errors import DataError
from fl_edge.imbnas.config import TailConfig
from fl_edge.imbnas.longtail import make_task, tail_counts

SYNTHETIC = DataConfig(source="synthetic", per_class=40, test_fraction=0.25)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pixels(label: int, number: int) -> np.ndarray:
    """(3, 32, 32): the label in red, the number in blue."""
    found = np.zeros((3, 32, 32), np.uint8)
    found[0], found[2, 0, 0] = label, number
    return found


def on_the_hub(classes: int, rows: int) -> Any:
    """A split in the layout of the hub's cifar10 (10 classes) or cifar100 (100, with coarse labels)."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    labels = [row % classes for row in range(rows)]
    name = "fine_label" if classes == 100 else "label"
    values: dict[str, Any] = {
        "img": [Image.fromarray(pixels(label, row).transpose(1, 2, 0)) for row, label in enumerate(labels)],
        name: labels,
    }
    kinds: dict[str, Any] = {"img": ImageColumn(), name: ClassLabel(num_classes=classes)}
    if classes == 100:
        values["coarse_label"], kinds["coarse_label"] = [label // 5 for label in labels], ClassLabel(num_classes=20)
    return Dataset.from_dict(values, features=Features(kinds))


def check(train: ImageSet, test: ImageSet, classes: int, rows: int) -> None:
    assert (len(train), len(test)) == (rows, classes)
    assert train.shape == (3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert len(train.classes) == classes
    for part in (train, test):
        assert torch.equal(part.images[:, 0, 5, 5].long(), part.labels)
        assert part.images[:, 1].max() == 0
    assert sorted(train.images[:, 2, 0, 0].tolist()) == list(range(rows))


@pytest.mark.parametrize(("classes", "rows"), [(10, 60), (100, 200)])
@pytest.mark.parametrize("layout", ["saved", "parquet", "hub"])
def test_cifar_of_the_hub(
    layout: str, classes: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import HfApi

    splits = datasets.DatasetDict({"train": on_the_hub(classes, rows), "test": on_the_hub(classes, classes)})
    source = tmp_path / "cifar"
    if layout == "saved":
        splits.save_to_disk(str(source))
    elif layout == "parquet":  # a clone of the hub's repository
        for name, split in splits.items():
            (source / f"cifar{classes}").mkdir(parents=True, exist_ok=True)
            split.to_parquet(str(source / f"cifar{classes}" / f"{name}-00000-of-00001.parquet"))
    else:
        monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, timeout: None)
        monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: splits)
        source = Path(f"cifar{classes}")
    config = DataConfig(source=str(source))
    check(load_train(config, 1), load_test(config, 1), classes, rows)


def binary(root: Path, classes: int, rows: int) -> Path:
    """The folder that CIFAR's authors give out, with fewer images."""
    root.mkdir()

    def write(name: str, numbers: range) -> None:
        heads = [bytes([n % classes // 5, n % classes] if classes == 100 else [n % classes]) for n in numbers]
        records = [head + pixels(n % classes, n).tobytes() for n, head in zip(numbers, heads, strict=True)]
        (root / name).write_bytes(b"".join(records))

    if classes == 10:
        for batch in range(5):
            write(f"data_batch_{batch + 1}.bin", range(batch * rows // 5, (batch + 1) * rows // 5))
        write("test_batch.bin", range(10))
        (root / "batches.meta.txt").write_text("".join(f"c{c}\n" for c in range(10)) + "\n")
    else:
        write("train.bin", range(rows))
        write("test.bin", range(100))
        (root / "fine_label_names.txt").write_text("".join(f"c{c}\n" for c in range(100)))
        (root / "coarse_label_names.txt").write_text("".join(f"c{c}\n" for c in range(20)))
    return root


@pytest.mark.parametrize(("classes", "rows"), [(10, 60), (100, 200)])
def test_cifars_own_folders(classes: int, rows: int, tmp_path: Path) -> None:
    config = DataConfig(source=str(binary(tmp_path / "own", classes, rows)))
    train = load_train(config, 1)
    check(train, load_test(config, 1), classes, rows)
    assert train.classes == [f"c{c}" for c in range(classes)]
    small = load_train(DataConfig(source=config.source, image_size=16, color="gray"), 1)
    assert small.shape == (1, 16, 16)


def test_coarse_labels(tmp_path: Path) -> None:
    config = DataConfig(source=str(binary(tmp_path / "own", 100, 200)), label_column="coarse_label")
    train = load_train(config, 1)
    assert len(train.classes) == 20
    assert torch.equal(train.labels, train.images[:, 0, 5, 5].long() // 5)


def test_a_tail_cut_from_a_folder_has_the_sizes_of_the_formula(tmp_path: Path) -> None:
    config = DataConfig(source=str(binary(tmp_path / "own", 10, 250)))
    task = make_task(load_train(config, 1), load_test(config, 1), TailConfig(ratio=20, validation_per_class=5), 1)
    assert task.counts.tolist() == tail_counts("exponential", 20, 10, 20)
    assert torch.equal(task.train.images[:, 0, 5, 5].long(), task.train.labels)
    assert len(task.test) == 10


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("pickles", "holds pickles, which are not opened; take CIFAR's binary version"),
        ("cut", r"data_batch_3.bin has 36875 bytes; it must be a multiple of 3073"),
        ("empty", r"data_batch_3.bin has 0 bytes"),
        ("label", "data_batch_3.bin holds the label 77; it must be below 10"),
        ("missing", "cannot read .*data_batch_3.bin: No such file or directory"),
        ("column", "label_column=fine_label is not in .*; it must be label"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(harm: str, says: str, tmp_path: Path) -> None:
    folder = binary(tmp_path / "own", 10, 60)
    victim = folder / "data_batch_3.bin"
    whole = victim.read_bytes()
    if harm == "pickles":
        for file in folder.iterdir():
            file.rename(file.with_name(file.name.removesuffix(".bin").removesuffix(".txt")))
    elif harm == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"cut": whole[:-1], "empty": b"", "label": b"\x4d" + whole[1:]}.get(harm, whole))
    with pytest.raises(DataError, match=says) as caught:
        load_train(DataConfig(source=str(folder), label_column="fine_label" if harm == "column" else ""), 1)
    assert "\n" not in str(caught.value)


def test_the_synthetic_set_needs_nothing_and_is_always_the_same() -> None:
    train, test = load_train(SYNTHETIC, 1), load_test(SYNTHETIC, 1)
    assert train.shape == (3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert len(train.classes) == 10
    assert train.label_counts().tolist() == [30] * 10
    assert test.label_counts().tolist() == [10] * 10
    other = load_train(SYNTHETIC, 2)
    assert not torch.equal(train.images, other.images)  # the seed decides the split

    def ordered(*parts: ImageSet) -> list[bytes]:
        return sorted(image.numpy().tobytes() for part in parts for image in part.images)

    assert ordered(train, test) == ordered(other, load_test(SYNTHETIC, 2))
    assert len(set(ordered(train, test))) == 400
    grey = load_train(DataConfig(source="synthetic", per_class=40, image_size=16, color="gray"), 1)
    assert grey.shape == (1, 16, 16)
    assert float(grey.batch()[0].max()) <= 1


def test_colours_do_not_tell_synthetic_classes_apart_but_spatial_frequencies_do() -> None:
    """Chance is 0.1."""
    config = DataConfig(source="synthetic", per_class=120, test_fraction=0.25)
    (x, y), (test_x, test_y) = load_train(config, 1).batch(), load_test(config, 1).batch()

    def spectrum(images: torch.Tensor) -> torch.Tensor:
        plain = images - images.mean((2, 3), keepdim=True)
        magnitudes: torch.Tensor = torch.fft.rfft2(plain).abs()
        return magnitudes.mean(1).flatten(1)

    def score(features: Callable[[torch.Tensor], torch.Tensor]) -> float:
        forest = RandomForestClassifier(50, random_state=0).fit(features(x), y)
        return float(forest.score(features(test_x), test_y))

    assert score(lambda images: images.mean((2, 3))) < 0.2
    assert score(spectrum) > 0.3
