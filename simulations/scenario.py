"""What can be configured: one dataclass a scenario, read from its YAML and from `--run-config`.

Precedence, lowest first: the defaults in the dataclasses, `simulations/<simulation>.yaml`, `--run-config`. Flower
accepts only keys that stand in `[tool.flwr.app.config]` of pyproject.toml; empty text there means "as the scenario has
it".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from fl_edge.comp.fleet import FleetConfig
from fl_edge.config import check, resolve, setting
from fl_edge.data.config import DataConfig, TextConfig
from fl_edge.data.corpus import CorpusConfig
from fl_edge.data.prompts import PromptConfig
from fl_edge.edge.config import EdgeConfig
from fl_edge.errors import ConfigError
from fl_edge.fedspine.config import FedSpineConfig
from fl_edge.fedspine.schedule import shortfall
from fl_edge.hat.config import CloudConfig, HatConfig, TrainingConfig
from fl_edge.imbnas.config import FederatedConfig, SuperConfig, TailConfig
from fl_edge.link.resident.config import LinkConfig
from fl_edge.mergesfl.config import MergeSFLConfig, released
from fl_edge.models.config import LanguageModelConfig, ModelConfig
from fl_edge.runs import saved_config

_CLASSES = {
    "mergesfl": "MergeSFLScenario",
    "fedspine": "FedSpineScenario",
    "fedspine_instructions": "FedSpineScenario",
    "comp": "CompScenario",
    "hat": "HatScenario",
    "imbnas": "ImbNasScenario",
}
SIMULATIONS = tuple(_CLASSES)


@dataclass
class Scenario:
    """What every scenario has."""

    simulation: str = setting("mergesfl", "the scenario", choices=SIMULATIONS)
    rounds: int = setting(20, "rounds of training", low=1)
    devices: int = setting(20, "training begins when so many are connected", low=1)
    seed: int = setting(2020, "of every random draw", low=0)
    threads: int = setting(1, "threads of torch in every process", low=1)
    runs: str = setting("runs", "folder of the run folders; a relative one is below the SuperLink's working directory")
    name: str = setting("", "name of the run folder; empty for the scenario and the time")
    resume: str = setting("", "run folder of a run that is to go on")
    patience_s: float = setting(60.0, "seconds to wait for the devices", low=0.0)
    exchange_timeout_s: float = setting(600.0, "seconds a device has to answer", low=0.0)
    resident: bool = setting(True, "in a deployment, clients stay connected; else Flower's own grid is used")
    edge: EdgeConfig = field(default_factory=EdgeConfig)
    link: LinkConfig = field(default_factory=LinkConfig)


@dataclass
class MergeSFLScenario(Scenario):
    """Split federated learning with feature merging and batch size regulation, on pictures."""

    variant: str = setting(
        "paper", "the paper's algorithm, or the training module alone as the authors released it",
        choices=("paper", "released"),
    )  # fmt: skip
    mergesfl: MergeSFLConfig = field(default_factory=MergeSFLConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        if self.mergesfl.min_workers > self.devices:
            return f"mergesfl.min_workers={self.mergesfl.min_workers} asks for more than the {self.devices} devices"
        return None


@dataclass
class FedSpineScenario(Scenario):
    """Federated LoRA tuning of a transformer that every device prunes at its own pace, on texts."""

    accelerator: str = setting(
        "cpu", "where models compute, server and devices: cpu, cuda, ..., auto (cuda where it is)"
    )
    take_home: bool = setting(True, "leave one folder a size class: pruned model, adapter, tokenizer, model card")
    fedspine: FedSpineConfig = field(default_factory=FedSpineConfig)
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    data: TextConfig = field(default_factory=TextConfig)

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        return shortfall(self.fedspine.schedule, self.rounds)


@dataclass
class CompScenario(Scenario):
    """Structured pruning of a language model on devices, each for itself or on the sums of all their texts."""

    accelerator: str = setting(
        "cpu", "where models compute, server and devices: cpu, cuda, ..., auto (cuda where it is)"
    )
    comp: FleetConfig = field(default_factory=FleetConfig)
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    data: CorpusConfig = field(default_factory=CorpusConfig)

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        if self.comp.fewest > self.devices:
            return f"comp.fewest={self.comp.fewest} asks for more than the {self.devices} devices"
        return None


@dataclass
class HatScenario(Scenario):
    """A language model between devices and cloud: training of the adapter, then generation."""

    accelerator: str = setting(
        "cpu", "where models compute, server and devices: cpu, cuda, ..., auto (cuda where it is)"
    )
    adapter: str = setting("", "file of an adapter to begin with; empty: a fresh one, or none where none is trained")
    hat: HatConfig = field(default_factory=HatConfig)
    cloud: CloudConfig = field(default_factory=CloudConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    data: CorpusConfig = field(default_factory=CorpusConfig)

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        if self.prompts.shortest > self.prompts.longest:
            return f"prompts.shortest={self.prompts.shortest} is above prompts.longest={self.prompts.longest}"
        if self.training.rounds and self.data.length > self.cloud.capacity:
            return f"data.length={self.data.length} is above cloud.capacity={self.cloud.capacity}"
        return None


@dataclass
class ImbNasScenario(Scenario):
    """A search for an architecture on long-tailed images of many devices."""

    accelerator: str = setting(
        "cpu", "where models compute, server and devices: cpu, cuda, ..., auto (cuda where it is)"
    )
    space: str = setting(
        "digits", "search space: for images of 8x8 pixels, or from 16x16 on", choices=("digits", "cifar")
    )
    imbnas: FederatedConfig = field(default_factory=FederatedConfig)
    tail: TailConfig = field(default_factory=TailConfig)
    supernet: SuperConfig = field(default_factory=SuperConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        if self.imbnas.fewest > self.devices:
            return f"imbnas.fewest={self.imbnas.fewest} asks for more than the {self.devices} devices"
        if not self.tail.validation_per_class:
            return "tail.validation_per_class=0 leaves nothing to score candidates on; it must be at least 1"
        return None


def scenario_class(name: str) -> type[Scenario]:
    """Return the dataclass of a scenario.

    Raises
    ------
    ConfigError
        A scenario that is not there.
    """
    if name not in _CLASSES:
        raise ConfigError(f"simulation={name} is not there; it must be one of {', '.join(SIMULATIONS)}")
    found: type[Scenario] = globals()[_CLASSES[name]]
    return found


_MAY_CHANGE = ("resume", "rounds", "patience_s", "exchange_timeout_s", "resident", "link.grace_s", "link.heartbeat_s")


def read_scenario(run_config: Mapping[str, Any], *, on_device: bool = False) -> Scenario:
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
    resume = overrides.pop("resume", None)
    folder = Path(str(resume)).expanduser()
    if resume is None or (on_device and not folder.is_dir()):
        name = str(overrides.get("simulation", SIMULATIONS[0]))
        scenario = resolve(scenario_class(name), Path(__file__).parent / f"{name}.yaml", overrides)
    else:
        scenario = _resumed(folder, overrides)
    if isinstance(scenario, MergeSFLScenario) and scenario.variant == "released":
        return _as_released(scenario, overrides)
    return scenario


def _resumed(folder: Path, overrides: Mapping[str, Any]) -> Scenario:
    file = saved_config(folder)
    schema = scenario_class(_simulation(file))
    saved_as = resolve(schema, file, {})
    scenario = replace(resolve(schema, file, overrides), resume=str(folder))
    for key in overrides:
        before, now = (attrgetter(key)(each) for each in (saved_as, scenario))
        if before != now and key not in _MAY_CHANGE:
            raise ConfigError(
                f"{key}={now} cannot change when a run is resumed, it was {before}; {', '.join(_MAY_CHANGE[1:])} can"
            )
    return scenario


def _simulation(file: Path) -> str:
    """Return which scenario a saved configuration is of."""
    found = re.search(r"^simulation: *[\"']?(\w+)", file.read_text(errors="replace"), re.MULTILINE)
    return found.group(1) if found else SIMULATIONS[0]


def _as_released(scenario: MergeSFLScenario, overrides: Mapping[str, Any]) -> MergeSFLScenario:
    variant = replace(scenario, mergesfl=released(scenario.mergesfl))
    for key in overrides:
        asked, has = (attrgetter(key)(each) for each in (scenario, variant))
        if asked != has:
            raise ConfigError(f"{key}={asked} contradicts variant=released, which has {has}; leave one of them out")
    check(variant)
    return variant
