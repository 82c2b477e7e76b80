"""What the cloud's delay is, by the size of a batch, as it is learned from batches.

HAT: the cloud keeps (mu_t, eta_t) of every batch, and all that is measured is smoothed with 0.8 on the past. *Ours*:
the form of g_t (:class:`BatchDelay`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PAST = 0.8  # weight of the past in every estimate (HAT)
LARGEST_BIN = 4096  # tokens
EARLY = 64  # observations that are kept for the fit of the first batches


def smooth(previous: float | None, observed: float, past: float = PAST) -> float:
    """Return the new estimate, past * previous + (1 - past) * observed; the first observation is the first estimate."""
    return observed if previous is None else past * previous + (1.0 - past) * observed


@dataclass
class BatchDelay:
    """g_t: seconds that the cloud needs for a batch, by the number of its tokens. The form is *ours*.

    Bins of 1, 2-3, 4-7, .. tokens, the last from 4096 on. A bin keeps smoothed tokens and seconds of its batches, hence
    a point; between points the delay is linear, left of the first it is the first's, and a running maximum keeps it
    from falling. Until three bins are filled it is c0 + c1 max(0, n - n0), by least squares over the first batches. To
    the right of what was seen the last slope goes on, but never at a higher price a token than that of the largest
    batch seen.

    Attributes
    ----------
    bins
        Number of the bin, floor(log2 n), to (tokens, seconds).
    early
        (tokens, seconds) of the first batches; empty as soon as three bins are filled.
    """

    bins: dict[int, tuple[float, float]] = field(default_factory=dict)
    early: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._line = self._fitted()

    @property
    def known(self) -> bool:
        """Whether anything was observed; before that every delay is 0."""
        return bool(self.bins)

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in a batch of at least one token and what it took."""
        place = min(tokens, LARGEST_BIN).bit_length() - 1
        size, delay = self.bins.get(place, (None, None))
        self.bins[place] = (smooth(size, float(tokens)), smooth(delay, seconds))
        self.early = [*self.early, (float(tokens), seconds)][-EARLY:] if len(self.bins) < 3 else []
        self._line = self._fitted()

    def __call__(self, tokens: float) -> float:
        """Return the expected seconds of a batch; never less than those of a smaller one."""
        sizes, delays = self._line
        if not sizes:
            return 0.0
        right = bisect_right(sizes, tokens)
        if right == 0:
            return delays[0]
        size, delay = sizes[right - 1], delays[right - 1]
        if right < len(sizes):
            return delay + (tokens - size) * (delays[right] - delay) / (sizes[right] - size)
        slope = (delay - delays[-2]) / (size - sizes[-2]) if len(sizes) > 1 else 0.0
        return delay + (tokens - size) * min(slope, delay / size)

    def _fitted(self) -> tuple[list[float], list[float]]:
        """Return the corners of g_t: tokens, ascending, and seconds, never falling."""
        if 0 < len(self.bins) < 3 and self.early:
            return _hinge(self.early)
        points = sorted(self.bins.values())
        delays: list[float] = []
        for _, seconds in points:
            delays.append(max(seconds, delays[-1] if delays else 0.0))
        return [size for size, _ in points], delays

    def to_record(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {
            "bins": [[place, *self.bins[place]] for place in sorted(self.bins)],
            "early": [list(batch) for batch in self.early],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> BatchDelay:
        """Undo :meth:`to_record`."""
        bins = {int(place): (float(size), float(delay)) for place, size, delay in record["bins"]}
        return cls(bins, [(float(size), float(delay)) for size, delay in record["early"]])


def _hinge(batches: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the corners of the best c0 + c1 max(0, n - n0), c1 >= 0, n0 one of the sizes seen."""
    sizes = sorted({size for size, _ in batches})
    mean = sum(seconds for _, seconds in batches) / len(batches)
    best, corners = math.inf, ([sizes[0]], [mean])
    for knee in sizes[:-1]:
        beyond = [max(0.0, size - knee) for size, _ in batches]
        centre = sum(beyond) / len(beyond)
        spread = sum((x - centre) ** 2 for x in beyond)
        slope = sum((x - centre) * seconds for x, (_, seconds) in zip(beyond, batches, strict=True)) / spread
        slope = max(0.0, slope)
        base = max(0.0, mean - slope * centre)
        error = sum((base + slope * x - seconds) ** 2 for x, (_, seconds) in zip(beyond, batches, strict=True))
        if error < best:
            best, corners = error, ([knee, sizes[-1]], [base, base + slope * (sizes[-1] - knee)])
    return corners
