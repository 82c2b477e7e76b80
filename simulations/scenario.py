"""What can be configured: one dataclass a scenario, read from its YAML and from `--run-config`.

Precedence, lowest first: the defaults in the dataclasses, `simulations/<simulation>.yaml`, `--run-config`. Flower
accepts only keys that stand in `[tool.flwr.app.config]` of pyproject.toml; empty text there means "as the scenario has
it".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from fl_edge.config import check, resolve, setting
from fl_edge.data.config import DataConfig
from fl_edge.edge.config import EdgeConfig
from fl_edge.errors import ConfigError
from fl_edge.link.resident.config import LinkConfig
from fl_edge.mergesfl.config import MergeSFLConfig, released
from fl_edge.models.config import ModelConfig
from fl_edge.runs import saved_config

SIMULATIONS = ("mergesfl",)


@dataclass
class MergeSFLScenario:
    """Split federated learning with feature merging and batch size regulation, on pictures."""

    simulation: str = setting("mergesfl", "the scenario", choices=SIMULATIONS)
    rounds: int = setting(20, "rounds of training", low=1)
    devices: int = setting(20, "training begins when so many are connected", low=1)
    seed: int = setting(2020, "of every random draw", low=0)
    threads: int = setting(1, "threads of torch in every process", low=1)
    variant: str = setting(
        "paper", "the paper's algorithm, or the training module alone as the authors released it",
        choices=("paper", "released"),
    )  # fmt: skip
    runs: str = setting("runs", "folder of the run folders; a relative one is below the SuperLink's working directory")
    name: str = setting("", "name of the run folder; empty for the scenario and the time")
    resume: str = setting("", "run folder of a run that is to go on")
    patience_s: float = setting(60.0, "seconds to wait for the devices", low=0.0)
    exchange_timeout_s: float = setting(600.0, "seconds a device has to answer", low=0.0)
    resident: bool = setting(True, "in a deployment, clients stay connected; else Flower's own grid is used")
    mergesfl: MergeSFLConfig = field(default_factory=MergeSFLConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    edge: EdgeConfig = field(default_factory=EdgeConfig)
    link: LinkConfig = field(default_factory=LinkConfig)

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        if self.mergesfl.min_workers > self.devices:
            return f"mergesfl.min_workers={self.mergesfl.min_workers} asks for more than the {self.devices} devices"
        return None


_MAY_CHANGE = ("resume", "rounds", "patience_s", "exchange_timeout_s", "resident", "link.grace_s", "link.heartbeat_s")


def read_scenario(run_config: Mapping[str, Any], *, on_device: bool = False) -> MergeSFLScenario:
    """Return the checked configuration of a run.

    A run that resumes has the configuration of its run folder. A device that cannot see the run folder, because it is
    on another machine, goes by the run configuration alone.

    Raises
    ------
    ConfigError
        An unknown scenario or key, a value out of range, or a change that a resumed run cannot take.
    RunFolderError
        `resume` is not a run folder.
    """
    overrides = {key: value for key, value in run_config.items() if value != ""}
    name = str(overrides.get("simulation", SIMULATIONS[0]))
    if name not in SIMULATIONS:
        raise ConfigError(f"simulation={name} is not there; it must be one of {', '.join(SIMULATIONS)}")
    resume = overrides.pop("resume", None)
    folder = Path(str(resume)).expanduser()
    if resume is None or (on_device and not folder.is_dir()):
        scenario = resolve(MergeSFLScenario, Path(__file__).parent / f"{name}.yaml", overrides)
    else:
        scenario = _resumed(folder, overrides)
    return _as_released(scenario, overrides) if scenario.variant == "released" else scenario


def _resumed(folder: Path, overrides: Mapping[str, Any]) -> MergeSFLScenario:
    saved_as = resolve(MergeSFLScenario, saved_config(folder), {})
    scenario = replace(resolve(MergeSFLScenario, saved_config(folder), overrides), resume=str(folder))
    for key in overrides:
        before, now = (attrgetter(key)(each) for each in (saved_as, scenario))
        if before != now and key not in _MAY_CHANGE:
            raise ConfigError(
                f"{key}={now} cannot change when a run is resumed, it was {before}; {', '.join(_MAY_CHANGE[1:])} can"
            )
    return scenario


def _as_released(scenario: MergeSFLScenario, overrides: Mapping[str, Any]) -> MergeSFLScenario:
    variant = replace(scenario, mergesfl=released(scenario.mergesfl))
    for key in overrides:
        asked, has = (attrgetter(key)(each) for each in (scenario, variant))
        if asked != has:
            raise ConfigError(f"{key}={asked} contradicts variant=released, which has {has}; leave one of them out")
    check(variant)
    return variant
