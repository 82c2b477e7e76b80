"""The command line of COMP: one command, one table, one line when something is wrong, and kill -9."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fl_edge.comp import __main__ as command
from fl_edge.comp import measures
from fl_edge.comp.state import STATE
from fl_edge.models.vocabulary import decoder_tokenizer
from fl_edge.pruning import read_plan
from tests.tiny_comp import LAYERS, checkpoint_of, contents

WORDS = "def alpha beta gamma return import self none while yield\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tokenizer: Any = decoder_tokenizer([WORDS] * 5, 300)
    checkpoint_of(folder / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(WORDS * 100)
    return folder


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    general = [
        "--calibration",
        str(place / "text.txt"),
        "--out",
        str(out),
        "--length",
        "16",
        "--set",
        "max_variance=100",
    ]
    return [str(place / "model"), *general, *more]


def test_one_command_prunes_and_shows_a_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments(place, tmp_path, "--ratio", "0.3")) == 0
    shown = capsys.readouterr().out
    for words in ("held out", "parameters", "perplexity", "ms a token", "prefill", "0.3 pruned", "peak memory"):
        assert words in shown
    assert read_plan(tmp_path)


def test_several_sizes_in_one_run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = str(place / "text.txt")
    assert command.main(arguments(place, tmp_path, "--nested", "0.4,0.2", "--test", test, "--faithful")) == 0
    shown = capsys.readouterr().out
    assert "held out" not in shown
    assert shown.index("0.2 pruned") < shown.index("0.4 pruned")
    assert read_plan(tmp_path / "0.2").covers(read_plan(tmp_path / "0.4"))


def test_the_bar_counts_layers_measured_and_then_pruned(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []

    def update(_self: object, _task: int, description: str = "measuring", *, completed: int, total: int) -> None:
        seen.append((description, completed, total))

    monkeypatch.setattr("rich.progress.Progress.update", update)
    assert command.main(arguments(place, tmp_path, "--ratio", "0.3")) == 0
    passes = [completed for description, completed, _ in seen if description == "measuring"]
    every = list(range(1, LAYERS + 1))
    assert passes == [*every, *every, 1]  # similarities, curves, and the first layer before it is pruned
    assert [each for each in seen if each[0] != "measuring"] == [("pruning layers", one, LAYERS) for one in every]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "max_varianc=1"], "unknown key max_varianc in the overrides; did you mean max_variance"),
        (["--set", "steps"], "must be key=value"),
        (["--ratio", "2"], "ratio=2.0 is not allowed"),
        (["--ratio", "much"], "ratio=much in the overrides is not allowed"),
        (["--nested", "a,b"], "must be numbers with commas"),
        (["--device", "cuda:99"], "cannot be used"),
        (["--calibration", "nowhere"], "there is no text at nowhere"),
        (["--length", "5000"], "fewer than one sequence of 5000"),
    ],
)
def test_errors_are_one_line_and_code_1(
    more: list[str], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments(place, tmp_path / "out", *more)) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interruption_says_how_to_go_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "prune_checkpoint", interrupted)
    assert command.main(arguments(place, tmp_path)) == 130
    assert capsys.readouterr().err == f"interrupted; the same command goes on in {tmp_path}\n"


def test_a_model_too_large_for_memory_is_streamed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.main(arguments(place, tmp_path, "--ratio", "0.5", "--set", "layer_share=1")) == 0
    whole = capsys.readouterr().out
    monkeypatch.setattr(measures, "free_bytes", lambda _: 0)
    assert command.main(arguments(place, tmp_path, "--ratio", "0.5", "--set", "layer_share=1")) == 0
    streamed = capsys.readouterr().out
    assert "left out (-): the model is larger than half of the free memory" in streamed
    rows = [next(line for line in text.splitlines() if "perplexity" in line) for text in (whole, streamed)]
    figures = [[float(cell) for cell in row.split("│")[2:4]] for row in rows]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


_SLOW = """
import sys, time
from fl_edge.comp import __main__ as command
from fl_edge.comp.local import TextSource
ask = TextSource.snapshot
TextSource.snapshot = lambda self: (time.sleep(0.3), ask(self))[1]
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("in_time")
def test_a_killed_process_is_taken_up_by_the_same_command(place: Path, tmp_path: Path) -> None:
    more = arguments(place, tmp_path / "out")
    process = subprocess.Popen([sys.executable, "-c", _SLOW, *more], stdout=subprocess.DEVNULL)
    while not (tmp_path / "out" / "model-layer-0001.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out" / STATE).exists()
    assert not (tmp_path / "out" / "plan.json").exists()
    again = [sys.executable, "-m", "fl_edge.comp", *more]
    found = subprocess.run(again, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "going on after" in found.stderr
    assert command.main(arguments(place, tmp_path / "whole")) == 0  # with as many threads: see conftest.py
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
