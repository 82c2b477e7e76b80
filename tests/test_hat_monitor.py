"""Estimates against hand-computed values, and what must hold for any observations."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.hat.delays import BatchDelay, smooth
from fl_edge.hat.monitor import DeviceMonitor, link_rate

BATCHES = st.lists(st.tuples(st.integers(1, 9000), st.floats(0, 10)), min_size=1, max_size=90)


def observed(batches: list[tuple[int, float]]) -> BatchDelay:
    delay = BatchDelay()
    for tokens, seconds in batches:
        delay.observe(tokens, seconds)
    return delay


def test_a_step_is_followed_with_0_8_on_the_past() -> None:
    estimate = smooth(None, 1.0)
    found = []
    for _ in range(4):
        estimate = smooth(estimate, 2.0)
        found.append(estimate)
    assert found == pytest.approx([2 - 0.8**n for n in (1, 2, 3, 4)])


def test_the_bins_follow_a_step_as_any_estimate_does() -> None:
    delay = observed([(1, 1.0), (8, 1.0), (64, 1.0), *[(64, 2.0)] * 3])
    assert delay(64) == pytest.approx(2 - 0.8**3)
    assert delay(8) == pytest.approx(1.0)


def test_nothing_seen_is_no_delay_and_one_size_is_that_size_everywhere() -> None:
    assert BatchDelay()(100) == 0.0
    assert not BatchDelay().known
    one = observed([(32, 0.5), (32, 0.7)])
    assert one.known
    assert [one(n) for n in (1, 32, 32.5, 4096)] == pytest.approx([0.6] * 4)


def test_the_first_batches_are_fitted_by_a_hinge() -> None:
    # 5 ms up to 40 tokens, 0.1 ms a token beyond: two bins, so no line through bins yet
    delay = observed([(n, 0.005 + 1e-4 * max(0, n - 40)) for n in (33, 36, 40, 44, 50, 60, 70, 100)])
    assert len(delay.bins) == 2
    assert [delay(n) for n in (1, 40, 55, 100)] == pytest.approx([0.005, 0.005, 0.0065, 0.011])
    # beyond what was seen: the slope of 0.1 ms goes on, since 11 ms / 100 tokens is dearer
    assert delay(200) == pytest.approx(0.021)


def test_three_bins_make_a_line_from_point_to_point() -> None:
    delay = observed([(10, 1.0), (100, 1.0), (200, 3.0)])
    assert delay.early == []
    assert [delay(n) for n in (1, 10, 55, 100, 150, 200)] == pytest.approx([1, 1, 1, 1, 2, 3])
    # the last slope, 0.02 a token, is above 3 s / 200 tokens: no batch is dearer a token than the largest seen
    assert delay(300) == pytest.approx(3 + 100 * 0.015)


def test_a_falling_delay_is_taken_as_flat() -> None:
    assert [observed([(4, 3.0), (16, 1.0), (64, 2.0)])(n) for n in (4, 16, 64, 1000)] == [3.0] * 4


@given(batches=BATCHES, sizes=st.lists(st.floats(0, 20000), min_size=2, max_size=9))
def test_a_larger_batch_never_takes_less(batches: list[tuple[int, float]], sizes: list[float]) -> None:
    delay = observed(batches)
    found = [delay(n) for n in sorted(sizes)]
    assert found[0] >= 0
    assert all(two >= one - 1e-9 for one, two in itertools.pairwise(found))


@given(batches=BATCHES)
def test_what_was_recorded_goes_on_as_before(batches: list[tuple[int, float]]) -> None:
    delay = observed(batches)
    again = BatchDelay.from_record(json.loads(json.dumps(delay.to_record())))
    assert again == delay
    for each in (delay, again):
        each.observe(77, 0.5)
    assert [again(n) for n in (1, 50, 300, 9000)] == [delay(n) for n in (1, 50, 300, 9000)]


def test_only_large_payloads_tell_a_rate() -> None:
    assert link_rate(16 * 1024, 1.0, 0.0) is None
    assert link_rate(1_000_000, 0.01, 0.01) is None
    assert link_rate(1_000_000, 0.21, 0.01) == pytest.approx(5e6)


def test_a_device_learns_from_its_exchanges() -> None:
    monitor = DeviceMonitor()
    monitor.exchanged(4096, 0.014)
    monitor.exchanged(4096, 0.010)
    monitor.exchanged(1 << 20, 0.001)  # too large to tell the latency
    assert monitor.latency_s == 0.010
    monitor.sent(1_000_000, 0.205)
    monitor.sent(100, 9.0)
    monitor.received(1_000_000, 0.105)
    assert (monitor.up, monitor.down) == pytest.approx((5e6, 1e7))
    monitor.read(64, 0.032)
    monitor.read(16, 0.016)
    assert monitor.input_s == pytest.approx(0.0006)
    monitor.answered(rows=4, wait_s=0.002, batch_tokens=24, batch_s=0.020)
    monitor.answered(rows=4, wait_s=0.007, batch_tokens=34, batch_s=0.020)
    assert (monitor.wait_s, monitor.background) == pytest.approx((0.003, 22.0))
    # 4 rows of 8192 bytes: 6.55 ms up, 3.28 ms down, 10 ms latency, 3 ms wait, 20 ms compute
    assert monitor.answer_s(4, 8192) == pytest.approx(0.0428304)


def test_look_ahead_is_what_ends_before_the_answer() -> None:
    monitor = DeviceMonitor(up=1e6, down=1e6)
    monitor.answered(rows=1, wait_s=0.0, batch_tokens=1, batch_s=0.040)
    assert monitor.look_ahead(3, 1000) == 0  # no draft step was ever timed
    monitor.drafted(0.030, steps=3)
    assert monitor.look_ahead(3, 1000) == 4  # 46 ms of 10 ms each
    assert monitor.look_ahead(3, 1000, width=4) == 4  # not measured: as for one branch
    monitor.drafted(0.020, width=4)
    assert monitor.look_ahead(3, 1000, width=4) == 2


@given(batches=BATCHES, rates=st.tuples(st.floats(1e3, 1e9), st.floats(1e3, 1e9)))
@settings(max_examples=30)
def test_a_monitor_survives_its_record(batches: list[tuple[int, float]], rates: tuple[float, float]) -> None:
    monitor = DeviceMonitor(up=rates[0])
    monitor.read(3, 0.1)
    for tokens, seconds in batches:
        monitor.answered(1, seconds / 2, tokens, seconds)
        monitor.drafted(seconds, width=1 + tokens % 3)
    assert DeviceMonitor.from_record(json.loads(json.dumps(monitor.to_record()))) == monitor
