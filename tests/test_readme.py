"""The README's Python code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_example_of_ones_own_project_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # the repository's own text
    metrics = eval(capsys.readouterr().out)  # what the example prints: {round: {"loss": ..., "accuracy": ...}}
    assert list(metrics) == [1, 2, 3, 4, 5]
    assert metrics[5]["loss"] < 0.7 * metrics[1]["loss"]


def test_settings_named_in_the_readme_are_there() -> None:
    from fl_edge.config import flatten
    from simulations.scenario import CompScenario, FedSpineScenario, HatScenario, ImbNasScenario, MergeSFLScenario

    schemas = (MergeSFLScenario, FedSpineScenario, CompScenario, HatScenario, ImbNasScenario)
    keys = {key for schema in schemas for key in flatten(schema)}
    prose = re.sub(r"```python\n.*?```", "", README.read_text(), flags=re.DOTALL)
    owners = r"data|model|edge|mergesfl|comp|hat|cloud|training|prompts|tail|supernet"
    owners += r"|imbnas(?:\.[a-z]+)?|fedspine(?:\.schedule)?"
    named = set(re.findall(rf"\b(?!comp\.json)((?:{owners})\.(?!py\b)[a-z_0-9]+)\b(?![./])", prose))
    assert len(named) > 10
    assert named <= keys
