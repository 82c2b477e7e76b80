"""The cloud of :mod:`benchmarks.hat_real`, in a process of its own: bytes in, bytes out, nothing else is shared.

A message says when it is there, since its link is paced: an upload is not looked at before, and an answer is not before
the last stage has it. The clock is the system's monotonic one, the same for all processes.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.hat_real_held import Pipeline, sleep_until
from fl_edge.hat.cloud import Cloud, Refusal
from fl_edge.hat.messages import Answer
from fl_edge.hat.middle import Middle
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.simulated_cloud import StageDelay
from fl_edge.hat.split import MiddleModel
from fl_edge.hat.wire import read_upload, write_answer

LEASE_S = 3600.0
_LENGTH = struct.Struct("<I")
_COARSE_S = 0.0015  # waiting for a message has the clock's milliseconds


def pack(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Return plain values and tensors as bytes."""
    arrays = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    forms = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    text = json.dumps({"head": head, "forms": forms}).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *(array.tobytes() for array in arrays.values())])


def unpack(packed: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Undo :func:`pack`."""
    (length,) = _LENGTH.unpack_from(packed)
    at = _LENGTH.size + length
    said = json.loads(packed[_LENGTH.size : at])
    tensors = {}
    for name, (kind, shape) in said["forms"].items():
        count = int(np.prod(shape))
        array = np.frombuffer(packed, kind, count, at)
        at += array.nbytes
        tensors[name] = torch.from_numpy(array.reshape(shape).copy())
    return said["head"], tensors


def serve(
    load: Callable[[], MiddleModel],
    capacity: int,
    delay: StageDelay,
    stages: int,
    devices: Sequence[Connection],
    control: Connection,
    core: int | None,
) -> None:
    """Run clouds, one after the other, each with the limits that ``control`` says; nothing ends it.

    Parameters
    ----------
    load
        Returns the middle submodel.
    capacity
        Tokens of a request at most.
    delay, stages
        Of the pipeline until which results are held.
    devices
        Connections, one a device.
    core
        Where to run; None: anywhere.
    """
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    with contextlib.ExitStack() as ways:  # who waits for a cloud that has failed hears of it
        for way in (control, *devices):
            ways.enter_context(way)
        middle = Middle(load(), capacity, capacity * len(devices))
        control.send("ready")
        while (asked := control.recv()) is not None:
            room = _Room(Cloud(middle, Limits(*asked), LEASE_S), delay, stages, devices)
            control.send("ready")
            room.run(control)
            control.recv()
            control.send(room.account())


class _Room:
    def __init__(self, cloud: Cloud, delay: StageDelay, stages: int, devices: Sequence[Connection]) -> None:
        self._cloud, self._devices = cloud, {each: str(place) for place, each in enumerate(devices)}
        self._ways = {name: each for each, name in self._devices.items()}
        self._pipeline = Pipeline(delay, stages)
        self._coming: list[tuple[float, int, str, Any]] = []
        self._numbers = itertools.count()
        self._busy, self._started = 0.0, time.monotonic()
        self._cpu = time.process_time()

    def account(self) -> dict[str, float]:
        """Return what the cloud did."""
        seconds, used = time.monotonic() - self._started, time.process_time() - self._cpu
        line = self._pipeline
        found = {"batches": line.batches, "rows": line.tokens, "held_s": line.held_s, "over_s": line.over_s}
        return {**found, "busy_s": self._busy, "cpu_s": used, "seconds": seconds}

    def run(self, control: Connection) -> None:
        """Serve until ``control`` has something to say and every request has ended: the next cloud has the same slots.

        Whoever speaks through ``control`` has heard of all ends, but their messages may still be in their pipes.
        """
        ways = [control, *self._devices]
        while ways[0] is control or self._cloud.requests or self._coming:
            left = self._next() - time.monotonic()
            for way in wait(ways, max(0.0, left - _COARSE_S)):
                if way is control:
                    ways = ways[1:]
                else:
                    self._take(way)  # type: ignore[arg-type]
            if 0 < (left := self._next() - time.monotonic()) <= _COARSE_S:
                sleep_until(time.monotonic() + left)
            self._go_on()

    def _next(self) -> float:
        """Return when there is something to do."""
        times = [self._coming[0][0]] if self._coming else []
        if self._cloud.waiting:
            times.append(self._pipeline.free)
        return min(times, default=time.monotonic() + 1.0)

    def _take(self, way: Connection) -> None:
        head, tensors = unpack(way.recv_bytes())
        message = head["end"] if "end" in head else read_upload(head["upload"], tensors)
        heapq.heappush(self._coming, (head["due"], next(self._numbers), self._devices[way], message))

    def _go_on(self) -> None:
        now = time.monotonic()
        while self._coming and self._coming[0][0] <= now:
            due, _, device, message = heapq.heappop(self._coming)
            if isinstance(message, int):
                self._cloud.end(device, message)
            else:
                self._cloud.submit(device, message, due)
        if self._cloud.waiting and now >= self._pipeline.free:
            self._step(now)

    def _step(self, now: float) -> None:
        before = self._cloud.waiting
        owed = self._cloud.step(now)
        self._busy += time.monotonic() - now
        end = self._pipeline.enter(now, before - self._cloud.waiting)
        for device, answer in owed:
            if isinstance(answer, Refusal):
                raise RuntimeError(f"the cloud refused {device}: {answer.reason}")
            if len(answer.rows):  # an inner chunk's device has gone on as soon as it had left
                self._answer(device, replace(answer, batch_s=end - now), end)

    def _answer(self, device: str, answer: Answer, end: float) -> None:
        plain, tensors = write_answer(answer)
        self._ways[device].send_bytes(pack({"due": end, "answer": plain}, tensors))
