"""The rooms of the real-time benchmark: messages, held times, targets."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Results
from benchmarks.hat_real import CASES, ratios, targets
from benchmarks.hat_real_cloud import pack, unpack
from benchmarks.hat_real_held import Pipeline, Processor, hold
from fl_edge.hat.simulated_cloud import StageDelay
from fl_edge.hat.simulated_device import Device, Shape
from tests.tiny_hat_site import Site

SHAPE = Shape(32, 64, 6, 64, 2, 1e4)


def test_what_is_packed_comes_back() -> None:
    head = {"due": 1.5, "upload": {"request": 3}}
    tensors = {"rows": torch.randn(3, 4), "few": torch.zeros(0, 4, dtype=torch.int8)}
    said, found = unpack(pack(head, tensors))
    assert said == head
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_a_pipeline_takes_a_batch_a_stage_and_gives_it_out_after_all() -> None:
    line = Pipeline(StageDelay(10.0, 1.0, 4), 3)
    now = time.monotonic()
    assert line.enter(now, 4) == pytest.approx(now + 30)
    assert line.free == pytest.approx(now + 10)
    assert line.enter(now + 10, 6) == pytest.approx(now + 46)  # 12 s in each stage
    assert line.enter(now + 22, 1) == pytest.approx(now + 56)  # behind the longer one
    assert (line.batches, line.tokens, line.over_s) == (3, 11, 0.0)


def test_what_is_held_is_not_there_before_its_time(tmp_path: Path) -> None:
    model = Site(tmp_path, "llama").device
    processor = Processor(SHAPE, Device(1e6, 1e12, 1.0, 1.0))
    held = hold(model, processor, {"draft_head": 2.5e4})
    features = torch.zeros(1, 32, dtype=torch.float64)
    started = time.monotonic()
    found = held.draft_head(features)
    assert time.monotonic() - started >= 0.05  # 25000 weights of 2 bytes at 1 MB/s
    assert torch.equal(found, model.draft_head(features))
    assert processor.held_s == pytest.approx(0.05)
    assert "draft_head" not in vars(model)


def test_targets_are_the_issues_lines() -> None:
    assert len(targets(Results([], {}, {}))) == 9
    assert not any(line.holds for line in targets(Results([], {}, {})))
    raw = [{"case": case.name, "seed": 0, "repetition": 0, "values": {"texts": "a b"}} for case in CASES]
    summary = {case.name: {"ttft_ms": {"median": 9.0}, "tbt_ms": {"median": 9.0}} for case in CASES}
    summary["real: HAT"] = {"ttft_ms": {"median": 4.0}, "tbt_ms": {"median": 2.0}}
    lines = {line.measure: line for line in targets(Results(raw, summary, {}))}
    assert lines["real run, TTFT: HAT below U-shape, %"].holds
    assert lines["real run, TBT: HAT below U-Medusa, %"].holds
    assert lines["real run: requests with other tokens"].value == 0


def test_the_ratios_are_the_papers() -> None:
    found = ratios()
    assert found["upload of a prompt, s"] == pytest.approx(1036.6 * 10240 / 9.8e6, rel=0.03)
    assert 0.2 < found["share of a stage that whole prompts take"] < 0.3
