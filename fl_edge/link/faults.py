"""What can befall a message on a :class:`~fl_edge.link.local.LocalGrid`, repeatably."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Message

from fl_edge.errors import ConfigError
from fl_edge.seeding import numpy_rng


@dataclass(frozen=True)
class Fault:
    """What befalls one message; the default is nothing.

    Parameters
    ----------
    drop
        The node is gone and its ClientApp is not called. After 60 virtual seconds Flower's error 5 (node unavailable)
        takes the place of the reply; with a shorter time-out, nothing comes.
    delay_s
        Virtual seconds until the reply arrives.
    error
        The reason of an error reply that takes the place of the ClientApp's.

    Raises
    ------
    ConfigError
        A delay below zero, or one that is not finite.
    """

    drop: bool = False
    delay_s: float = 0.0
    error: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.delay_s) and self.delay_s >= 0):
            raise ConfigError(f"delay_s: {self.delay_s} is not allowed, a finite number, at least 0")


FaultFunction = Callable[[Message, int], Fault | None]
"""Gets the message and the count of messages that its node got before; returns its fault, or None for none."""


def random_faults(seed: int, *, drop: float = 0.0, error: float = 0.0, max_delay_s: float = 0.0) -> FaultFunction:
    """Return faults that strike at random, the same for the same seed, node and count whatever the order of messages.

    Parameters
    ----------
    seed
        The experiment's seed.
    drop, error
        Probability that a message finds its node gone, or is answered by an error; together at most 1.
    max_delay_s
        Delays are drawn evenly from 0 to this many virtual seconds.

    Raises
    ------
    ConfigError
        A probability or a delay out of range.
    """
    if drop < 0 or error < 0 or drop + error > 1:
        raise ConfigError(f"drop, error: {drop}, {error} are not allowed, at least 0 each and at most 1 together")
    Fault(delay_s=max_delay_s)

    def strike(message: Message, count: int) -> Fault:
        fate, delay = numpy_rng(seed, "faults", message.metadata.dst_node_id, count).random(2)
        if fate < drop:
            return Fault(drop=True)
        return Fault(delay_s=float(delay) * max_delay_s, error="fault on request" if fate < drop + error else None)

    return strike
