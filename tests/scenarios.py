"""The scenario `mergesfl`, small, and what it gives on a LocalGrid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fl_edge.checkpoints import load_checkpoint
from fl_edge.link.local import LocalGrid
from simulations.client_app import app
from simulations.mergesfl import run_mergesfl
from simulations.scenario import read_scenario

SMALL: dict[str, Any] = {
    "rounds": 4, "devices": 4, "mergesfl.tau": 2, "mergesfl.batch_size": 8, "mergesfl.min_workers": 2,
    "mergesfl.ingress_batches": 2, "data.alpha": 1.0,
}  # fmt: skip


def locally(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Run the scenario on a LocalGrid and return its last checkpoint's weights and record."""
    config = {**SMALL, "runs": str(folder), "name": "local", **overrides}
    scenario = read_scenario(config)
    run_mergesfl(LocalGrid(app, scenario.devices, run_config=config), scenario)
    kept = load_checkpoint(folder / "local" / "checkpoints")
    assert kept is not None
    return vars(kept)
