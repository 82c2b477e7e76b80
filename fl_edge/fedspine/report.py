"""One round of FedSpine in numbers, for people (a line) and for programs (a record)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class DeviceRound:
    """What one device was given, why, and what came of it."""

    device: str
    ratio: float
    rank: int
    why: str
    sparsity: float  # after the cut
    loss_before: float
    loss_after: float
    compute_s: float  # virtual or measured
    transfer_s: float
    reward: float
    cells: int  # leaves of its bandit's tree

    @property
    def busy_s(self) -> float:
        """t_i, completion time."""
        return self.compute_s + self.transfer_s


@dataclass(frozen=True)
class Absent:
    """A device whose round does not count."""

    device: str
    why: str


@dataclass(frozen=True)
class RoundReport:
    """What happened in one round. Virtual seconds are the device profiles'; real seconds are this machine's."""

    server_round: int
    learning_rate: float
    devices: list[DeviceRound]
    absent: list[Absent]
    test_accuracy: float | None
    test_loss: float | None
    test_sparsity: float | None  # of the model that was tested
    waiting_s: float  # mean over the devices
    virtual_s: float | None  # since the first round; None where time is measured
    real_s: float  # of this round
    up_bytes: int  # of this round, devices to server
    down_bytes: int

    def to_record(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RoundReport:
        """Undo :meth:`to_record`."""
        devices = [DeviceRound(**device) for device in record["devices"]]
        return cls(**{**record, "devices": devices, "absent": [Absent(**absent) for absent in record["absent"]]})

    def _mean(self, name: str) -> float | None:
        return fmean(getattr(device, name) for device in self.devices) if self.devices else None

    def scalars(self) -> dict[str, float | None]:
        """Return what TensorBoard follows over the rounds."""
        return {
            "accuracy/test": self.test_accuracy,
            "loss/test": self.test_loss,
            "loss/devices": self._mean("loss_after"),
            "pruning/sparsity": self._mean("sparsity"),
            "pruning/sparsity_tested": self.test_sparsity,
            "bandit/ratio": self._mean("ratio"),
            "bandit/rank": self._mean("rank"),
            "bandit/reward": self._mean("reward"),
            "bandit/cells": self._mean("cells"),
            "control/learning_rate": self.learning_rate,
            "control/absent": len(self.absent),
            "time/waiting_s": self.waiting_s,
            "time/virtual_s": self.virtual_s,
            "time/real_s_of_round": self.real_s,
            "traffic/up_bytes": self.up_bytes,
            "traffic/down_bytes": self.down_bytes,
        }

    def histograms(self) -> dict[str, Sequence[float]]:
        """Return what TensorBoard shows of the devices."""
        names = ("ratio", "rank", "sparsity", "reward", "busy_s") if self.devices else ()
        return {f"devices/{name}": [getattr(device, name) for device in self.devices] for name in names}

    def line(self, rounds: int, left_s: float) -> str:
        """Return the round as one line of text; ``left_s`` is the time that the remaining rounds may take."""
        tested = "" if self.test_accuracy is None else f"acc {self.test_accuracy:.3f}  "
        tested += "" if self.test_loss is None else f"loss {self.test_loss:.3f}  "
        ranks, gone = [device.rank for device in self.devices] or [0], [d.sparsity for d in self.devices] or [0.0]
        clock = "" if self.virtual_s is None else f"virtual {self.virtual_s:8.1f} s  "
        absent = f"  absent {len(self.absent)}" if self.absent else ""
        minutes, seconds = divmod(round(left_s), 60)
        return (
            f"round {self.server_round:>{len(str(rounds))}}/{rounds}  {tested}devices {len(self.devices):>2}  "
            f"sparsity {min(gone):.2f}-{max(gone):.2f}  rank {min(ranks):>2}-{max(ranks):<2}  "
            f"waiting {self.waiting_s:6.2f} s  {clock}{(self.up_bytes + self.down_bytes) / 1e6:6.2f} MB"
            f"{absent}  left {minutes}:{seconds:02}"
        )


def summarise(reports: Sequence[RoundReport]) -> dict[str, Any]:
    """Return the figures of a whole run: what result.json and the closing table hold."""
    last = reports[-1]
    every = [device for report in reports for device in report.devices]
    tested = [report.test_accuracy for report in reports if report.test_accuracy is not None]
    final = {device.device: device.sparsity for device in every}
    return {
        "rounds": last.server_round,
        "test_accuracy": last.test_accuracy,
        "best_test_accuracy": max(tested, default=None),
        "test_loss": last.test_loss,
        "test_sparsity": last.test_sparsity,
        "sparsity_min": min(final.values(), default=None),
        "sparsity_max": max(final.values(), default=None),
        "rank_mean": fmean(device.rank for device in every) if every else None,
        "reward_mean": fmean(device.reward for device in every) if every else None,
        "cells_mean": fmean(device.cells for device in last.devices) if last.devices else None,
        "waiting_s_mean": fmean(report.waiting_s for report in reports),
        "virtual_s": last.virtual_s,
        "real_s": sum(report.real_s for report in reports),
        "up_bytes": sum(report.up_bytes for report in reports),
        "down_bytes": sum(report.down_bytes for report in reports),
        "absent": sum(len(report.absent) for report in reports),
    }
