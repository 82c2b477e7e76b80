"""What a device measures while its requests run: its link, its own speed, the cloud.

HAT: devices report draft time a token and both link rates, smoothed with 0.8 on the past. *Ours*: which payloads count
for a rate, and that a device learns the cloud's delay g_t itself from what comes with its answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fl_edge.hat.delays import BatchDelay, smooth

COUNTED_BYTES = 16 * 1024  # a payload must be larger to tell a rate: below, latency decides


def link_rate(payload_bytes: int, seconds: float, latency_s: float) -> float | None:
    """Return the rate of a link as one payload shows it, in bytes a second (ours).

    Parameters
    ----------
    payload_bytes
        Of the message.
    seconds
        From the start of its sending to the end of its receiving.
    latency_s
        What an empty message takes.

    Returns
    -------
    float or None
        None for a payload of up to 16 KiB and for one that took no longer than an empty one: they say nothing.
    """
    if payload_bytes <= COUNTED_BYTES or not seconds > latency_s:
        return None
    return payload_bytes / (seconds - latency_s)


@dataclass
class DeviceMonitor:
    """What a device knows of its link, of its own speed and of the cloud. None: not yet measured.

    Attributes
    ----------
    up, down
        beta, bytes a second.
    latency_s
        Seconds both ways together that no payload explains: the least that an exchange of small messages took beyond
        the cloud's own part (ours).
    wait_s
        Smoothed wait in the cloud for a batch.
    background
        mu, smoothed tokens of other devices in the batches that this device's rows were in.
    input_s
        Seconds a token of a prompt in the input submodel.
    draft_s
        gamma, seconds of one draft step, by the number of branches that are drafted together.
    delay
        g_t.
    """

    up: float | None = None
    down: float | None = None
    latency_s: float | None = None
    wait_s: float | None = None
    background: float | None = None
    input_s: float | None = None
    draft_s: dict[int, float] = field(default_factory=dict)
    delay: BatchDelay = field(default_factory=BatchDelay)

    def sent(self, payload_bytes: int, seconds: float) -> None:
        """Take in what a payload took to the cloud; see :func:`link_rate`."""
        rate = link_rate(payload_bytes, seconds, (self.latency_s or 0.0) / 2)
        self.up = self.up if rate is None else smooth(self.up, rate)

    def received(self, payload_bytes: int, seconds: float) -> None:
        """Take in what a payload took from the cloud; see :func:`link_rate`."""
        rate = link_rate(payload_bytes, seconds, (self.latency_s or 0.0) / 2)
        self.down = self.down if rate is None else smooth(self.down, rate)

    def exchanged(self, payload_bytes: int, seconds: float) -> None:
        """Take in a small exchange, both payloads together, and what it took beyond wait and batch in the cloud."""
        if payload_bytes <= COUNTED_BYTES:
            self.latency_s = max(0.0, seconds if self.latency_s is None else min(self.latency_s, seconds))

    def answered(self, rows: int, wait_s: float, batch_tokens: int, batch_s: float) -> None:
        """Take in what came with an answer (:class:`fl_edge.hat.messages.Answer`) to this device's ``rows``."""
        self.wait_s = smooth(self.wait_s, wait_s)
        self.background = smooth(self.background, float(max(0, batch_tokens - rows)))
        if batch_tokens > 0:
            self.delay.observe(batch_tokens, batch_s)

    def read(self, tokens: int, seconds: float) -> None:
        """Take in what a chunk of a prompt took in the input submodel."""
        self.input_s = smooth(self.input_s, seconds / tokens)

    def drafted(self, seconds: float, steps: int = 1, width: int = 1) -> None:
        """Take in ``steps`` draft steps of ``width`` branches together, which took ``seconds`` in all."""
        self.draft_s[width] = smooth(self.draft_s.get(width), seconds / steps)

    def answer_s(self, rows: int, row_bytes: float) -> float:
        """Return the seconds expected from an upload of ``rows`` for verification to the end of its answer.

        Upload, g_t and download are HAT's; wait and latency are *ours*. What is not yet measured counts 0.
        """
        transfer = sum(rows * row_bytes / rate for rate in (self.up, self.down) if rate)
        compute = self.delay((self.background or 0.0) + rows)
        return transfer + (self.latency_s or 0.0) + (self.wait_s or 0.0) + compute

    def look_ahead(self, rows: int, row_bytes: float, width: int = 1) -> int:
        """Return lambda_i: how many draft steps of ``width`` branches end before the answer to ``rows`` is there (HAT).

        For a width that was not yet measured the next narrower one counts; with none at all it is 0.
        """
        known = [each for each in self.draft_s if each <= width]
        step_s = self.draft_s[max(known)] if known else 0.0
        return int(self.answer_s(rows, row_bytes) / step_s) if step_s > 0 else 0

    def to_record(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        plain = {name: getattr(self, name) for name in ("up", "down", "latency_s", "wait_s", "background", "input_s")}
        steps = [[width, self.draft_s[width]] for width in sorted(self.draft_s)]
        return {**plain, "draft_s": steps, "delay": self.delay.to_record()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> DeviceMonitor:
        """Undo :meth:`to_record`."""
        steps = {int(width): float(seconds) for width, seconds in record["draft_s"]}
        return cls(**{**record, "draft_s": steps, "delay": BatchDelay.from_record(record["delay"])})
