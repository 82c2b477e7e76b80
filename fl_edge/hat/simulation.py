"""HAT and its baselines on a virtual clock: many devices, one pipelined cloud, requests at random times.

Chunk lengths, look-ahead and batches are those of the real rooms (:mod:`fl_edge.hat.chunking`,
:mod:`fl_edge.hat.monitor`, :mod:`fl_edge.hat.scheduling`); delays are modelled. Devices neither wait for each other's
links nor for their own other requests (ours): at the paper's rates U-shape has more requests in flight than there are
devices.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist, fmean, median, pstdev

from fl_edge.hat.monitor import DeviceMonitor
from fl_edge.hat.simulated_cloud import Batch, Parcel, SimulatedCloud, StageDelay
from fl_edge.hat.simulated_device import Drafting, Shape, TestBed
from fl_edge.hat.simulated_methods import Method
from fl_edge.hat.simulated_request import Life, SimulatedRequest, live
from fl_edge.seeding import numpy_rng

_SPREAD = 30


@dataclass(frozen=True)
class Prompts:
    """Lengths of prompts: a mixture of log-normal laws.

    Attributes
    ----------
    parts
        (share, median, standard deviation of the logarithm) of each.
    longest
        Tokens; what is drawn beyond it is drawn as it.
    """

    parts: tuple[tuple[float, float, float], ...]
    longest: int = 3968

    def draw(self, seed: int, count: int) -> list[int]:
        """Return the lengths of some prompts; every 30 in a row are spread over the whole law, in a random order."""
        rng = numpy_rng(seed, "hat", "prompts")
        ranks = [rank for _ in range(-(-count // _SPREAD)) for rank in rng.permutation(_SPREAD).tolist()][:count]
        places = [(rank + within) / _SPREAD for rank, within in zip(ranks, rng.random(count).tolist(), strict=True)]
        return [max(1, min(self.longest, round(self._quantile(place)))) for place in places]

    def _quantile(self, place: float) -> float:
        for share, middle, spread in self.parts[:-1]:
            if place < share:
                return middle * math.exp(spread * _normal(place / share))
            place -= share
        share, middle, spread = self.parts[-1]
        return middle * math.exp(spread * _normal(place / share))


def _normal(place: float) -> float:
    return NormalDist().inv_cdf(min(1 - 1e-9, max(1e-9, place)))


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes
    ----------
    shape, delay, stages
        Model and cloud.
    prompts, rate
        Lengths, and requests a second (Poisson).
    bed
        The devices.
    drafting, medusa
        How the adapter's drafts turn out, and those of Medusa's heads.
    requests, new_tokens
        How many; new tokens of each request.
    margin
        Share of the requests at either end that load the cloud but are not counted.
    seed
        Of all draws.
    """

    shape: Shape
    delay: StageDelay
    prompts: Prompts
    rate: float
    bed: TestBed
    drafting: Drafting
    medusa: Drafting
    stages: int = 4
    requests: int = 300
    new_tokens: int = 128
    margin: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a method did in a setting.

    Attributes
    ----------
    requests
        Those that count, by number.
    batches
        All of the cloud's, in order.
    """

    requests: list[SimulatedRequest]
    batches: list[Batch]

    def figures(self) -> dict[str, float]:
        """Return the paper's measures; times in milliseconds, a batch's in one stage."""
        stages = [1e3 * batch.stage_s for batch in self.batches]
        tenth = [1e3 * (each.times[min(10, len(each.times)) - 1] - each.at) for each in self.requests]
        rounds = sum(each.rounds for each in self.requests)
        return {
            "ttft_ms": 1e3 * fmean(each.ttft_s for each in self.requests),
            "tbt_ms": 1e3 * fmean(each.tbt_s for each in self.requests),
            "tenth_token_ms": median(tenth),
            "batch_ms": fmean(stages),
            "batch_std_ms": pstdev(stages),
            "batch_tokens": fmean(batch.tokens for batch in self.batches),
            "accept_length": sum(len(each.times) - 1 for each in self.requests) / max(1, rounds),
        }


def simulate(setting: Setting, method: Method, progress: Callable[[int], None] | None = None) -> Outcome:
    """Let all requests run to their end.

    Parameters
    ----------
    setting, method
        What is simulated.
    progress
        Is told the number of finished requests whenever it grows.
    """
    cloud = SimulatedCloud(setting.delay, setting.stages, method.limits)
    requests = _requests(setting)
    lives = _lives(setting, method, requests)
    batches: list[Batch] = []
    # (time, number, what): a request begins, an upload arrives, a batch ends, or (None) the first stage is free
    events: list[tuple[float, int, SimulatedRequest | Parcel | Batch | None]] = []
    numbers = itertools.count()
    finished = 0
    for request in requests:
        heapq.heappush(events, (request.at, next(numbers), request))
    while events:
        now, _, event = heapq.heappop(events)
        sent: list[Parcel] = []
        if isinstance(event, SimulatedRequest):
            sent = next(lives[event.number])
        elif isinstance(event, Batch):
            for parcel in event.finished:
                if parcel.last:
                    following = _answer(lives[parcel.request], parcel, event)
                    sent += following
                    finished += not following
                    if progress and not following:
                        progress(finished)
        else:
            cloud.waiting += [event] if event else []
            if cloud.waiting and now >= cloud.free_at:
                batches.append(cloud.form(now))
                heapq.heappush(events, (batches[-1].end, next(numbers), batches[-1]))
                heapq.heappush(events, (cloud.free_at, next(numbers), None))
        for parcel in sent:
            heapq.heappush(events, (parcel.at, next(numbers), parcel))
    skipped = int(setting.margin * setting.requests)
    return Outcome(requests[skipped : setting.requests - skipped], batches)


def _answer(life: Life, parcel: Parcel, batch: Batch) -> list[Parcel]:
    """Give a request its answer and return what it sends next; nothing at its end."""
    try:
        return life.send((parcel, batch))
    except StopIteration:
        return []


def _requests(setting: Setting) -> list[SimulatedRequest]:
    """Draw when requests begin, on which device, and their prompts."""
    pauses = numpy_rng(setting.seed, "hat", "arrivals").exponential(1 / setting.rate, setting.requests)
    devices = numpy_rng(setting.seed, "hat", "choice").integers(setting.bed.devices, size=setting.requests)
    times, prompts = pauses.cumsum(), setting.prompts.draw(setting.seed, setting.requests)
    drawn = zip(devices.tolist(), times.tolist(), prompts, strict=True)
    return [SimulatedRequest(number, *each, setting.new_tokens) for number, each in enumerate(drawn)]


def _lives(setting: Setting, method: Method, requests: list[SimulatedRequest]) -> list[Life]:
    """Return the course of every request, not yet begun."""
    drafting = setting.medusa if method.tree_rows else setting.drafting
    monitors = [DeviceMonitor() for _ in range(setting.bed.devices)]
    before: Counter[int] = Counter()
    lives = []
    for request in requests:
        device = setting.bed.draw(setting.seed, request.device, before[request.device])
        before[request.device] += 1
        rng = numpy_rng(setting.seed, "hat", "drafts", request.number)
        monitor = monitors[request.device]
        lives.append(live(request, setting.shape, device, monitor, method, drafting, setting.stages, rng))
    return lives
