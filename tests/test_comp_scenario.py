"""The scenario `comp` from its settings to the models on the devices, on a LocalGrid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fl_edge.data.corpus import CorpusConfig, device_files
from fl_edge.errors import ConfigError, DataError, FlEdgeError
from fl_edge.link.local import LocalGrid
from fl_edge.pruning import load_pruned
from simulations.client_app import app
from simulations.comp import run_comp
from simulations.scenario import CompScenario, read_scenario
from tests.comp_scenario import locally, make_files
from tests.tiny import same_bits


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_files(tmp_path_factory.mktemp("files"))


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["local", "federated", "nested"])
def test_a_run_leaves_records_pictures_and_models_on_the_devices(
    mode: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = locally(tmp_path, settings, **{"comp.mode": mode})
    folder, printed = tmp_path / "local", capsys.readouterr().out
    assert "Models on the devices, before and after" in printed
    assert "device 3/3" in printed
    assert ("layer 4/4" in printed) == (mode != "local")
    names = {file.name for file in folder.iterdir()}
    assert {"config.yaml", "rounds.jsonl", "result.json", "devices.png", "layers.png"} <= names
    summary = json.loads((folder / "result.json").read_text())["summary"]
    assert [row["ratio"] for row in summary["devices"]] == ([0.2] * 3 if mode == "federated" else [0.2, 0.3, 0.4])
    assert (summary["up_bytes"] > 0) == (mode != "local")
    kinds = [row["kind"] for row in rounds(folder)]
    assert kinds == ["layer"] * (4 if mode != "local" else 0) + ["device"] * 3
    for row in report.devices:
        model = load_pruned(Path(row.outcome.folder))
        before, after = row.outcome.figures.parameters
        assert sum(tensor.numel() for tensor in model.parameters()) == after < before
        assert Path(row.outcome.folder).is_relative_to(tmp_path / "cache" / "comp" / row.device)


def test_a_killed_federated_run_goes_on_where_it_was(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = {**settings, "comp.mode": "federated"}
    locally(tmp_path, together, "whole")

    def kill(line: str) -> None:
        if line.startswith("layer 3/4"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("simulations.comp.say", kill)
        with pytest.raises(KeyboardInterrupt):
            locally(tmp_path, together, "killed")
    folder = tmp_path / "killed"
    config = {**together, "resume": str(folder)}
    scenario = read_scenario({"resume": str(folder)})
    assert isinstance(scenario, CompScenario)
    lines = list[str]()
    monkeypatch.setattr("simulations.comp.say", lines.append)
    run_comp(LocalGrid(app, 3, run_config=config, run_id=2), scenario)
    assert [line.split()[1] for line in lines if line.startswith("layer")] == ["4/4"]
    assert [row.get("report", {}).get("layer") for row in rounds(folder)] == [0, 1, 2, 3, None, None, None]
    for file in (tmp_path / "whole" / "model").glob("*.safetensors"):
        assert same_bits(load_file(file), load_file(folder / "model" / file.name))


def test_a_killed_local_run_asks_only_the_devices_that_were_not_done(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(line: str) -> None:
        if line.startswith("device 2/3"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("simulations.comp.say", kill)
        with pytest.raises(KeyboardInterrupt):
            locally(tmp_path, settings, "killed")
    folder = tmp_path / "killed"
    assert (folder / "checkpoints").is_dir()  # by which the launcher says how to go on
    scenario = read_scenario({"resume": str(folder)})
    assert isinstance(scenario, CompScenario)
    asked = list[str]()

    def listening(message: Any, context: Any) -> Any:
        asked.append(message.metadata.message_type)
        return app(message, context)

    grid = LocalGrid(listening, 3, run_config={**settings, "resume": str(folder)}, run_id=2)  # type: ignore[arg-type]
    report = run_comp(grid, scenario)
    assert asked.count("train.comp_prune") == 1
    assert [row.device for row in report.devices] == ["device-0", "device-1", "device-2"]
    assert [row["device"] for row in rounds(folder)] == ["device-0", "device-1", "device-2"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ({"model.name": "/nowhere/at/all"}, "name=/nowhere/at/all is not a folder"),
        ({"data.source": "/nowhere/at/all"}, "there is no text at /nowhere/at/all"),
        ({"data.source": ""}, "data.source must be a file or a folder of text"),
        ({"comp.ratios": "0.2 1.2"}, r"comp: ratios=0.2 1.2 must be numbers from 0 to 0.95"),
        ({"comp.ratios": "0.95", "comp.layer_share": 0.0}, "would have to lose"),
        ({"comp.fewest": 4}, "comp.fewest=4 asks for more than the 3 devices"),
        ({"comp.mode": "alone"}, "comp.mode=alone is not allowed"),
    ],
)
def test_what_cannot_run_is_one_line_before_anything_starts(
    override: dict[str, Any], says: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(FlEdgeError, match=says) as refused:
        locally(tmp_path, settings, **override)
    assert isinstance(refused.value, ConfigError | DataError)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "local").exists()


def test_too_little_text_is_one_line(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FlEdgeError, match="fewer than one sequence of 4096") as refused:
        locally(tmp_path, {**settings, "data.length": 4096})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "local").exists()


# --- files over devices ---


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_every_file_is_on_one_device_or_tested_on(partition: str) -> None:
    texts = [str(number) for number in range(53)]
    config = CorpusConfig(partition=partition, alpha=0.3)
    parts = [device_files(texts, config, 5, index, 6) for index in range(6)]
    tests = parts[0][1]
    assert all(test == tests for _, test in parts)
    assert sorted([*tests, *(text for own, _ in parts for text in own)], key=int) == texts
    sizes = [len(own) for own, _ in parts]
    assert min(sizes) >= 1
    assert (max(sizes) - min(sizes) <= 1) == (partition == "iid")
    assert device_files(texts, config, 6, 0, 6) != parts[0]


def test_fewer_files_than_devices_are_one_line() -> None:
    with pytest.raises(DataError, match="3 files of text, 1 of them to test on, cannot give 3 devices one each"):
        device_files(["a", "b", "c"], CorpusConfig(), 0, 0, 3)
    with pytest.raises(DataError, match="device 3 is not there"):
        device_files(["a", "b", "c", "d", "e"], CorpusConfig(), 0, 3, 3)
