"""SuperLink and SuperNodes as processes of their own, with TLS and node keys, and Flower's own grid between them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_edge.checkpoints import load_checkpoint
from simulations.deployment import Deployment
from simulations.launch import APP
from simulations.processes import DeploymentError
from tests import fedspine_scenario
from tests.scenarios import SMALL, THREADS, locally
from tests.tiny import same_bits

FEDAVG = Path(__file__).parent / "apps" / "fedavg"
NODES = 2  # each message starts a process on each of them


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployment")
    with Deployment(folder, NODES, environment={"FL_EDGE_CACHE": str(folder / "cache"), **THREADS}) as made:
        yield made
    assert not made.processes()


def node_ids(deployment: Deployment) -> set[str]:
    """Ids of the SuperNodes that the SuperLink takes for online."""
    listed = json.loads(deployment.flwr("supernode", "list", "--format", "json"))
    return {node["node-id"] for node in listed["nodes"] if node["status"] == "online"}


def test_a_supernode_that_restarts_keeps_its_id(deployment: Deployment) -> None:
    before = node_ids(deployment)
    assert len(before) == NODES
    deployment.restart(1)
    assert node_ids(deployment) == before


def test_mergesfl_ends_with_the_bits_of_a_local_grid(deployment: Deployment, tmp_path: Path) -> None:
    small = {"rounds": 1, "devices": NODES}
    config = {**SMALL, **small, "resident": False, "runs": str(tmp_path), "name": "deployed"}
    outcome = deployment.run(APP, config, timeout_s=400)
    assert outcome.status == "finished:completed", outcome.log
    assert "clients stay connected" not in outcome.log
    kept, local = load_checkpoint(tmp_path / "deployed" / "checkpoints"), locally(tmp_path, **small)
    assert kept is not None
    assert same_bits(kept.weights, local["weights"])
    assert kept.record == local["record"]


def test_fedspine_ends_with_the_bits_of_a_local_grid(deployment: Deployment, tmp_path: Path) -> None:
    small = {"rounds": 1, "devices": NODES, "fedspine.schedule.target": 0.2}
    settings = fedspine_scenario.make_files(tmp_path / "files") | small
    config = {**settings, "fedspine.schedule.deadline": 1.0, "fedspine.schedule.warmup_rounds": 0, "resident": False}
    outcome = deployment.run(APP, {**config, "runs": str(tmp_path), "name": "deployed"}, timeout_s=400)
    assert outcome.status == "finished:completed", outcome.log
    assert "clients stay connected" not in outcome.log
    assert list((deployment.folder / "cache" / "pruned").iterdir())  # the next message meets another process
    kept = load_checkpoint(tmp_path / "deployed" / "checkpoints")
    local = fedspine_scenario.locally(tmp_path, config)
    assert kept is not None
    assert same_bits(kept.weights, local["weights"])
    assert kept.record == local["record"]


def test_what_dies_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with Deployment(tmp_path / "with a blank", nodes=1, secure=False) as deployment:
        supernode, superlink = deployment.supernodes[0], deployment.superlink
        run = deployment.start(FEDAVG, {"nodes": 2})  # waits for a second SuperNode
        assert not run.status().startswith("finished")
        supernode.process.kill()  # it alone: its SuperExec is an orphan now
        supernode.process.wait()
        with pytest.raises(DeploymentError, match=r"supernode-0 has ended with status -9; .*SuperNode ID"):
            deployment.start(FEDAVG)
        superlink.kill()
        with pytest.raises(DeploymentError, match="superlink has ended with status -9; "):
            run.wait()
    assert not deployment.processes()
