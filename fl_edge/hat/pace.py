"""How much at a time, from what a device has measured: chunks of a prompt, and steps ahead of an answer."""

from __future__ import annotations

from dataclasses import dataclass

from fl_edge.hat.chunking import Conditions, chunk_length
from fl_edge.hat.config import HatConfig
from fl_edge.hat.monitor import DeviceMonitor

_FIRST = 64  # tokens, over a link of which nothing is known: long enough to tell a rate, short enough to lose little


@dataclass
class MonitoredPace:
    """A :class:`~fl_edge.hat.generation.Pace` for one device.

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
        """Return the chunk length for what is left of a prompt; the first chunk of all measures the link."""
        own = self.config
        if own.chunking == "none":
            return left
        if self.monitor.up is None:
            return min(left, max(own.shortest_chunk, min(_FIRST, own.longest_chunk)))
        conditions = Conditions(
            row_bytes=self.row_bytes,
            up=self.monitor.up,
            delay=self.monitor.delay,
            background=self.monitor.background or 0.0,
        )
        return chunk_length(left, conditions, own.chunking, own.shortest_chunk, own.longest_chunk)

    def drafts(self) -> int:
        """Return how many tokens are drafted at most before they are verified."""
        return self.config.max_drafts

    def ahead(self, rows: int) -> int:
        """Return lambda_i, or as many steps as a draft can have where nothing is measured yet."""
        whole = self.config.max_drafts + 1
        if not self.monitor.draft_s:
            return whole
        return min(whole, self.monitor.look_ahead(rows, self.row_bytes, self.config.guesses))
