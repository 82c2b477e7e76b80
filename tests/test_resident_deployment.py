"""Resident clients on a real SuperLink and real SuperNodes, with TLS and node keys; processes get killed."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from fl_edge.checkpoints import load_checkpoint
from simulations.deployment import Deployment, Run
from simulations.launch import APP
from tests import fedspine_scenario, hat_scenario
from tests.scenarios import SMALL, THREADS, locally
from tests.tiny import same_bits

FEDAVG = Path(__file__).parent / "apps" / "fedavg"
NODES = 3
SMALLER = {**SMALL, "devices": NODES}
QUICK = {"link.grace_s": 5.0, "link.heartbeat_s": 1.0}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("resident")
    with Deployment(folder, NODES, environment={"FL_EDGE_CACHE": str(folder / "cache"), **THREADS}) as made:
        yield made
    assert not made.processes()


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the rounds that a run has written down."""
    file = folder / "rounds.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def until(condition: Callable[[], object], run: Run, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, run.log
        assert run.stream.process.poll() is None, run.log  # it ends with the run
        time.sleep(0.05)


def test_mergesfl_ends_with_the_bits_of_a_local_grid(deployment: Deployment, tmp_path: Path) -> None:
    outcome = deployment.run(APP, {**SMALLER, "rounds": 3, "runs": str(tmp_path), "name": "deployed"})
    assert outcome.status == "finished:completed", outcome.log
    assert "clients stay connected" in outcome.log
    kept, local = load_checkpoint(tmp_path / "deployed" / "checkpoints"), locally(tmp_path, rounds=3, devices=NODES)
    assert kept is not None
    assert same_bits(kept.weights, local["weights"])
    assert kept.record == local["record"]
    assert not list((deployment.folder / "cache").rglob("*.safetensors"))  # models stayed in memory
    assert len(re.findall("Receiving: query.fl_edge_stay", logs(deployment))) == NODES
    assert len(re.findall("Receiving: ", logs(deployment))) == NODES  # nothing else went by Flower's way
    no_secrets(deployment, tmp_path / "deployed")


def logs(deployment: Deployment) -> str:
    return "".join(file.read_text(errors="replace") for file in (deployment.folder / "logs").glob("supernode*"))


def no_secrets(deployment: Deployment, run_folder: Path) -> None:
    keys = [
        file.read_text() for file in deployment.folder.rglob("*") if file.is_file() and b"PRIVATE KEY" in head(file)
    ]
    assert len(keys) > NODES
    secrets = [line for key in keys for line in key.splitlines() if len(line) > 40]
    for file in [*(deployment.folder / "logs").iterdir(), *run_folder.rglob("*")]:
        text = file.read_text(errors="replace") if file.is_file() else ""
        assert not re.search("(?<!task-)token", text), file  # Flower itself may say that a task-token has ended
        assert not [secret for secret in secrets if secret in text], file


def head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(100)


def test_clients_leave_a_server_app_that_was_killed_and_serve_the_next_run(
    deployment: Deployment, tmp_path: Path
) -> None:
    run = deployment.start(APP, {**SMALLER, **QUICK, "rounds": 1000, "runs": str(tmp_path), "name": "killed"})
    until(lambda: len(lines(tmp_path / "killed")) > 2, run)
    clients = deployment.processes("flwr-clientapp")
    assert len(clients) == NODES
    (server_app,) = deployment.processes("flwr-serverapp")
    server_app.kill()
    until(lambda: not deployment.processes("flwr-clientapp"), run)
    fedspine_ends_with_the_bits_of_a_local_grid(deployment, tmp_path)


def fedspine_ends_with_the_bits_of_a_local_grid(deployment: Deployment, folder: Path) -> None:
    settings = {**fedspine_scenario.make_files(folder / "files"), "devices": NODES}
    outcome = deployment.run(APP, {**settings, "runs": str(folder), "name": "deployed"})
    assert outcome.status == "finished:completed", outcome.log
    assert "clients stay connected" in outcome.log
    kept, local = load_checkpoint(folder / "deployed" / "checkpoints"), fedspine_scenario.locally(folder, settings)
    assert kept is not None
    assert same_bits(kept.weights, local["weights"])
    assert kept.record == local["record"]
    assert not (deployment.folder / "cache" / "pruned").exists()  # models stayed in memory


