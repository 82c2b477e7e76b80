"""What the server remembers from round to round, as a dataclass that turns into tensors and plain records and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fl_edge.edge.costs import VirtualClock
from fl_edge.edge.traffic import Traffic
from fl_edge.fedspine.bandit import Agent
from fl_edge.fedspine.config import FedSpineConfig
from fl_edge.fedspine.factors import Factors
from fl_edge.fedspine.importance import UnitScores, join
from fl_edge.fedspine.replies import checked_samples, named
from fl_edge.pruning import PruningPlan
from fl_edge.pruning.plan import UNITS

_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass
class DeviceState:
    """One device, known by its own name.

    Attributes
    ----------
    importance
        Smoothed scores of every unit of the unpruned model; those of units that are gone stay where they were. Empty
        before the device's first round.
    steps
        Iterations in them.
    loss
        After its last round, on its probe batches.
    """

    samples: int
    plan: PruningPlan
    agent: Agent
    importance: UnitScores = field(default_factory=list)
    steps: int = 0
    loss: float | None = None
    participation: int = 0

    def observe(self, scores: UnitScores, steps: int, weight: float) -> None:
        """Take a round's scores, of the units that the plan keeps, into the average."""
        if not steps:
            return
        kept = [
            {unit: torch.tensor(self.plan.kept(layer, unit)) for unit in UNITS}
            for layer in range(len(self.plan.layers))
        ]
        if not self.importance:
            self.importance = [
                {unit: torch.zeros(self.plan.total(layer, unit)) for unit in UNITS} for layer in range(len(kept))
            ]
        before = [
            {unit: all_[unit][index[unit]] for unit in UNITS} for all_, index in zip(self.importance, kept, strict=True)
        ]
        for all_, index, new in zip(
            self.importance, kept, join(before, scores, weight, self.steps, steps), strict=True
        ):
            for unit in UNITS:
                all_[unit][index[unit]] = new[unit]
        self.steps += steps


@dataclass
class FedSpineState:
    """Everything that must survive: the global adapter and head, and what is known of each device."""

    adapter: dict[str, Factors]
    head: dict[str, Tensor]
    server_round: int = 0  # last round completed
    clock: VirtualClock = field(default_factory=VirtualClock)
    traffic: Traffic = field(default_factory=Traffic)
    devices: dict[str, DeviceState] = field(default_factory=dict)

    def meet(self, device: str, samples: int, plan: PruningPlan, config: FedSpineConfig) -> None:
        """Take in a device's description; what is known of it from before stays.

        Raises
        ------
        ReplyError
            A device without samples.
        """
        checked_samples(samples)
        if known := self.devices.get(device):
            known.samples = samples
        else:
            self.devices[device] = DeviceState(samples, plan, Agent(config.bandit, config.space))

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        found = {f"adapter.{name}": tensor for name, tensor in named(self.adapter).items()}
        found |= {f"head.{name}": tensor for name, tensor in self.head.items()}
        for name, device in self.devices.items():
            for layer, scores in enumerate(device.importance):
                found |= {f"importance.{name}/{layer}/{unit}": score for unit, score in scores.items()}
        return found

    def to_record(self) -> dict[str, Any]:
        """Return what is not a tensor, as plain values that JSON can hold exactly."""
        return {
            "server_round": self.server_round,
            "clock": asdict(self.clock),
            "traffic": asdict(self.traffic),
            "devices": {
                name: {
                    "samples": device.samples,
                    "plan": device.plan.to_record(),
                    "agent": device.agent.to_record(),
                    "steps": device.steps,
                    "loss": device.loss,
                    "participation": device.participation,
                }
                for name, device in self.devices.items()
            },
        }

    @classmethod
    def from_record(
        cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any], config: FedSpineConfig
    ) -> FedSpineState:
        """Undo :meth:`tensors` and :meth:`to_record`."""
        devices = {}
        for name, known in record["devices"].items():
            plan = PruningPlan.from_record(known["plan"])
            scores: UnitScores = [
                {unit: tensors[f"importance.{name}/{layer}/{unit}"] for unit in UNITS}
                for layer in range(len(plan.layers) if known["steps"] else 0)
            ]
            agent = Agent.from_record(config.bandit, config.space, known["agent"])
            devices[name] = DeviceState(
                known["samples"], plan, agent, scores, known["steps"], known["loss"], known["participation"]
            )
        paths = [
            n.removeprefix("adapter.").removesuffix(_A) for n in tensors if n.startswith("adapter.") and n.endswith(_A)
        ]
        return cls(
            {path: Factors(tensors[f"adapter.{path}{_A}"], tensors[f"adapter.{path}{_B}"]) for path in paths},
            {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")},
            record["server_round"],
            VirtualClock(**record["clock"]),
            Traffic(**record["traffic"]),
            devices,
        )
