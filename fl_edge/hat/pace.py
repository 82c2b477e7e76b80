"""How much at a time: chunks of a prompt, drafts before they are verified, and steps ahead of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fl_edge.hat.chunking import Conditions, chunk_length
from fl_edge.hat.config import HatConfig
from fl_edge.hat.monitor import DeviceMonitor

_FIRST = 64  # tokens, while link or cloud are unknown: long enough to tell a rate, short enough to lose little


class Pace(Protocol):
    """How much at a time. The text does not depend on it."""

    def chunk(self, left: int) -> int:
        """Return how many of the prompt's tokens that are left travel at once, at least 1."""

    def goes_on(self, sure: Sequence[float]) -> bool:
        """Return whether a token is drafted after drafts of which the adapter was so sure; () before the first."""

    def ahead(self, rows: int) -> int:
        """Return how many steps fit before the answer to so many rows comes."""


@dataclass(frozen=True)
class FixedPace:
    """Always the same.

    Attributes
    ----------
    chunk_tokens
        0: the whole prompt at once.
    most_drafts
        Tokens of a draft, at most.
    most_ahead
        Steps ahead.
    threshold
        eta: a draft ends with the first token of which the adapter is less sure.
    """

    chunk_tokens: int = 0
    most_drafts: int = 6
    most_ahead: int = 6
    threshold: float = 0.6

    def chunk(self, left: int) -> int:
        """Return how many of the prompt's tokens that are left travel at once."""
        return self.chunk_tokens or left

    def goes_on(self, sure: Sequence[float]) -> bool:
        """Return whether another token is drafted."""
        return _below(sure, self.threshold, self.most_drafts)

    def ahead(self, rows: int) -> int:  # noqa: ARG002 - the protocol's
        """Return how many steps fit before an answer."""
        return self.most_ahead


@dataclass
class MonitoredPace:
    """A :class:`Pace` for one device.

    Attributes
    ----------
    config
        Limits and rules.
    monitor
        What the device has measured so far; kept up to date by others.
    row_bytes
        A, bytes of a token's hidden states on the link.
    """

    config: HatConfig
    monitor: DeviceMonitor
    row_bytes: float

    def chunk(self, left: int) -> int:
        """Return the chunk length for what is left of a prompt; the first prompt of all measures link and cloud."""
        own = self.config
        if own.chunking == "none":
            return left
        if self.monitor.up is None or not self.monitor.delay.known:
            return min(left, max(own.shortest_chunk, min(_FIRST, own.longest_chunk)))
        conditions = Conditions(
            row_bytes=self.row_bytes,
            up=self.monitor.up,
            delay=self.monitor.delay,
            background=self.monitor.background or 0.0,
            input_s=self.monitor.input_s or 0.0,
        )
        return chunk_length(left, conditions, own.chunking, own.shortest_chunk, own.longest_chunk)

    def goes_on(self, sure: Sequence[float]) -> bool:
        """Return whether another token is drafted, by threshold and cap (HAT, the cap Kangaroo's)."""
        return _below(sure, self.config.threshold, self.config.max_drafts)

    def ahead(self, rows: int) -> int:
        """Return lambda_i, or as many steps as a draft can have where nothing is measured yet."""
        whole = self.config.max_drafts + 1
        if not self.monitor.draft_s:
            return whole
        return min(whole, self.monitor.look_ahead(rows, self.row_bytes, self.config.guesses))


def _below(sure: Sequence[float], threshold: float, most: int) -> bool:
    return len(sure) < most and (not sure or sure[-1] >= threshold)
