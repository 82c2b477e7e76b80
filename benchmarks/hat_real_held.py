"""Machines that are not here: computing is done for real, and its result held until another machine would have it.

Two cores are neither four accelerators nor thirty devices. What a device computes it computes here, with its own caches
and threads, and then waits until the device of the paper's test bed would be ready; the cloud runs its batches here,
and hands out what comes of them when the paper's pipeline would. Both are the same for every method. The constants are
those of the virtual clock (:mod:`fl_edge.hat.simulated_device`, :mod:`fl_edge.hat.simulated_report`). What this machine
itself takes beyond the held time stays in the measurement, and is counted.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from fl_edge.hat.simulated_cloud import StageDelay
from fl_edge.hat.simulated_device import Device, Shape

P = TypeVar("P")
SPIN_S = 0.0002  # a sleeper wakes late by about as much


def sleep_until(due: float) -> None:
    """Return at a time of the monotonic clock, not before."""
    while (left := due - time.monotonic()) > 0:
        time.sleep(max(left - SPIN_S, 0.0))


@dataclass
class Processor:
    """A device's processor, which holds what is computed.

    Attributes
    ----------
    shape, device
        Whose layers stand for those of the model, and what they run on.
    held_s, over_s
        Seconds that computing should have taken, and what it took beyond them.
    """

    shape: Shape
    device: Device
    held_s: float = 0.0
    over_s: float = 0.0

    @contextmanager
    def holding(self, weights: float, rows: int) -> Iterator[None]:
        """Let what is computed inside take as long as a part of so many weights takes for some rows."""
        started = time.monotonic()
        yield
        due = started + (seconds := self.device.seconds(weights, rows))
        sleep_until(due)
        self.held_s += seconds
        self.over_s += time.monotonic() - due


def hold(part: P, processor: Processor, weights: Mapping[str, float]) -> P:
    """Return a part of a model of which some methods take as long as parts of so many weights take there.

    Parameters
    ----------
    part
        Is copied; its tensors are not.
    weights
        By the name of the method, whose first argument has the rows: tokens (b, n), or states (..., d).
    """
    held = copy.copy(part)
    for name, weight in weights.items():
        setattr(held, name, _holding(getattr(part, name), processor, weight))
    return held


def _holding(method: Callable[..., Any], processor: Processor, weights: float) -> Callable[..., Any]:
    def held(first: Tensor, *others: Any, **named: Any) -> Any:
        rows = first[..., 0].numel() if first.is_floating_point() else first.numel()
        with processor.holding(weights, rows):
            return method(first, *others, **named)

    return held


@dataclass
class Pipeline:
    """The cloud's stages: when a batch leaves the last, and when the first takes another.

    Attributes
    ----------
    delay, stages
        Of each, and how many.
    batches, tokens
        That went in.
    held_s, over_s
        As for a processor; of the first stage.
    """

    delay: StageDelay
    stages: int
    batches: int = 0
    tokens: int = 0
    held_s: float = 0.0
    over_s: float = 0.0
    _free: list[float] = field(default_factory=list)

    @property
    def free(self) -> float:
        """When the first stage takes a batch."""
        return self._free[0] if self._free else 0.0

    def enter(self, start: float, tokens: int) -> float:
        """Let a batch through that was computed from ``start`` till now; return when it is there."""
        self._free = self._free or [start] * self.stages
        seconds, end = self.delay(tokens), start
        for stage, free in enumerate(self._free):
            end = self._free[stage] = max(end, free) + seconds
        over = time.monotonic() - self._free[0]
        self.held_s += seconds
        self.over_s += max(0.0, over)
        self.batches += 1
        self.tokens += tokens
        return end
