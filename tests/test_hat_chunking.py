"""Chunk lengths: the table of the specification by a small discrete-event check, and what must hold for any device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.hat.chunking import RULES, Conditions, chunk_length, chunks_of, predicted_ttft
from fl_edge.hat.delays import BatchDelay

STAGES, BACKGROUND = 4, 40


def stage(base: float, slope: float, knee: int = 64) -> Callable[[float], float]:
    return lambda tokens: base + slope * max(0.0, tokens - knee)


LIGHT, HEAVY = stage(5e-3, 4e-5), stage(9e-3, 8e-5)


def conditions(up: float, row_bytes: float = 8192, one: Callable[[float], float] = LIGHT) -> Conditions:
    return Conditions(row_bytes, up, lambda tokens: STAGES * one(tokens), BACKGROUND, STAGES, message_s=3e-4)


def happened(prompt: int, chunk: int, known: Conditions) -> float:
    """Return the TTFT of one prompt among batches of 40 tokens that never pause, as a mean over when it begins."""
    token_s = known.row_bytes / known.up
    found = []
    for phase in range(8):
        arrivals, now = [], phase / 8 * known.delay(BACKGROUND) / STAGES
        for tokens in chunks_of(prompt, chunk):
            now += tokens * token_s + known.message_s
            arrivals.append((now, tokens))
        begun, free = phase / 8 * known.delay(BACKGROUND) / STAGES, [0.0] * STAGES
        while arrivals:
            tokens = arrivals.pop(0)[1] if arrivals[0][0] <= free[0] else 0  # one chunk a batch
            seconds = known.delay(BACKGROUND + tokens) / STAGES
            done = free[0]
            for place in range(STAGES):
                done = free[place] = max(done, free[place]) + seconds
            if not arrivals:
                found.append(done - begun + 0.004)
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("up", "row_bytes", "one", "r1", "r2"),
    [(7.5e6, 8192, LIGHT, 7, 5), (1e7, 10240, HEAVY, 13, 10), (1e8, 8192, LIGHT, 156, 111)],
)
def test_both_readings_choose_what_the_specification_has(
    up: float, row_bytes: float, one: Callable[[float], float], r1: int, r2: int
) -> None:
    known = conditions(up, row_bytes, one)
    assert [chunk_length(1036, known, rule, shortest=1) for rule in ("r1", "r2")] == [r1, r2]


@pytest.mark.parametrize(
    ("prompt", "up", "row_bytes", "one"),
    [(351, 7.5e6, 8192, LIGHT), (1772, 7.5e6, 8192, LIGHT), (1036, 1e7, 10240, HEAVY), (1036, 1e8, 8192, LIGHT)],
)
def test_every_rule_is_near_the_best_and_far_from_no_chunks(
    prompt: int, up: float, row_bytes: float, one: Callable[[float], float]
) -> None:
    known = conditions(up, row_bytes, one)
    best = min(happened(prompt, 2**power, known) for power in range(3, 10))
    for rule in ("ttft", "r1", "r2"):
        assert happened(prompt, chunk_length(prompt, known, rule), known) < 1.06 * best
    assert happened(prompt, prompt, known) > 1.09 * best


def test_without_a_root_long_chunks_are_right_and_the_least_gap_is_wrong() -> None:
    known = conditions(1e9)
    least = min((abs(x * 8192 / 1e9 - known.wait_s - known.delay(40 + x) / STAGES), x) for x in range(16, 513))[1]
    assert least == 24  # where the delay begins to rise, as in the table
    assert [chunk_length(1036, known, rule) for rule in ("r1", "r2")] == [512, 512]
    unguarded, guarded = happened(1036, least, known), happened(1036, 512, known)
    assert guarded < 0.85 * unguarded
    direct = happened(1036, chunk_length(1036, known), known)
    assert direct < 0.6 * unguarded
    assert direct < 0.85 * guarded


DELAYS = st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 1)), max_size=12)
DEVICES = {
    "prompt": st.integers(1, 3000),
    "batches": DELAYS,
    "background": st.floats(0, 500),
    "stages": st.integers(1, 8),
    "row_bytes": st.floats(1, 1e5),
    "message_s": st.floats(0, 0.01),
    "input_s": st.floats(0, 0.01),
}


def drawn(
    batches: list[tuple[int, float]], background: float, stages: int, row_bytes: float, message_s: float, input_s: float
) -> Callable[[float], Conditions]:
    delay = BatchDelay()
    for tokens, seconds in batches:
        delay.observe(tokens, seconds)
    return lambda up: Conditions(row_bytes, up, delay, background, stages, message_s, input_s)


@given(**DEVICES, rates=st.lists(st.floats(1e4, 1e10), min_size=2, max_size=5), rule=st.sampled_from(["r1", "r2"]))
@settings(max_examples=60, deadline=None)
def test_a_faster_link_never_makes_chunks_shorter(
    prompt: int, rates: list[float], rule: str, batches: list[tuple[int, float]], background: float, **rest: float
) -> None:
    known = drawn(batches, background, **rest)  # type: ignore[arg-type] # stages is an integer among numbers
    found = [chunk_length(prompt, known(up), rule) for up in sorted(rates)]
    assert found == sorted(found)


@given(**DEVICES, up=st.floats(1e4, 1e10), rule=st.sampled_from(RULES), bounds=st.tuples(*[st.integers(1, 700)] * 2))
@settings(max_examples=60, deadline=None)
def test_lengths_stay_in_their_bounds_and_cover_the_prompt(
    prompt: int, up: float, rule: str, bounds: tuple[int, int], batches: list[tuple[int, float]], background: float,
    **rest: float,
) -> None:  # fmt: skip
    known = drawn(batches, background, **rest)(up)  # type: ignore[arg-type]
    chunk = chunk_length(prompt, known, rule, min(bounds), max(bounds))
    assert 1 <= chunk <= prompt
    assert chunk == prompt or (rule != "none" and min(bounds) <= chunk <= max(bounds))
    parts = chunks_of(prompt, chunk)
    assert sum(parts) == prompt
    assert set(parts[:-1]) <= {chunk}
    assert 0 < parts[-1] <= chunk


@given(**DEVICES, up=st.floats(1e4, 1e10), power=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_direct_rule_is_best_by_its_own_prediction(
    prompt: int, up: float, power: int, batches: list[tuple[int, float]], background: float, **rest: float
) -> None:
    known = drawn(batches, background, **rest)(up)  # type: ignore[arg-type]
    chosen = predicted_ttft(prompt, chunk_length(prompt, known), known)
    assert chosen <= predicted_ttft(prompt, min(prompt, 16 * 2**power), known)


def test_the_prediction_by_hand() -> None:
    known = Conditions(1000, 1e6, lambda n: 0.004 + 1e-4 * n, background=10, stages=2, message_s=0.001, input_s=2e-4)
    # the whole prompt: input submodel, upload, message, w = 5 ms / 4, prefill of 110 tokens
    assert predicted_ttft(100, 100, known) == pytest.approx(0.02 + 0.1 + 0.001 + 0.00125 + 0.015)
    # bound by the link: 30 tokens on the device, 100 up, 4 messages, w, prefill of the last 10
    assert predicted_ttft(100, 30, known) == pytest.approx(0.006 + 0.1 + 0.004 + 0.00125 + 0.006)
    # bound by the cloud: the second chunk begins after a slot of 4.5 ms, the last 20 tokens go 3.5 ms behind its end
    fast = Conditions(1000, 1e12, known.delay, background=10, stages=2)
    assert predicted_ttft(100, 40, fast) == pytest.approx(0.0045 + 0.009 + 0.0035 + 0.00125, abs=1e-6)
    # bound by the input submodel: 1 ms a token, then w and the last 4
    slow = Conditions(1000, 1e12, known.delay, background=10, stages=2, input_s=1e-3)
    assert predicted_ttft(100, 12, slow) == pytest.approx(0.1 + 0.00125 + 0.0054, abs=1e-6)
