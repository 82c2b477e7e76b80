"""The scenario `hat`, tiny: a model and texts in local folders, and what it gives on a LocalGrid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fl_edge.hat.account import HatReport
from fl_edge.link.local import LocalGrid
from simulations.client_app import app
from simulations.hat import run_hat
from simulations.scenario import HatScenario, read_scenario
from tests import comp_scenario

DEVICES, PROMPTS, NEW = 2, 2, 6
_OWN = {
    "simulation": "hat",
    "devices": DEVICES,
    "data.length": 32,
    "data.sequences": 4,
    "cloud.capacity": 64,
    "cloud.cache_tokens": 1024,
    "training.rounds": 2,
    "training.steps": 2,
    "hat.new_tokens": NEW,
    "hat.threshold": 0.0,
    "prompts.count": PROMPTS,
    "prompts.shortest": 8,
    "prompts.longest": 20,
}


def make_files(folder: Path) -> dict[str, Any]:
    """Write a tiny Llama and texts into a folder, and return the scenario's settings that use them."""
    files = comp_scenario.make_files(folder)
    return _OWN | {name: files[name] for name in ("model.name", "data.source")}


def locally(folder: Path, settings: dict[str, Any], name: str = "local", run_id: int = 1) -> HatReport:
    """Run the scenario on a LocalGrid."""
    config = {**settings, "runs": str(folder), "name": name}
    scenario = read_scenario(config)
    assert isinstance(scenario, HatScenario)
    return run_hat(LocalGrid(app, scenario.devices, run_config=config, run_id=run_id), scenario)


def texts(cache: Path) -> dict[str, str]:
    """Return what devices have written, by device and number."""
    return {f"{file.parent.name}/{file.name}": file.read_text() for file in cache.glob("answers/*/*/*.txt")}
