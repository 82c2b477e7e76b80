"""HAT+ (ours, not the paper's): which drafts are worth their time, from what a device has measured.

A round brings tokens and takes seconds; over many rounds their quotient, the rate, is to be as large as can be. With
the largest rate r known, the best a round can do is to maximise tokens - r x seconds. So a row, or a step, is worth it
if the tokens that it brings on the average are more than r times its seconds. The rate is taken from the rounds so far,
and rises with every better choice (Dinkelbach's iteration). A token's chance is the product, over its way from the
newest token, of the shares of drafts that were accepted, by how sure the adapter was; these shares are measured, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fl_edge.hat.delays import smooth
from fl_edge.hat.monitor import DeviceMonitor

RANKS = 4  # drafts after one token, at most
_BINS = 10  # of the root of how sure the adapter is: most drafts of a small model are below 0.2
_PRIOR = 8.0  # drafts that the adapter's own word counts for
_PAST = 0.95  # weight of the past in the rate: single rounds vary much
_SPREAD = 0.5  # variance of the rows of answers that tells what a row costs
_IDLE = 0.05  # less likely drafts are not made ahead, though there is time: they only cost energy

Choice = Literal["step", "leaves", "stop"]


@dataclass
class Acceptance:
    """The share of drafts that hold, by their rank and by how sure the adapter was of them.

    Attributes
    ----------
    seen, held
        For each rank, the likeliest first, and each bin: drafts whose fate is known, and those that were accepted.
    """

    seen: list[list[int]] = field(default_factory=lambda: [[0] * _BINS for _ in range(RANKS)])
    held: list[list[int]] = field(default_factory=lambda: [[0] * _BINS for _ in range(RANKS)])

    def observe(self, rank: int, sure: float, held: bool) -> None:
        """Take in a draft whose predecessors all held."""
        self.seen[rank][_bin(sure)] += 1
        self.held[rank][_bin(sure)] += held

    def chance(self, rank: int, sure: float) -> float:
        """Return the expected share; before anything is known it is the adapter's own probability."""
        seen, held = self.seen[rank][_bin(sure)], self.held[rank][_bin(sure)]
        return (held + _PRIOR * sure) / (seen + _PRIOR)


@dataclass(frozen=True)
class Costs:
    """What a round's parts take, and what tokens are worth.

    Attributes
    ----------
    step_s
        Seconds of a draft step: input submodel, adapter and head for a few tokens at once.
    leaves_s
        Seconds of the input submodel alone, for what is sent without being drafted on from.
    row_s
        Seconds that a further row adds to the answer: link and cloud.
    rate
        Tokens a second, over all rounds so far.
    further
        Chance of the likeliest token after a token, on the average.
    """

    step_s: float
    leaves_s: float
    row_s: float
    rate: float
    further: float

    def pays(self, chance: float) -> bool:
        """Return whether a row with this chance to be accepted is worth being sent."""
        return chance > self.rate * self.row_s


def choose(costs: Costs, leaves: Sequence[float], begun: bool) -> Choice:
    """Return what to do with a draft tree next.

    Parameters
    ----------
    leaves
        Chances of the tokens that are drafted but not yet run, of those that can be run side by side.
    begun
        Whether the newest token of the text has been run; else it is the only leaf, and must be.

    Returns
    -------
    str
        ``step``: run the likeliest and draft on from them. ``leaves``: run those that pay, and send. ``stop``: send
        what has been run.
    """
    rate, row = costs.rate, costs.rate * costs.row_s
    last = sum(max(0.0, chance - row) for chance in leaves) - rate * costs.leaves_s
    after = sum(max(0.0, costs.further * chance - row) for chance in leaves) - rate * costs.leaves_s
    step = last + rate * (costs.leaves_s - costs.step_s) + max(0.0, after)
    if step > last and (step > 0 or not begun):
        return "step"
    return "leaves" if last > 0 or not begun else "stop"


