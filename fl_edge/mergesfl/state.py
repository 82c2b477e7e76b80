"""What the server remembers from round to round, as a dataclass that turns into plain records and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fl_edge.edge.costs import VirtualClock
from fl_edge.edge.traffic import Traffic
from fl_edge.errors import ReplyError
from fl_edge.mergesfl.estimation import smooth
from fl_edge.mergesfl.workers import Workers


@dataclass
class DeviceState:
    """One device, known by its own name: Flower's node ids change when a node restarts."""

    labels: list[int]  # samples of each class
    compute_s: float  # mu_i, smoothed (eq. 5)
    transfer_s: float  # beta_i, smoothed (eq. 6)
    participation: int = 0  # K_i, rounds completed


@dataclass
class ControlState:
    """Everything of the control module that must survive: estimates, counters, clock and traffic."""

    server_round: int = 0  # last round completed
    clock: VirtualClock = field(default_factory=VirtualClock)
    traffic: Traffic = field(default_factory=Traffic)
    devices: dict[str, DeviceState] = field(default_factory=dict)

    def observe(self, device: str, compute_s: float, transfer_s: float, smoothing: float) -> None:
        """Take a measurement of a known device into its estimates (eqs. 5-6).

        Raises
        ------
        ReplyError
            A cost that no device can have.
        """
        _check_costs(compute_s, transfer_s)
        known = self.devices[device]
        known.compute_s = smooth(known.compute_s, compute_s, smoothing)
        # a device cannot tell its transfer time before the first exchange: it begins at 0, which is no observation
        known.transfer_s = smooth(known.transfer_s or None, transfer_s, smoothing)

    def meet(self, device: str, labels: Sequence[int], compute_s: float, transfer_s: float) -> bool:
        """Take a device's description, and tell whether it is new.

        The estimates of a device that is known already stay as they are: see :meth:`observe`.

        Raises
        ------
        ReplyError
            No samples, negative counts, another number of classes than the devices before, or impossible costs.
        """
        _check_costs(compute_s, transfer_s)
        if not labels or min(labels) < 0 or sum(labels) < 1:
            raise ReplyError(f"it describes {sum(labels)} samples in {len(labels)} classes; at least one sample is due")
        if self.devices and len(labels) != self.num_classes:
            raise ReplyError(f"it describes {len(labels)} classes; the devices before it have {self.num_classes}")
        if known := self.devices.get(device):
            known.labels = list(labels)
            return False
        self.devices[device] = DeviceState(list(labels), compute_s, transfer_s)
        return True

    @property
    def num_classes(self) -> int:
        """Return the number of classes, 0 before any device is known."""
        return len(next(iter(self.devices.values())).labels) if self.devices else 0

    def workers(self, names: Sequence[str]) -> Workers:
        """Return what the control module plans with, one row for each name, in this order."""
        known = [self.devices[name] for name in names]
        counts = np.array([device.labels for device in known], dtype=np.float64)
        return Workers(
            labels=counts / counts.sum(1, keepdims=True),
            samples=counts.sum(1).astype(np.int64),
            compute_s=np.array([device.compute_s for device in known]),
            transfer_s=np.array([device.transfer_s for device in known]),
            participation=np.array([device.participation for device in known], dtype=np.int64),
        )

    def to_record(self) -> dict[str, Any]:
        """Return plain values that JSON can hold, exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ControlState:
        """Undo :meth:`to_record`."""
        devices = {name: DeviceState(**device) for name, device in record["devices"].items()}
        return cls(record["server_round"], VirtualClock(**record["clock"]), Traffic(**record["traffic"]), devices)


def _check_costs(compute_s: float, transfer_s: float) -> None:
    if not (0 < compute_s < math.inf and 0 <= transfer_s < math.inf):
        raise ReplyError(
            f"it reports {compute_s} s of compute and {transfer_s} s of transfer a sample; a positive number and one "
            "of at least 0 are due"
        )
