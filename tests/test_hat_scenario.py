"""The scenario `hat` from its settings to the texts on the devices, on a LocalGrid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fl_edge.clients.hat.answers import AnswerFiles
from fl_edge.data.prompts import PromptConfig, device_prompts
from fl_edge.errors import ConfigError, DataError
from fl_edge.link.local import LocalGrid
from simulations.client_app import app
from simulations.hat import run_hat
from simulations.scenario import HatScenario, read_scenario
from tests.hat_scenario import DEVICES, NEW, PROMPTS, locally, make_files, texts
from tests.tiny import same_bits


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_files(tmp_path_factory.mktemp("files"))


def test_a_run_leaves_records_pictures_an_adapter_and_texts_on_the_devices(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = locally(tmp_path, settings)
    folder, printed = tmp_path / "local", capsys.readouterr().out
    assert {file.name for file in folder.iterdir()} >= {
        *("config.yaml", "rounds.jsonl", "result.json", "adapter.png", "requests.png", "adapter.safetensors"),
    }
    kinds = [json.loads(line)["kind"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert kinds == ["adapter"] * 2 + ["request"] * DEVICES * PROMPTS
    assert "adapter   2/2  loss" in printed
    assert "request   4/4" in printed
    summary = json.loads((folder / "result.json").read_text())["summary"]
    assert summary["tokens"] == DEVICES * PROMPTS * NEW == report.summary()["tokens"]
    assert len(texts(tmp_path / "cache")) == DEVICES * PROMPTS
    assert sum(account.drafted for accounts in report.accounts.values() for account in accounts) > 0
    before = texts(tmp_path / "cache")
    locally(tmp_path, settings | {"training.rounds": 0, "adapter": str(folder / "adapter.safetensors")}, "again", 2)
    assert texts(tmp_path / "cache") == before  # whatever was drafted
    plain = locally(tmp_path, settings | {"training.rounds": 0}, "plain", 3)
    assert plain.summary()["accept_length"] == 1.0
    assert texts(tmp_path / "cache") == before


def test_texts_are_those_of_the_whole_model(settings: dict[str, Any], tmp_path: Path) -> None:
    locally(tmp_path, settings | {"training.rounds": 0})
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(settings["model.name"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model.name"])
    found = list((tmp_path / "cache" / "answers").glob("*/*/*.tokens"))
    assert len(found) == DEVICES * PROMPTS
    for file in found:
        tokens = [int(word) for word in file.read_text().split()]
        text = file.with_suffix(".txt").read_text()
        prompt = tokenizer(text[: len(text) - 1 - len(tokenizer.decode(tokens))], return_tensors="pt")["input_ids"]
        whole = model.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert whole[0, prompt.shape[1] :].tolist() == tokens


def test_a_run_that_was_killed_in_training_goes_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locally(tmp_path, settings, "whole")

    def kill(line: str) -> None:
        if line.startswith("adapter   2/2"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("simulations.hat.say", kill)
        with pytest.raises(KeyboardInterrupt):
            locally(tmp_path, settings, "killed")
    folder = tmp_path / "killed"
    scenario = read_scenario({"resume": str(folder)})
    assert isinstance(scenario, HatScenario)
    grid = LocalGrid(app, DEVICES, run_config={**settings, "resume": str(folder)}, run_id=9)
    run_hat(grid, scenario)
    found, whole = (load_file(path / "adapter.safetensors") for path in (folder, tmp_path / "whole"))
    assert same_bits(found, whole)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"hat.chunking": "some"}, r"hat\.chunking=some is not allowed"),
        ({"data.length": 128}, r"data\.length=128 is above cloud\.capacity=64"),
        ({"prompts.shortest": 40}, r"prompts\.shortest=40 is above prompts\.longest=20"),
        ({"hat.shallow": 4}, "shallow layers 4 are not allowed"),
        ({"adapter": "nowhere"}, "nowhere is no adapter"),
    ],
)
def test_mistakes_are_one_line(change: dict[str, Any], line: str, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=rf"^[^\n]*{line}[^\n]*$"):
        locally(tmp_path, settings | change)
    assert not (tmp_path / "local").exists()


class TestPrompts:
    """Lines of a file, dealt in turn."""

    def test_lines(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model.name"])
        file = tmp_path / "prompts.txt"
        file.write_text("def one\n\nclass two\nreturn three\n")
        config = PromptConfig(source=str(file), count=5)
        found = [device_prompts(config, (), 0, index, 2, tokenizer) for index in range(2)]
        assert [[tokenizer.decode(prompt) for prompt in one] for one in found] == [
            ["def one", "return three"],
            ["class two"],
        ]
        with pytest.raises(DataError, match="has 3 prompts, none for device 3 of 4"):
            device_prompts(config, (), 0, 3, 4, tokenizer)
        with pytest.raises(DataError, match="cannot be read"):
            device_prompts(PromptConfig(source=str(tmp_path)), (), 0, 0, 1, tokenizer)


def test_an_answer_grows_in_any_process_and_begins_anew(tmp_path: Path, settings: dict[str, Any]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model.name"])
    prompt = torch.tensor(tokenizer("def é")["input_ids"])
    for piece in ((), prompt[:2].tolist(), prompt[2:].tolist()):
        AnswerFiles(tmp_path / "own", tokenizer, [prompt]).hear(0, piece)
    assert (tmp_path / "own" / "0.txt").read_text() == "def édef é\n"
    AnswerFiles(tmp_path / "own", tokenizer, [prompt]).hear(0, ())
    assert (tmp_path / "own" / "0.txt").read_text() == "def é\n"
