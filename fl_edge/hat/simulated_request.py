"""One request on the virtual clock, as its device lives it: the prompt in chunks, then rounds of new tokens."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np

from fl_edge.hat.chunking import LONGEST, Conditions, chunk_length, chunks_of
from fl_edge.hat.monitor import DeviceMonitor
from fl_edge.hat.simulated_cloud import Batch, Parcel
from fl_edge.hat.simulated_device import Device, Drafting, Shape
from fl_edge.hat.simulated_methods import Method

Life = Generator[list[Parcel], tuple[Parcel, Batch], None]


@dataclass(eq=False)
class SimulatedRequest:
    """A request and what became of it.

    Attributes
    ----------
    number, device
        Of the request and of its device.
    at
        Seconds, when it begins.
    prompt, new_tokens
        Tokens.
    times
        Seconds of every new token, when the device has it.
    rounds
        Verifications, the prompt's end not among them.
    waits
        Seconds that each of its uploads waited for its last batch.
    """

    number: int
    device: int
    at: float
    prompt: int
    new_tokens: int
    times: list[float] = field(default_factory=list)
    rounds: int = 0
    waits: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.times[0] - self.at

    @property
    def tbt_s(self) -> float:
        """Mean time between tokens."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


@dataclass(eq=False)
class _Side:
    """A device's side of a request: its own time, and its link's."""

    request: SimulatedRequest
    shape: Shape
    device: Device
    monitor: DeviceMonitor
    stages: int
    now: float
    line: float = 0.0  # when the link up is free

    def send(self, rows: int, ready: float, prompt: bool = False, last: bool = True) -> Parcel:
        """Return the upload of rows that are ready at a time."""
        begin = max(ready, self.line)
        self.line = begin + rows * self.shape.row_bytes / self.device.up + self.device.message_s
        arrival = self.line + self.device.latency_s
        self.monitor.sent(rows * self.shape.row_bytes, arrival - begin)
        return Parcel(self.request.number, arrival, rows, prompt, last)

    def receive(self, parcel: Parcel, batch: Batch, rows: int) -> float:
        """Take in an answer and return when it is there."""
        self.monitor.answered(rows, batch.start - parcel.at, batch.tokens, batch.end - batch.start)
        self.request.waits.append(batch.start - parcel.at)
        down_s = rows * self.shape.row_bytes / self.device.down
        self.monitor.received(rows * self.shape.row_bytes, down_s + self.device.latency_s)
        return batch.end + self.device.latency_s + down_s

    def emit(self, count: int) -> None:
        """Note new tokens now, no more than are wanted."""
        room = self.request.new_tokens - len(self.request.times)
        self.request.times += [self.now] * min(count, room)


def live(
    request: SimulatedRequest,
    shape: Shape,
    device: Device,
    monitor: DeviceMonitor,
    method: Method,
    drafting: Drafting,
    stages: int,
    rng: np.random.Generator,
) -> Life:
    """Yield the uploads of a request, each time after the answer to the ones before.

    Parameters
    ----------
    request
        Is filled.
    shape, device, monitor
        Of its device; the monitor outlives the request.
    method, drafting
        What is done, and how drafts turn out.
    stages
        P.
    rng
        For the drafts' fate.
    """
    side = _Side(request, shape, device, monitor, stages, request.at, request.at)
    parcel, batch = yield _prompt(side, method)
    side.now = side.receive(parcel, batch, 1) + device.seconds(shape.head_weights)
    side.emit(1)
    if method.tree_rows:
        rounds = _trees(side, method.tree_rows, drafting, rng)
    elif method.drafts:
        rounds = _drafts(side, method.ahead, drafting, rng)
    else:
        rounds = _single(side)
    yield from rounds


