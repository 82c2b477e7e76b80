"""A slow link on a fast machine: messages are there when a link of stated rate and latency would have brought them.

For measurements in real time. Each direction carries one message after the other: a message of n bytes begins to leave
when the one before it has left, takes n / rate to leave, and is there a latency later. The caller states the bytes,
since it is the wished link that is measured, not this machine's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from fl_edge.errors import ConfigError

T = TypeVar("T")
_PAST = 0.8  # weight of the past in the estimate of how late a sleeper wakes


class PacedDirection:
    """One direction of a link; any number of threads may use it.

    Parameters
    ----------
    rate
        Bytes a second.
    latency_s
        Seconds that every message takes beyond its bytes.
    clock, sleep
        Seconds of a clock that never goes back, and what lets them pass.

    Raises
    ------
    ConfigError
        A rate that is not above 0, or a latency below 0.
    """

    def __init__(
        self,
        rate: float,
        latency_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not (rate > 0 and latency_s >= 0):
            raise ConfigError(
                f"a paced link of {rate} bytes/s and {latency_s} s latency cannot be; "
                "the rate must be above 0 and the latency at least 0"
            )
        self.rate, self.latency_s = rate, latency_s
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free = clock()  # when the last message has left
        self._late = 0.0

    def book(self, payload_bytes: int) -> float:
        """Hand over a message now and return the time of the clock at which it is there.

        Raises
        ------
        ConfigError
            A negative number of bytes.
        """
        if payload_bytes < 0:
            raise ConfigError(f"a message of {payload_bytes} bytes cannot be; it must be at least 0")
        with self._lock:
            self._free = max(self._free, self._clock()) + payload_bytes / self.rate
            return self._free + self.latency_s

    def arrived(self, due: float) -> bool:
        """Return whether a message that is there at ``due`` is there by now."""
        return self._clock() >= due

    def wait(self, due: float) -> None:
        """Return at ``due``, never before. What sleepers wake late on this machine is taken off their sleep."""
        while (left := due - self._clock()) > 0:
            asked = left - self._late if left > 2 * self._late else left
            self._sleep(asked)
            late = max(0.0, self._clock() - (due - left + asked))
            with self._lock:
                # a machine that stood still for long says nothing about the next sleep
                self._late = min(_PAST * self._late + (1 - _PAST) * late, 0.002)

    def carry(self, payload_bytes: int) -> float:
        """Hand over a message, wait until it is there, and return the seconds that this took."""
        begun = self._clock()
        self.wait(self.book(payload_bytes))
        return self._clock() - begun


class PacedQueue(Generic[T]):
    """Messages on their way through a direction: put in at one end, there at the other when they are due.

    Many threads may put, one takes.
    """

    def __init__(self, direction: PacedDirection) -> None:
        self._direction = direction
        self._waiting: deque[tuple[float, T]] = deque()
        self._filled = threading.Condition()

    def put(self, message: T, payload_bytes: int) -> None:
        """Hand over a message; does not wait."""
        with self._filled:
            self._waiting.append((self._direction.book(payload_bytes), message))
            self._filled.notify()

    def ready(self) -> bool:
        """Return whether a message is there."""
        with self._filled:
            return bool(self._waiting) and self._direction.arrived(self._waiting[0][0])

    def get(self) -> T:
        """Return the next message as soon as it is there."""
        with self._filled:
            self._filled.wait_for(lambda: bool(self._waiting))
            due, message = self._waiting[0]
        self._direction.wait(due)
        with self._filled:
            self._waiting.popleft()
        return message


class PacedLink:
    """Both directions of a device's link.

    Parameters
    ----------
    up, down
        Bytes a second from the device and to it.
    latency_s
        Of either direction.
    clock, sleep
        See :class:`PacedDirection`.
    """

    def __init__(
        self,
        up: float,
        down: float,
        latency_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.up = PacedDirection(up, latency_s, clock, sleep)
        self.down = PacedDirection(down, latency_s, clock, sleep)
