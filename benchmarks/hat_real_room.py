"""Two processes for :mod:`benchmarks.hat_real`, the cloud's and the devices', and what a method did in them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.hat_real_cloud import serve
from benchmarks.hat_real_devices import Asked, Order, drive
from fl_edge.hat.config import HatConfig
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.simulated_cloud import StageDelay
from fl_edge.hat.simulated_device import Shape

_SOON_S = 0.5  # from an order to the start


class Rooms:
    """A cloud and devices that stay for one method after the other.

    Parameters
    ----------
    middle, parts
        Load what cloud and devices compute with; called in their processes.
    devices
        How many.
    capacity
        Tokens of a request at most.
    shape, delay, stages
        Of the model and the cloud that stand for those that are there.
    """

    def __init__(
        self,
        middle: Callable[[], Any],
        parts: Callable[[], dict[str, Any]],
        devices: int,
        capacity: int,
        shape: Shape,
        delay: StageDelay,
        stages: int,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        cores = sorted(os.sched_getaffinity(0))
        first, second = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
        ways = [context.Pipe() for _ in range(devices)]
        self._cloud, cloud = context.Pipe()
        self._devices, driver = context.Pipe()
        self._processes = [
            context.Process(
                target=serve,
                args=(middle, capacity, delay, stages, [way for way, _ in ways], cloud, first),
                daemon=True,
            ),
            context.Process(
                target=drive,
                args=(parts, shape, capacity, [way for _, way in ways], driver, second),
                daemon=True,
            ),
        ]
        for process in self._processes:
            process.start()
        for end in (cloud, driver, *(each for way in ways for each in way)):
            end.close()
        self._cloud.recv()
        self._devices.recv()
        atexit.register(self.close)

    def run(
        self, drafts: str, config: HatConfig, limits: Limits, requests: Sequence[Sequence[Asked]]
    ) -> dict[str, Any]:
        """Let the devices answer their requests; return what each says, ``records``, and the accounts of both sides."""
        self._cloud.send((limits.tokens, limits.chunk))
        self._cloud.recv()
        self._devices.send(Order(drafts, config, requests, time.monotonic() + _SOON_S))
        devices = self._devices.recv()
        self._cloud.send("account")
        return {**devices, "cloud": self._cloud.recv()}

    def close(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.terminate()
            process.join(5)
