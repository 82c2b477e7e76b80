"""The cloud of the virtual clock: a pipeline of stages that takes a batch whenever its first stage is free."""

from __future__ import annotations

from dataclasses import dataclass, field

from fl_edge.hat.scheduling import Limits, Waiting, next_batch


@dataclass(frozen=True)
class StageDelay:
    """Seconds that a batch takes in one stage: flat up to a knee, then rising. Both constants are *ours*.

    Attributes
    ----------
    base_s
        Up to the knee.
    token_s
        For each token beyond it.
    knee
        Tokens; the paper's pilot sees the delay take off above about 512.
    """

    base_s: float
    token_s: float
    knee: int = 512

    def __call__(self, tokens: int) -> float:
        """Return the seconds of a batch of so many tokens."""
        return self.base_s + self.token_s * max(0, tokens - self.knee)


@dataclass(eq=False)
class Parcel:
    """Rows of one upload in the cloud.

    Attributes
    ----------
    request
        Whose.
    at
        When they are there, seconds.
    rows
        That were not yet in a batch.
    prompt
        A chunk of a prompt; else a verification.
    last
        An answer is wanted.
    """

    request: int
    at: float
    rows: int
    prompt: bool
    last: bool = True


@dataclass(frozen=True, eq=False)
class Batch:
    """What goes through the pipeline together.

    Attributes
    ----------
    start, end
        Seconds.
    tokens
        In all.
    stage_s
        In each stage.
    finished
        Uploads whose last row is in it.
    """

    start: float
    end: float
    tokens: int
    stage_s: float
    finished: list[Parcel]


@dataclass(eq=False)
class SimulatedCloud:
    """Waiting uploads, the scheduler of the real cloud, and a pipeline.

    Attributes
    ----------
    delay
        Of each stage.
    stages
        P.
    limits
        Of a batch.
    """

    delay: StageDelay
    stages: int
    limits: Limits
    waiting: list[Parcel] = field(default_factory=list)
    started: set[int] = field(default_factory=set)  # requests of which rows were run

    def __post_init__(self) -> None:
        self._free = [0.0] * self.stages

    @property
    def free_at(self) -> float:
        """When the first stage can take a batch."""
        return self._free[0]

    def form(self, now: float) -> Batch:
        """Make a batch of what waits and send it through the pipeline; something must wait."""
        listed = [
            Waiting(each.request, each.rows, not each.prompt, each.request in self.started) for each in self.waiting
        ]
        finished, tokens = [], 0
        for index, rows in next_batch(listed, self.limits):
            parcel = self.waiting[index]
            parcel.rows -= rows
            tokens += rows
            self.started.add(parcel.request)
            if parcel.rows == 0:
                finished.append(parcel)
        self.waiting = [each for each in self.waiting if each.rows]
        seconds, end = self.delay(tokens), now
        for stage, free in enumerate(self._free):
            end = self._free[stage] = max(end, free) + seconds
        return Batch(now, end, tokens, seconds, finished)
