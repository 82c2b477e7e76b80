"""The scenario `imbnas`, tiny, and what it gives on a LocalGrid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fl_edge.link.local import LocalGrid
from simulations.client_app import app
from simulations.imbnas import run_imbnas
from simulations.scenario import ImbNasScenario, read_scenario

SETTINGS: dict[str, Any] = {
    "simulation": "imbnas",
    "devices": 3,
    "supernet.epochs": 2,
    "imbnas.batchnorm.images": 64,
    "imbnas.head.tolerance": 0.1,
    "imbnas.search.population": 3,
    "imbnas.search.mutants": 1,
    "imbnas.search.crosses": 1,
    "imbnas.search.generations": 1,
    "imbnas.final_rounds": 2,
    "imbnas.final.epochs": 2,
}


def locally(folder: Path, name: str = "local", **overrides: Any) -> dict[str, Any]:
    """Run the scenario on a LocalGrid and return what its strategy ends with."""
    config = {**SETTINGS, "runs": str(folder), "name": name, **overrides}
    scenario = read_scenario(config)
    assert isinstance(scenario, ImbNasScenario)
    strategy = run_imbnas(LocalGrid(app, scenario.devices, run_config=config), scenario)
    weights, record = strategy.snapshot()
    return {"weights": weights, "record": record}
