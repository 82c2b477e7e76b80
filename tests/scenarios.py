"""The scenario `mergesfl`, small, and what it gives on a LocalGrid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_edge.checkpoints import load_checkpoint
from fl_edge.link.local import LocalGrid
from simulations.client_app import app
from simulations.mergesfl import run_mergesfl
from simulations.scenario import MergeSFLScenario, read_scenario

SMALL: dict[str, Any] = {
    "rounds": 4, "devices": 4, "mergesfl.tau": 2, "mergesfl.batch_size": 8, "mergesfl.min_workers": 2,
    "mergesfl.ingress_batches": 2, "data.alpha": 1.0,
}  # fmt: skip

THREADS = {"OMP_NUM_THREADS": "2"}  # in processes of their own, the scenario has to say how many there are


def mergesfl_scenario(config: Mapping[str, Any]) -> MergeSFLScenario:
    """The scenario of a run configuration that is one of MergeSFL."""
    scenario = read_scenario(config)
    assert isinstance(scenario, MergeSFLScenario)
    return scenario


def locally(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Run the scenario on a LocalGrid and return its last checkpoint's weights and record."""
    config = {**SMALL, "runs": str(folder), "name": "local", **overrides}
    scenario = mergesfl_scenario(config)
    run_mergesfl(LocalGrid(app, scenario.devices, run_config=config), scenario)
    kept = load_checkpoint(folder / "local" / "checkpoints")
    assert kept is not None
    return vars(kept)
