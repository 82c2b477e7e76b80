"""The virtual clock: small cases by hand, what must hold in any run, and the paper's directions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.errors import ConfigError
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.simulated_cloud import Parcel, SimulatedCloud, StageDelay
from fl_edge.hat.simulated_device import DOWN_BYTES_S, UP_BYTES_S, VICUNA_7B, VICUNA_13B, Drafting, TestBed
from fl_edge.hat.simulated_methods import ABLATION, HAT, PC, SD, SD_PC, U_MEDUSA, U_SARATHI, U_SHAPE, Method
from fl_edge.hat.simulated_report import CNN_DM, CNN_PROMPTS, ROWS, SPEC_PROMPTS, SPECBENCH, Row, reproduce, table
from fl_edge.hat.simulation import Outcome, Prompts, Setting, simulate

ALL = (HAT, U_SARATHI, U_MEDUSA, U_SHAPE, PC, SD, SD_PC)
SURE = Drafting(3.0, confident=1.0, cap=2, guessed=1.0)  # two drafts a round, which always hold
ALONE = Setting(
    VICUNA_7B, StageDelay(0.005, 1e-4, knee=40), Prompts(((1.0, 100, 0.0),)), 1.0, TestBed((0.5,) * 3, 1e12, 1),
    SURE, SURE, requests=1, new_tokens=31, margin=0.0,
)  # fmt: skip
BUSY = replace(SPECBENCH, requests=60, new_tokens=24)


def alone(method: Method, **changes: Any) -> Outcome:
    return simulate(replace(ALONE, **changes), method)


def test_the_shapes_are_vicunas() -> None:
    assert VICUNA_7B.row_bytes == 8192
    assert VICUNA_13B.row_bytes == 10240
    assert VICUNA_7B.adapter_weights == pytest.approx(67e6, rel=0.01)
    assert VICUNA_13B.adapter_weights == pytest.approx(105e6, rel=0.01)
    assert VICUNA_7B.input_weights == pytest.approx(405e6, rel=0.01)
    assert VICUNA_7B.middle_weights + VICUNA_7B.input_weights == pytest.approx(6.48e9, rel=0.01)


def test_one_request_by_hand() -> None:
    (request,), device = alone(U_SHAPE).requests, ALONE.bed.draw(0, 0, 0)
    weights, head_s = 2 * 202_375_168, 2 * 4096 * 32000 / device.read_bytes_s
    up_s, down_s = 8192 / device.up, 8192 / device.down
    link_s = device.message_s + 2 * device.latency_s
    # prompt: compute-bound on the device, 60 tokens above the knee in each of 4 stages
    ttft = 100 * 2 * weights / device.flops + 100 * up_s + link_s + 4 * (0.005 + 60e-4) + down_s + head_s
    assert request.ttft_s == pytest.approx(ttft)
    tbt = 2 * weights / device.read_bytes_s + up_s + link_s + 4 * 0.005 + down_s + head_s
    assert request.tbt_s == pytest.approx(tbt)
    assert request.waits == [0.0] * 31
    assert request.rounds == 30


def test_drafts_that_hold_by_hand() -> None:
    device = ALONE.bed.draw(0, 0, 0)
    input_s, head_s = (device.seconds(weights) for weights in (VICUNA_7B.input_weights, VICUNA_7B.head_weights))
    step_s = input_s + head_s + device.seconds(VICUNA_7B.adapter_weights)
    link_s = 3 * 8192 / device.up + 3 * 8192 / device.down + device.message_s + 2 * device.latency_s
    around_s = link_s + 4 * 0.005 + head_s
    (drafted,) = alone(SD).requests
    assert drafted.rounds == 10
    assert drafted.tbt_s == pytest.approx((2 * step_s + input_s + around_s) / 3)
    # a slower cloud leaves time for three steps: from the second round on the drafts are there already
    (ahead,) = alone(replace(SD, ahead=True), delay=StageDelay(0.01, 0.0)).requests
    ends = ahead.times[1::3]
    assert ahead.rounds == 10
    assert [two - one for one, two in itertools.pairwise(ends)] == pytest.approx([around_s + 4 * 0.005] * 9)


def test_a_pipeline_takes_a_batch_whenever_its_first_stage_is_free() -> None:
    cloud = SimulatedCloud(StageDelay(1.0, 0.5, knee=2), 2, Limits(4))
    cloud.waiting += [Parcel(1, 0.0, 6, prompt=True), Parcel(2, 0.0, 1, prompt=False)]
    one = cloud.form(0.0)  # the verification first, then what fits of the prompt: 4 tokens, 2 s a stage
    assert (one.tokens, one.stage_s, one.end) == (4, 2.0, 4.0)
    assert [each.request for each in one.finished] == [2]
    assert cloud.free_at == 2.0
    two = cloud.form(2.0)  # the other 3: 1.5 s, and the second stage is free at 4
    assert (two.tokens, two.end) == (3, 5.5)
    assert [each.request for each in two.finished] == [1]
    assert cloud.waiting == []


def test_chunks_overlap_compute_upload_and_prefill() -> None:
    far = {"requests": 2, "rate": 0.01}  # the first request measures, the second one has chunks
    (first, chunked), (_, whole) = (alone(method, **far).requests for method in (PC, U_SHAPE))
    up_s = 100 * 8192 / ALONE.bed.draw(0, 0, 1).up
    assert first.ttft_s > 0.2
    assert up_s < chunked.ttft_s < whole.ttft_s - 0.02
    assert len(chunked.waits) == len(whole.waits)


@given(
    method=st.sampled_from(ALL),
    seed=st.integers(0, 50),
    rate=st.floats(0.5, 50),
    requests=st.integers(1, 8),
    new_tokens=st.integers(2, 12),
    stages=st.integers(1, 5),
    devices=st.integers(1, 5),
)
@settings(max_examples=25, deadline=None)
def test_nothing_is_lost_and_nothing_comes_before_its_cause(
    method: Method, seed: int, rate: float, requests: int, new_tokens: int, stages: int, devices: int
) -> None:
    setting = replace(
        SPECBENCH, bed=replace(SPECBENCH.bed, devices=devices), seed=seed, rate=rate, requests=requests,
        new_tokens=new_tokens, stages=stages, margin=0.0,
    )  # fmt: skip
    told: list[int] = []
    outcome = simulate(setting, method, told.append)
    assert told == list(range(1, requests + 1))
    assert [each.number for each in outcome.requests] == list(range(requests))
    for each in outcome.requests:
        assert len(each.times) == new_tokens
        assert each.at < each.times[0]
        assert each.times == sorted(each.times)
        assert min(each.waits) >= 0
        assert 1 <= each.rounds <= new_tokens - 1
    run = sum(batch.tokens for batch in outcome.batches)
    if method in (U_SHAPE, U_SARATHI, PC):
        assert run == sum(each.prompt + each.rounds for each in outcome.requests)
    if method is U_MEDUSA:
        assert run == sum(each.prompt + method.tree_rows * each.rounds for each in outcome.requests)
    assert all(batch.tokens <= method.limits.tokens for batch in outcome.batches) or not method.limits.tokens
    for one, two in itertools.pairwise(outcome.batches):
        assert two.start >= one.start + one.stage_s - 1e-9
        assert two.end >= one.end + two.stage_s - 1e-9


def test_the_same_seed_is_the_same_run() -> None:
    for method in (HAT, U_MEDUSA):
        one, two, other = (simulate(replace(BUSY, seed=seed), method) for seed in (3, 3, 4))
        assert [each.times for each in one.requests] == [each.times for each in two.requests]
        assert one.figures() == two.figures()
        assert one.figures() != other.figures()


@pytest.mark.parametrize("setting", [BUSY, replace(CNN_DM, requests=60, new_tokens=24)])
def test_each_part_does_what_it_is_for(setting: Setting) -> None:
    found = {method.name: simulate(setting, method).figures() for method in (*ABLATION, U_SARATHI)}
    assert found["PC"]["ttft_ms"] < 0.8 * found["U-Sarathi"]["ttft_ms"] < found["U-shape"]["ttft_ms"]
    assert found["SD+PC"]["ttft_ms"] == pytest.approx(found["PC"]["ttft_ms"], rel=0.03)
    assert found["SD"]["tbt_ms"] < found["U-shape"]["tbt_ms"]
    assert found["HAT"]["tbt_ms"] < found["SD+PC"]["tbt_ms"] < found["PC"]["tbt_ms"] < found["U-shape"]["tbt_ms"]
    assert found["SD+PC"]["accept_length"] == pytest.approx(setting.drafting.accept_length, rel=0.1)


@pytest.mark.parametrize("method", [HAT, U_SHAPE])
def test_more_bandwidth_never_hurts(method: Method) -> None:
    found = []
    for near in (0.1, 0.5, 0.9):
        bed = replace(BUSY.bed, nearness=(near,) * 3)
        busy, calm = (simulate(replace(BUSY, bed=bed, rate=rate), method).figures() for rate in (6.0, 0.1))
        found.append((busy["ttft_ms"], calm["ttft_ms"], calm["tbt_ms"]))  # under load TBT is the cloud's
    for slow, middle, fast in zip(*found, strict=True):
        assert slow > middle > fast


def test_devices_are_a_fair_mix_and_change_with_their_requests() -> None:
    bed = TestBed((1.0, 0.5, 0.0), 1e12)
    drawn = [bed.draw(7, number, 0) for number in range(30)]
    fast = [each for each in drawn if each.flops > 1.6e12]  # Orins, in any mode
    assert len(fast) == 10
    assert sum(each.up > 9e6 for each in drawn) == 10
    for each in drawn:
        assert UP_BYTES_S[0] <= each.up <= UP_BYTES_S[1]
        assert DOWN_BYTES_S[0] <= each.down <= DOWN_BYTES_S[1]
    modes = [bed.draw(7, 3, request).flops for request in range(40)]
    assert all(len(set(modes[start : start + 5])) == 1 for start in range(0, 40, 5))
    assert len(set(modes)) > 1
    assert bed.draw(7, 3, 12) == bed.draw(7, 3, 12)
    assert drawn != [bed.draw(7, number, 1) for number in range(30)]  # the links sway


@pytest.mark.parametrize(("prompts", "mean", "high"), [(SPEC_PROMPTS, 351.2, 891), (CNN_PROMPTS, 1036.6, 1772)])
def test_prompts_are_as_long_as_the_papers(prompts: Prompts, mean: float, high: float) -> None:
    drawn = prompts.draw(1, 3000)
    assert np.mean(drawn) == pytest.approx(mean, rel=0.02)
    assert np.percentile(drawn, 90) == pytest.approx(high, rel=0.02)
    assert np.mean(drawn[300:360]) == pytest.approx(mean, rel=0.1)  # any stretch is like the whole
    assert min(drawn) >= 1


@given(length=st.floats(1, 2.4), confident=st.floats(0.6, 1), cap=st.integers(5, 8))
@settings(max_examples=20, deadline=None)
def test_drafts_hold_as_often_as_the_accept_length_needs(length: float, confident: float, cap: int) -> None:
    drafting = Drafting(length, confident, cap)
    chance = drafting.held
    expected = 1 + sum(confident ** (n - 1) * chance**n for n in range(1, cap + 1))
    assert expected == pytest.approx(length, abs=1e-9)


def test_an_accept_length_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 and at most 2"):
        simulate(replace(BUSY, drafting=Drafting(2.5, confident=0.5, cap=1)), SD)


def test_rows_are_compared_with_the_paper() -> None:
    small = {"small": replace(BUSY, requests=20, new_tokens=8)}
    rows = (Row("small", "HAT", "ttft_ms", 1.0), Row("small", "U-shape", "tbt_reduction", 50.0, set_on=True),
            Row("small", "HAT", "speed_up", 1.65))  # fmt: skip
    told: list[tuple[int, int]] = []
    found = reproduce(rows, small, seeds=1, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]
    hat, plain = (simulate(small["small"], method).figures() for method in (HAT, U_SHAPE))
    assert found[0].value == hat["ttft_ms"]
    assert found[1].value == pytest.approx(100 * (1 - hat["tbt_ms"] / plain["tbt_ms"]))
    assert found[2].value == pytest.approx(plain["tbt_ms"] / hat["tbt_ms"])
    lines = table(found).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("| small | HAT | ttft_ms | 1 | ")
    assert lines[2].endswith(" beyond 15 % |")
    assert "set on" in lines[3]


def test_the_papers_rows_are_there_once_each() -> None:
    assert len({(row.setting, row.method, row.figure, row.paper) for row in ROWS}) == len(ROWS)
