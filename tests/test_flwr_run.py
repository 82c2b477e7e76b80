"""The real thing: `flwr run`, Ray, a local SuperLink of the test's own, and processes that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fl_edge.checkpoints import load_checkpoint
from simulations.deployment import free_ports
from simulations.launch import APP, stop_superlink, superlink_family
from tests import comp_scenario, fedspine_scenario, hat_scenario, imbnas_scenario
from tests.scenarios import SMALL, THREADS, locally
from tests.tiny import same_bits


@dataclass
class Launcher:
    """`python -m simulations` with a Flower home and ports of its own."""

    folder: Path
    port: int

    def start(self, **overrides: Any) -> subprocess.Popen[str]:
        values = {**SMALL, "runs": self.folder / "runs", **overrides}
        env = {
            **os.environ,
            **THREADS,
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.port),
            "FLWR_LOCAL_CONTROL_API_PORT": str(free_ports(1)[0]),
            "FL_EDGE_CACHE": str(self.folder / "cache"),
        }
        arguments = [f"{key}={value}" for key, value in values.items() if value is not None]
        return subprocess.Popen(
            [sys.executable, "-m", "simulations", *arguments], cwd=APP, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, **overrides: Any) -> tuple[int, str]:
        child = self.start(**overrides)
        output, _ = child.communicate(timeout=240)
        return child.returncode, output


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path, free_ports(1)[0])
    yield made
    stop_superlink(made.port)


def test_fedspine_ends_with_the_bits_of_a_local_grid(launcher: Launcher, tmp_path: Path) -> None:
    settings = fedspine_scenario.make_files(tmp_path / "files")
    status, output = launcher.run(name="ray", **{**dict.fromkeys(SMALL), **settings})
    assert status == 0, output
    assert "finished:completed" in output
    assert "Models to take home" in output
    folder = tmp_path / "runs" / "ray"
    assert len(list(folder.glob("*.png"))) >= 3
    assert list(folder.glob("models/*/adapter/adapter_model.safetensors"))
    kept, local = load_checkpoint(folder / "checkpoints"), fedspine_scenario.locally(tmp_path, settings)
    assert kept is not None
    assert same_bits(kept.weights, local["weights"])
    assert kept.record == local["record"]


def test_comp_together_ends_with_the_bits_of_a_local_grid(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**comp_scenario.make_files(tmp_path / "files"), "comp.mode": "federated"}
    status, output = launcher.run(name="ray", **{**dict.fromkeys(SMALL), **settings})
    assert status == 0, output
    assert "layer 4/4" in output
    assert "Models on the devices, before and after" in output
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path / "cache of the grid"))
    report = comp_scenario.locally(tmp_path, settings)
    files = sorted((tmp_path / "local" / "model").glob("*.safetensors"))
    assert files
    for file in files:
        kept = load_file(file)
        assert same_bits(load_file(tmp_path / "runs" / "ray" / "model" / file.name), kept)
        for row in report.devices:
            (own,) = (tmp_path / "cache" / "comp" / row.device).glob(f"*/{file.name}")
            assert same_bits(load_file(own), kept)


def test_hat_trains_the_adapter_and_writes_the_texts_of_a_local_grid(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = hat_scenario.make_files(tmp_path / "files")
    status, output = launcher.run(name="ray", **{**dict.fromkeys(SMALL), **settings})
    assert status == 0, output
    assert "adapter   2/2" in output
    assert "request   4/4" in output
    assert "What devices generated" in output
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path / "cache of the grid"))
    hat_scenario.locally(tmp_path, settings)
    found, local = (load_file(tmp_path / name / "adapter.safetensors") for name in ("runs/ray", "local"))
    assert same_bits(found, local)
    written = hat_scenario.texts(tmp_path / "cache")
    assert len(written) == hat_scenario.DEVICES * hat_scenario.PROMPTS
    assert written == hat_scenario.texts(tmp_path / "cache of the grid")


def test_imbnas_finds_and_trains_what_a_local_grid_does(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, output = launcher.run(name="ray", **{**dict.fromkeys(SMALL), **imbnas_scenario.SETTINGS})
    assert status == 0, output
    assert "training 2/2" in output
    assert "Balanced test accuracy" in output
    folder = tmp_path / "runs" / "ray"
    assert {"confusion.png", "ranking.png"} <= {file.name for file in folder.iterdir()}
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path / "cache"))  # the super-network is there already
    kept, local = load_checkpoint(folder / "checkpoints"), imbnas_scenario.locally(tmp_path)
    assert kept is not None
    assert same_bits(kept.weights, local["weights"])
    assert kept.record["scored"] == local["record"]["scored"]


def test_mergesfl_killed_at_work_resumes_to_the_bits_of_a_local_grid(launcher: Launcher, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "killed"
    child = launcher.start(name="killed", rounds=30)
    deadline = time.monotonic() + 120
    while load_checkpoint(folder / "checkpoints") is None and time.monotonic() < deadline:
        time.sleep(0.05)
    (server,) = [each for each in superlink_family(launcher.port) if "flwr-simulation" in " ".join(each.cmdline())]
    os.kill(server.pid, signal.SIGKILL)
    output, _ = child.communicate(timeout=240)
    assert child.returncode == 1, output
    assert "finished:failed" in output
    assert f'make run ARGS="resume={folder}"' in output
    kept = load_checkpoint(folder / "checkpoints")
    assert kept is not None
    before = kept.server_round
    assert before < 30

    total = before + 3
    only_rounds = dict.fromkeys(SMALL) | {"runs": None, "rounds": total, "resume": folder}
    status, output = launcher.run(**only_rounds)
    assert status == 0, output
    assert "finished:completed" in output
    assert f"resumed after round {before}" in output
    assert output.count("round ") >= 3
    assert "test accuracy" in output
    names = {file.name for file in folder.iterdir()}
    assert {"config.yaml", "rounds.jsonl", "result.json", "accuracy.png", "devices.png", "labels.png"} <= names
    assert any(name.startswith("events.") for name in names)
    assert not [name for name in names if "partial" in name]
    assert json.loads((folder / "result.json").read_text())["summary"]["rounds"] == total
    kept, local = load_checkpoint(folder / "checkpoints"), locally(tmp_path, rounds=total)
    assert kept is not None
    assert kept.server_round == total
    assert same_bits(kept.weights, local["weights"])
    assert kept.record == local["record"]
    rounds = [json.loads(line)["server_round"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, total + 1))
    assert not superlink_family(launcher.port)  # stopped, since the launcher had started it


def test_a_run_that_cannot_work_fails_with_one_line(launcher: Launcher, tmp_path: Path) -> None:
    status, output = launcher.run(name="nowhere", **{"data.source": tmp_path / "no-such-folder"})
    assert status == 1, output
    assert "finished:failed" in output
    assert "Traceback" not in output
    assert [line for line in output.splitlines() if "no-such-folder" in line and "RunFailed" in line], output
    assert not (tmp_path / "runs" / "nowhere").exists()
