"""The paced link on a clock that only moves when somebody sleeps or the test says so."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_edge.edge.paced import PacedDirection, PacedLink, PacedQueue
from fl_edge.errors import ConfigError


class Clock:
    """Sleepers wake ``late`` seconds late."""

    def __init__(self, late: float = 0.0) -> None:
        self.now, self.late = 100.0, late
        self.slept: list[float] = []
        self.lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self.lock:
            self.slept.append(seconds)
            self.now += seconds + self.late


def direction(clock: Clock, rate: float = 1e6, latency_s: float = 0.0) -> PacedDirection:
    return PacedDirection(rate, latency_s, clock, clock.sleep)


def test_a_message_takes_its_bytes_and_the_latency() -> None:
    clock = Clock()
    assert direction(clock, 5e6, 0.02).carry(1_000_000) == pytest.approx(0.22)
    assert direction(clock, 5e6, 0.02).carry(0) == pytest.approx(0.02)


def test_messages_wait_for_the_one_before_but_not_for_its_latency() -> None:
    clock = Clock()
    one = direction(clock, latency_s=0.05)
    assert [one.book(10_000) - 100 for _ in range(3)] == pytest.approx([0.06, 0.07, 0.08])
    clock.now += 1
    assert one.book(10_000) - 100 == pytest.approx(1.06)


def test_the_directions_do_not_wait_for_each_other() -> None:
    clock = Clock()
    link = PacedLink(1e6, 2e6, 0.01, clock, clock.sleep)
    assert link.up.book(100_000) - 100 == pytest.approx(0.11)
    assert link.down.book(100_000) - 100 == pytest.approx(0.06)


@given(
    messages=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 10**6)), min_size=1, max_size=20),
    rate=st.floats(1e4, 1e8),
    latency_s=st.floats(0, 0.1),
)
def test_nothing_is_there_early_or_overtakes(messages: list[tuple[float, int]], rate: float, latency_s: float) -> None:
    clock = Clock()
    one = direction(clock, rate, latency_s)
    last = busy = 0.0
    for pause, size in messages:
        clock.now += pause
        busy += size / rate
        due = one.book(size)
        assert due >= max(last, clock.now + size / rate + latency_s - 1e-9)
        assert due >= 100 + busy + latency_s - 1e-6  # the line is never faster than its rate
        last = due


def test_late_sleepers_are_woken_earlier_and_never_too_early() -> None:
    clock = Clock(late=0.0005)
    one = direction(clock)
    late = []
    for _ in range(30):
        due = one.book(20_000)
        one.wait(due)
        late.append(clock.now - due)
    assert min(late) > -1e-9
    assert late[0] == pytest.approx(0.0005)
    assert max(late[20:]) < 1e-4


def test_a_machine_that_stood_still_does_not_shorten_what_follows() -> None:
    clock = Clock(late=1.0)
    one = direction(clock)
    one.carry(1000)
    clock.late = 0.0
    due = one.book(100_000)
    one.wait(due)
    assert clock.now == pytest.approx(due)


def test_a_queue_gives_messages_when_they_are_due_and_in_order() -> None:
    clock = Clock()
    queue: PacedQueue[str] = PacedQueue(direction(clock, latency_s=0.01))
    assert not queue.ready()
    queue.put("first", 20_000)
    queue.put("second", 20_000)
    clock.now += 0.029
    assert not queue.ready()
    clock.now += 0.002
    assert queue.ready()
    assert queue.get() == "first"
    assert clock.slept == []
    assert not queue.ready()
    assert queue.get() == "second"
    assert clock.now == pytest.approx(100.05)


def test_a_queue_waits_for_a_message_from_another_thread() -> None:
    clock = Clock()
    queue: PacedQueue[int] = PacedQueue(direction(clock))
    found: list[int] = []
    taker = threading.Thread(target=lambda: found.extend(queue.get() for _ in range(40)))
    taker.start()

    def give() -> None:
        for _ in range(10):
            queue.put(1, 1000)

    givers = [threading.Thread(target=give) for _ in range(4)]
    for giver in givers:
        giver.start()
    for thread in [*givers, taker]:
        thread.join(20)
    assert found == [1] * 40
    assert clock.now >= 100.04 - 1e-6  # 40 messages of a millisecond, whoever sent them


def test_many_threads_share_the_rate() -> None:
    clock = Clock()
    one = direction(clock, latency_s=0.5)
    dues: list[float] = []
    threads = [threading.Thread(target=lambda: dues.append(one.book(1000))) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(dues) == pytest.approx([100.5 + 0.001 * count for count in range(1, 51)])


@pytest.mark.parametrize(("rate", "latency_s"), [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (1e6, -0.1)])
def test_a_link_that_cannot_be_is_refused(rate: float, latency_s: float) -> None:
    with pytest.raises(ConfigError, match="the rate must be above 0 and the latency at least 0"):
        PacedDirection(rate, latency_s)


def test_negative_bytes_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be at least 0"):
        PacedDirection(1e6).book(-1)
