"""The devices of :mod:`benchmarks.hat_real`: a thread and a session each, together in a process of their own.

The link of each is paced: an upload is there when its bytes over the rate, and the latency, have passed; so is an
answer. The clock is the system's monotonic one, the same for all processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks.hat_real_cloud import pack, unpack
from benchmarks.hat_real_held import Processor, hold, sleep_until
from fl_edge.edge.paced import PacedLink
from fl_edge.hat.config import HatConfig
from fl_edge.hat.messages import Upload
from fl_edge.hat.session import DeviceSession
from fl_edge.hat.simulated_device import Device, Shape
from fl_edge.hat.wire import read_answer, write_upload

SWITCH_S = 0.0005  # devices have no interpreter in common: none may keep it for long


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes
    ----------
    number, at
        Of the request, and seconds from the start.
    prompt
        Tokens.
    machine
        What the device and its link are like by then.
    """

    number: int
    at: float
    prompt: list[int]
    machine: Device


@dataclass(frozen=True)
class Order:
    """What the devices are to do.

    Attributes
    ----------
    drafts
        ``adapter``, ``medusa`` or nothing.
    config
        How they generate.
    requests
        Of each device, by time.
    start
        Of the monotonic clock.
    """

    drafts: str
    config: HatConfig
    requests: Sequence[Sequence[Asked]]
    start: float


def drive(
    load: Callable[[], dict[str, Any]],
    shape: Shape,
    capacity: int,
    clouds: Sequence[Connection],
    control: Connection,
    core: int | None,
) -> None:
    """Carry out orders, one after the other.

    Parameters
    ----------
    load
        Returns the device's part as ``model``, and what drafts by name.
    shape
        Of the model that the machines run and the links carry rows of.
    capacity
        Tokens of a request at most.
    clouds
        Each device's connection.
    core
        Where to run; None: anywhere.
    """
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_S)
    with contextlib.ExitStack() as stack:  # who waits for devices that have failed hears of it
        for way in (control, *clouds):
            stack.enter_context(way)
        parts = load()
        control.send("ready")
        threads = stack.enter_context(ThreadPoolExecutor(len(clouds), "device"))
        while (order := control.recv()) is not None:
            used = time.process_time()
            devices = [_Device(parts, order, shape, capacity, each) for each in clouds]
            found = threads.map(_Device.run, devices, order.requests)
            records = [record for part in found for record in part]
            control.send({
                "records": records,
                "cpu_s": time.process_time() - used,
                "held_s": sum(each.processor.held_s for each in devices),
                "over_s": sum(each.processor.over_s for each in devices),
            })  # fmt: skip


class _Device:
    def __init__(self, parts: dict[str, Any], order: Order, shape: Shape, capacity: int, cloud: Connection) -> None:
        self._start, self._cloud = order.start, cloud
        self.processor = Processor(shape, Device(1.0, 1.0, 1.0, 1.0))
        own = {"embed_and_run": shape.input_weights, "head": shape.head_weights, "draft_head": shape.head_weights}
        model = hold(parts["model"], self.processor, own)
        drafts = parts[order.drafts] if order.drafts else None
        if drafts is not None:
            weights = shape.adapter_weights if order.drafts == "adapter" else shape.medusa_weights
            drafts = hold(drafts, self.processor, {"forward": weights})
        self._row_bytes = shape.row_bytes
        self._text: list[int] = []
        self._session = DeviceSession(
            model, drafts, order.config, capacity, 0, (), lambda _, tokens: self._text.extend(tokens)
        )

    def run(self, requests: Sequence[Asked]) -> list[dict[str, Any]]:
        """Answer one request after the other, each not before its time."""
        return [self._run(each) for each in requests]

    def _run(self, asked: Asked) -> dict[str, Any]:
        sleep_until(self._start + asked.at)
        late = time.monotonic() - self._start - asked.at
        self.processor.device = machine = asked.machine
        link = PacedLink(machine.up, machine.down, machine.latency_s)
        session, self._text, sent = self._session, [], 0
        upload: Upload | None = session.begin(asked.number, torch.tensor(asked.prompt))
        while upload is not None:
            sent += (size := self._size(upload.rows))
            due = link.up.book(size)
            plain, tensors = write_upload(upload)
            self._cloud.send_bytes(pack({"due": due, "upload": plain}, tensors))
            session.look_ahead()
            if not upload.last:
                sleep_until(due - machine.latency_s)  # then it has left
                upload = session.go_on()
                continue
            head, tensors = unpack(self._cloud.recv_bytes())
            sleep_until(head["due"])
            answer = read_answer(head["answer"], tensors)
            link.down.wait(link.down.book(self._size(answer.rows)))
            upload = session.answer(answer)
        self._cloud.send_bytes(pack({"due": time.monotonic(), "end": asked.number}, {}))
        text = hashlib.blake2b(repr(self._text).encode(), digest_size=4).hexdigest()
        return {"number": asked.number, "late_s": late, "text": text, "paced_up": sent, **asdict(session.account)}

    def _size(self, rows: Tensor) -> int:
        """Return the bytes of as many rows of the model that stands for this one: fp16, or half of that if packed."""
        return len(rows) * self._row_bytes // (1 if rows.is_floating_point() else 2)