def test_hat_generates_the_texts_of_a_local_grid_and_keeps_nothing(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**hat_scenario.make_files(tmp_path / "files"), "devices": NODES}
    outcome = deployment.run(APP, {**settings, "runs": str(tmp_path), "name": "deployed"})
    assert outcome.status == "finished:completed", outcome.log
    assert "clients stay connected" in outcome.log
    assert f"{NODES * hat_scenario.PROMPTS}/{NODES * hat_scenario.PROMPTS}" in outcome.log
    assert not list((deployment.folder / "cache").rglob("*-lessons"))  # rows and adapter stayed in memory
    written = hat_scenario.texts(deployment.folder / "cache")
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path / "cache of the grid"))
    hat_scenario.locally(tmp_path, settings)
    found, local = (load_file(tmp_path / name / "adapter.safetensors") for name in ("deployed", "local"))
    assert same_bits(found, local)
    assert len(written) == NODES * hat_scenario.PROMPTS
    assert written == hat_scenario.texts(tmp_path / "cache of the grid")


def test_a_stock_app_runs_and_stays_with_two_changed_lines(deployment: Deployment, tmp_path: Path) -> None:
    changed = {
        "client_app.py": ("from flwr.clientapp import ClientApp", "from fl_edge.link.resident import ClientApp"),
        "server_app.py": (
            "from flwr.serverapp import Grid, ServerApp",
            "from fl_edge.link.resident import Grid, ServerApp",
        ),
    }
    app = tmp_path / "app"
    shutil.copytree(FEDAVG, app)
    for name, (stock, resident) in changed.items():
        (file,) = app.rglob(name)
        before = file.read_text().splitlines()
        assert before.count(stock) == 1
        file.write_text("\n".join(resident if line == stock else line for line in before) + "\n")
    models = {}
    for folder in (app, FEDAVG):
        model = tmp_path / f"{folder.name}.safetensors"
        config = {"num-server-rounds": 1, "nodes": NODES, "fraction-evaluate": 0.0, "model-path": str(model)}
        outcome = deployment.run(folder, config)
        assert outcome.status == "finished:completed", outcome.log
        assert ("clients stay connected" in outcome.log) == (folder == app)
        assert f"Received {NODES} results and 0 failures" in outcome.log
        assert set(json.loads(model.with_suffix(".json").read_text())) == {"0", "1"}
        models[folder] = load_file(model)
    assert models[FEDAVG]["fc.weight"].shape == (10, 128)
    assert same_bits(models[FEDAVG], models[app])


def test_a_client_killed_in_a_round_is_written_down_and_the_run_goes_on(deployment: Deployment, tmp_path: Path) -> None:
    all_are_needed = {"mergesfl.tau": 6, "mergesfl.min_workers": NODES}  # so the next round waits for it
    config = {**SMALLER, **QUICK, **all_are_needed, "rounds": 30, "runs": str(tmp_path), "name": "killed"}
    run = deployment.start(APP, config)
    until(lambda: len(lines(tmp_path / "killed")) > 2, run)
    device = lines(tmp_path / "killed")[-1]["devices"][0]
    client_of(deployment, int(device.rpartition("-")[2])).kill()
    outcome = run.wait(400)
    assert outcome.status == "finished:completed", outcome.log
    told = lines(tmp_path / "killed")
    assert [line["server_round"] for line in told] == list(range(1, 31))
    (loss,) = [loss for line in told for loss in line["lost"]]
    assert loss["device"] == device
    assert "is not connected" in loss["why"]
    assert device in told[-1]["devices"] or device in told[-2]["devices"]  # Flower has started it again


def client_of(deployment: Deployment, index: int) -> psutil.Process:
    """Return the ClientApp's process that the SuperNode of this number has started."""
    supernode = psutil.Process(deployment.supernodes[index].process.pid)
    (client,) = [each for each in supernode.children(recursive=True) if "flwr-clientapp" in " ".join(each.cmdline())]
    return client
