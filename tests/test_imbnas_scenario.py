"""The scenario `imbnas` from its settings to table and pictures, on a LocalGrid; what it is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_edge.data.config import DataConfig, PartitionConfig
from fl_edge.data.images import load_test, load_train
from fl_edge.errors import ConfigError, DataError, FlEdgeError
from fl_edge.imbnas.config import SuperConfig, TailConfig
from fl_edge.imbnas.longtail import make_task
from fl_edge.imbnas.source import balanced_source, device_shards, load_source
from fl_edge.link.local import LocalGrid
from simulations.client_app import app
from simulations.imbnas import run_imbnas
from simulations.scenario import ImbNasScenario, read_scenario
from tests.imbnas_scenario import SETTINGS, locally
from tests.tiny import same_bits
from tests.tiny_imbnas import SPACE


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_run_leaves_a_table_records_and_pictures_and_goes_on_where_it_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = locally(tmp_path), tmp_path / "local"
    printed = capsys.readouterr().out
    for said in ("search 2/2  best ", "search P0 2/2  best ", "training 2/2  loss ", "found together", "small ResNet"):
        assert said in printed
    names = {file.name for file in folder.iterdir()}
    assert {"config.yaml", "result.json", "confusion.png", "ranking.png", "classes.png"} <= names
    summary = json.loads((folder / "result.json").read_text())["summary"]
    assert summary["counts"] == [129, 77, 46, 27, 16, 9, 5, 3, 2, 1]
    assert {"balanced", "many", "medium", "few"} <= set(summary["contenders"]["found together"])
    assert summary["rounds"] == len((folder / "rounds.jsonl").read_text().splitlines()) == 6

    def kill(line: str) -> None:
        if "search 2/2" in line:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("simulations.imbnas.say", kill)
        with pytest.raises(KeyboardInterrupt):
            locally(tmp_path, "killed")
    scenario = read_scenario({"resume": str(tmp_path / "killed")})
    assert isinstance(scenario, ImbNasScenario)
    lines = list[str]()
    monkeypatch.setattr("simulations.imbnas.say", lines.append)
    grid = LocalGrid(app, 3, run_config={**SETTINGS, "resume": scenario.resume}, run_id=2)
    strategy = run_imbnas(grid, scenario)
    assert lines[0].startswith("2/6  search 2/2")  # the round that was not recorded is made again
    assert same_bits(strategy.snapshot()[0], whole["weights"])
    assert strategy.snapshot()[1]["scored"] == whole["record"]["scored"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ({"tail.validation_per_class": 0}, "validation_per_class=0 leaves nothing to score candidates on"),
        ({"tail.ratio": 5000.0}, "ratio=5000 leaves the smallest of 10 classes without images"),
        ({"imbnas.limit": 7}, "a limit of 7 multiply-adds is not allowed"),
        ({"imbnas.fewest": 4}, "imbnas.fewest=4 asks for more than the 3 devices"),
        ({"imbnas.procedure": "P2"}, "imbnas.procedure=P2 is not allowed"),
        ({"data.min_samples": 400}, "315 samples cannot give 3 devices min_samples=400 each"),
    ],
)
def test_what_cannot_run_is_one_line(override: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(FlEdgeError, match=says) as refused:
        locally(tmp_path, **override)
    assert isinstance(refused.value, ConfigError | DataError | FlEdgeError)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "local").exists()


def test_the_source_is_balanced_disjoint_from_validation_and_trained_once(tmp_path: Path) -> None:
    train, test = load_train(DataConfig(), 0), load_test(DataConfig(), 0)
    images = balanced_source(train, test, TailConfig(), 0)
    assert len(set(images.label_counts().tolist())) == 1
    task = make_task(train, test, TailConfig(), 0)
    seen = {image.numpy().tobytes() for image in images.images}
    assert not any(image.numpy().tobytes() in seen for image in task.validation.images)
    assert all(image.numpy().tobytes() in seen for image in task.train.images)
    recipe = SuperConfig(epochs=1)
    one = load_source(SPACE, images, recipe, 0)
    (folder,) = (tmp_path / "cache" / "supernets").glob("[!.]*")
    made = (folder / "supernet").stat().st_mtime_ns
    two = load_source(SPACE, images, recipe, 0)
    assert (folder / "supernet").stat().st_mtime_ns == made
    assert same_bits(dict(one.supernet.state_dict()), dict(two.supernet.state_dict()))
    assert same_bits(dict(one.head.state_dict()), dict(two.head.state_dict()))
    load_source(SPACE, images, recipe, 1)
    assert len(list((tmp_path / "cache" / "supernets").glob("[!.]*"))) == 2


def test_every_image_is_on_one_device() -> None:
    task = make_task(load_train(DataConfig(), 0), load_test(DataConfig(), 0), TailConfig(), 0)
    shards = device_shards(task, 8, PartitionConfig(alpha=0.5), 0)
    assert sum(train.label_counts() for train, _ in shards).tolist() == task.counts.tolist()  # type: ignore[union-attr]
    assert sum(len(held) for _, held in shards) == len(task.validation)
    assert any(0 in train.label_counts()[:4].tolist() for train, _ in shards)  # unequal on top of the tail