@dataclass
class Payoff:
    """What a device has measured of its rounds; outlives requests.

    Attributes
    ----------
    monitor
        Of link and cloud.
    row_bytes
        Bytes of a row on the link.
    acceptance
        Of drafts.
    step_s, leaves_s
        As in :class:`Costs`; None: not yet measured.
    reached, reached_further
        Smoothed chances of the tokens that were drafted on from, and of the likeliest tokens after them.
    fixed_s
        Seconds of an answer beyond what its rows cost.
    answers
        Smoothed rows of an answer, its seconds, and the means of rows squared and of rows times seconds.
    round_s, round_tokens
        Smoothed, of a round.
    """

    monitor: DeviceMonitor
    row_bytes: float = 0.0
    acceptance: Acceptance = field(default_factory=Acceptance)
    step_s: float | None = None
    leaves_s: float | None = None
    reached: float | None = None
    reached_further: float | None = None
    fixed_s: float | None = None
    answers: list[float] | None = None
    round_s: float | None = None
    round_tokens: float | None = None

    @property
    def row_s(self) -> float:
        """Seconds that a further row adds: link and cloud.

        A direction of the link that was never measured is taken to be as fast as the other. If none was, since all
        messages were too small, it is the slope of the least squares line through the answers so far.
        """
        monitor = self.monitor
        if rates := [rate for rate in (monitor.up, monitor.down) if rate]:
            rows = (monitor.background or 0.0) + 1
            link = 2 * self.row_bytes * sum(1 / rate for rate in rates) / len(rates)
            return link + (monitor.delay(rows + 8) - monitor.delay(rows)) / 8
        if self.answers is None:
            return 0.0
        rows, seconds, squares, products = self.answers
        spread = squares - rows**2
        return max(0.0, (products - rows * seconds) / spread) if spread > _SPREAD else 0.0

    @property
    def costs(self) -> Costs | None:
        """All of it; None as long as something was never measured."""
        if self.step_s is None or self.leaves_s is None or not self.round_s or not self.round_tokens:
            return None
        return Costs(self.step_s, self.leaves_s, self.row_s, self.round_tokens / self.round_s, self.further)

    @property
    def further(self) -> float:
        """As in :class:`Costs`; tokens that are likely to be reached count more. 0 if nothing was drafted yet."""
        return self.reached_further / self.reached if self.reached and self.reached_further else 0.0

    def answer_s(self, rows: int) -> float:
        """Return the seconds expected from an upload of rows to the end of its answer."""
        return (self.fixed_s or 0.0) + rows * self.row_s

    def stepped(self, seconds: float) -> None:
        """Take in a draft step."""
        self.step_s = smooth(self.step_s, seconds)

    def leaved(self, seconds: float) -> None:
        """Take in a run of the input submodel alone."""
        self.leaves_s = smooth(self.leaves_s, seconds)

    def drafted(self, chance: float, further: float) -> None:
        """Take in the chance of a token, and that of the likeliest one after it, its own included."""
        self.reached = smooth(self.reached, chance, _PAST)
        self.reached_further = smooth(self.reached_further, further, _PAST)

    def answered(self, rows: int, seconds: float) -> None:
        """Take in an answer, from the upload on."""
        new = (float(rows), seconds, float(rows) ** 2, rows * seconds)
        self.answers = [smooth(old, each, _PAST) for old, each in zip(self.answers or new, new, strict=True)]
        self.fixed_s = smooth(self.fixed_s, max(0.0, seconds - rows * self.row_s))

    def rounded(self, tokens: int, seconds: float) -> None:
        """Take in a round, from one answer to the next."""
        self.round_s = smooth(self.round_s, seconds, _PAST)
        self.round_tokens = smooth(self.round_tokens, float(tokens), _PAST)

    def goes_ahead(self, chances: Sequence[float], rows: int, waited_s: float) -> bool:
        """Return whether another step is made before an answer.

        Parameters
        ----------
        chances
            That the answer leads to each of the tokens that the step would run.
        rows
            Of the upload.
        waited_s
            Since the upload.
        """
        if self.step_s is None or self.fixed_s is None:
            return True
        late = max(0.0, waited_s + self.step_s - self.answer_s(rows))  # what it would hold the answer up for
        return sum(chances) > _IDLE and late < sum(chances) * self.step_s

    def to_record(self) -> dict[str, Any]:
        """Return plain values that JSON can hold, without the monitor's."""
        names = ("step_s", "leaves_s", "reached", "reached_further", "fixed_s", "answers", "round_s", "round_tokens")
        return {
            **{name: getattr(self, name) for name in names},
            "seen": self.acceptance.seen,
            "held": self.acceptance.held,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], monitor: DeviceMonitor) -> Payoff:
        """Undo :meth:`to_record`."""
        numbers = {name: value for name, value in record.items() if name not in ("seen", "held")}
        return cls(monitor, acceptance=Acceptance(record["seen"], record["held"]), **numbers)


def _bin(sure: float) -> int:
    return min(int(math.sqrt(sure) * _BINS), _BINS - 1)
