"""The scenario `fedspine` from its settings to what the user takes home, on a LocalGrid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fl_edge.checkpoints import load_checkpoint
from fl_edge.errors import ConfigError, RunFolderError
from fl_edge.link.local import LocalGrid
from fl_edge.pruning import load_pruned
from simulations.client_app import app
from simulations.fedspine import run_fedspine
from simulations.scenario import FedSpineScenario, read_scenario
from tests.fedspine_scenario import WORDS, locally, make_files
from tests.tiny import same_bits


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_files(tmp_path_factory.mktemp("files"))


def test_a_run_leaves_records_pictures_and_models_that_load_with_one_call(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locally(tmp_path, settings)
    folder = tmp_path / "local"
    printed = capsys.readouterr().out
    assert "round 6/6" in printed
    assert "Models to take home" in printed
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert len(rounds) == 6
    assert all(len(one["devices"]) == 4 for one in rounds)
    assert all(device["why"] for one in rounds for device in one["devices"])
    assert rounds[-1]["test_loss"] < rounds[0]["test_loss"]
    result = json.loads((folder / "result.json").read_text())
    assert result["summary"]["sparsity_max"] == pytest.approx(0.5, abs=0.03)
    assert len(list(folder.glob("*.png"))) >= 3
    (taken,) = result["summary"]["models"]
    home = folder / "models" / taken["folder"]
    model, tokenizer = load_pruned(home), AutoTokenizer.from_pretrained(home)
    with torch.inference_mode():
        scores = model(**tokenizer(list(WORDS), padding=True, return_tensors="pt")).logits
    assert scores.shape == (3, 3)
    config: Any = model.config
    answers = [config.id2label[int(label)] for label in scores.argmax(1)]
    assert sum(answer in words for answer, words in zip(answers, WORDS, strict=True)) >= 2


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = locally(tmp_path / "whole", settings)
    (tmp_path / "killed").mkdir()

    def kill(line: str) -> None:
        if line.startswith("round 4/6"):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simulations.fedspine.say", kill)
        with pytest.raises(KeyboardInterrupt):
            locally(tmp_path / "killed", settings)
    config = {"resume": str(tmp_path / "killed" / "local")}
    scenario = read_scenario(config)
    assert isinstance(scenario, FedSpineScenario)
    run_fedspine(LocalGrid(app, 4, run_config={**settings, **config}), scenario)
    resumed = load_checkpoint(tmp_path / "killed" / "local" / "checkpoints")
    assert resumed is not None
    assert same_bits(resumed.weights, whole["weights"])
    assert resumed.record == whole["record"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ({"fedspine.ranks": "0 4"}, "fedspine: ranks=0 4 must be whole numbers of at least 1"),
        ({"fedspine.ranks": "4 64"}, "ranks=4 64 are not allowed; the narrowest layer has a width of 32"),
        ({"fedspine.schedule.target": 1.0}, r"fedspine.schedule.target=1.0 is not allowed"),
        ({"fedspine.schedule.target": 0.9, "rounds": 3}, "a target of 0.9 is out of reach in 3 rounds"),
        ({"model.name": "/nowhere/at/all"}, "model.name=/nowhere/at/all|name=/nowhere/at/all is not a folder"),
    ],
)
def test_what_cannot_run_is_one_line_before_anything_starts(
    override: dict[str, Any], says: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, RunFolderError), match=says) as refused:
        locally(tmp_path, settings, **override)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "local").exists()