def _prompt(side: _Side, method: Method) -> list[Parcel]:
    """Return the chunks of the prompt: the input submodel computes one while others travel."""
    shape, device, monitor, prompt = side.shape, side.device, side.monitor, side.request.prompt
    input_s = device.seconds(shape.input_weights, prompt) / prompt
    if method.chunks == "none":
        length = prompt
    elif monitor.up is None:
        length = min(LONGEST, prompt)  # as the real device, as long as nothing is measured
    else:
        known = Conditions(
            shape.row_bytes,
            monitor.up,
            monitor.delay,
            monitor.background or 0.0,
            side.stages,
            device.message_s,
            input_s,
        )
        length = chunk_length(prompt, known, method.chunks)
    parcels = []
    ready, left = side.now, prompt
    for rows in chunks_of(prompt, length):
        ready += device.seconds(shape.input_weights, rows)
        left -= rows
        parcels.append(side.send(rows, ready, prompt=True, last=left == 0))
    return parcels


def _single(side: _Side) -> Life:
    """One token a round trip."""
    shape, device = side.shape, side.device
    while len(side.request.times) < side.request.new_tokens:
        parcel, batch = yield [side.send(1, side.now + device.seconds(shape.input_weights))]
        side.request.rounds += 1
        side.now = side.receive(parcel, batch, 1) + device.seconds(shape.head_weights)
        side.emit(1)


def _trees(side: _Side, rows: int, drafting: Drafting, rng: np.random.Generator) -> Life:
    """Medusa: heads propose a tree, which is verified in one pass; as many levels hold as the accept length has it."""
    shape, device = side.shape, side.device
    heads_s = device.seconds(shape.medusa_weights)
    while len(side.request.times) < side.request.new_tokens:
        parcel, batch = yield [side.send(rows, side.now + heads_s + device.seconds(shape.input_weights, rows))]
        side.request.rounds += 1
        side.now = side.receive(parcel, batch, rows) + device.seconds(shape.head_weights, rows)
        side.emit(1 + _held(drafting, _length(drafting, rng), rng))


def _drafts(side: _Side, ahead: bool, drafting: Drafting, rng: np.random.Generator) -> Life:
    """HAT: drafts by the adapter; with ``ahead`` the next draft begins while this one is verified."""
    shape, device, monitor, request = side.shape, side.device, side.monitor, side.request
    step_s = device.seconds(shape.input_weights + shape.adapter_weights + shape.head_weights)
    ready_drafts: int | None = None
    while (room := request.new_tokens - len(request.times)) > 0:
        if ready_drafts is None:
            drafts = min(_length(drafting, rng), room - 1)
            side.now += drafts * step_s + device.seconds(shape.input_weights)
            monitor.drafted(step_s)
        else:
            drafts = min(ready_drafts, room - 1)
        sent = side.now
        parcel, batch = yield [side.send(drafts + 1, sent)]
        request.rounds += 1
        back = side.receive(parcel, batch, drafts + 1)
        steps = 0
        if ahead:
            wanted = _length(drafting, rng) + 1  # the last draft's own state is one more step
            fit = monitor.look_ahead(drafts + 1, shape.row_bytes)
            steps = min(wanted, fit, int((back - sent) / step_s) + 1)  # a step that has begun is finished
        side.now = max(back, sent + steps * step_s) + device.seconds(shape.head_weights, drafts + 1)
        held = _held(drafting, drafts, rng)
        side.emit(held + 1)
        hit = steps > 0 and held == drafts and rng.random() < drafting.guessed
        ready_drafts = steps - 1 if hit else None


def _length(drafting: Drafting, rng: np.random.Generator) -> int:
    """Draw how many drafts a round has."""
    drafts = 1
    while drafts < drafting.cap and rng.random() < drafting.confident:
        drafts += 1
    return drafts


def _held(drafting: Drafting, drafts: int, rng: np.random.Generator) -> int:
    """Draw how many of the drafts are accepted."""
    held = 0
    while held < drafts and rng.random() < drafting.held:
        held += 1
    return held
