"""The aggregation benchmark's job at a tiny size: its files hold what it counts, and all rules get through."""

from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.aggregation_peers import by_dense, by_qr, dense_mean
from benchmarks.aggregation_stream import Shape, anonymous_bytes, run_stream, written
from fl_edge.fedspine.aggregation import Rule, aggregate
from fl_edge.fedspine.factors import Factors, Part

TINY = Shape(devices=4, maps=3, streamed=3, width=16, ranks=(1, 2, 4))


def test_bytes_are_those_of_the_files_and_of_two_global_adapters() -> None:
    files = sorted(written(TINY).glob("*.safetensors"))
    held = sum(4 * tensor.numel() for file in files for tensor in load_file(file).values())
    assert len(files) == TINY.devices
    assert TINY.adapter_bytes == 4 * 3 * (4 * 16 + 16 * 4)
    assert TINY.moved_bytes == held + 2 * TINY.adapter_bytes


@pytest.mark.parametrize("rule", get_args(Rule))
def test_every_rule_streams(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.aggregation_stream._COPY_BYTES", 2**16)
    found = run_stream(rule, written(TINY), TINY)
    assert found["seconds"] > 0
    assert found["copied_per_s"] > 0
    assert anonymous_bytes() > 2**20


def test_the_peers_compute_the_same_mean() -> None:
    torch.manual_seed(0)
    parts = [Part(Factors(torch.randn(rank, 12), torch.randn(10, rank)), rank + 0.5) for rank in (1, 2, 4)]
    previous = parts[-1].factors
    ours = aggregate("flexlora", parts, previous, 3, torch.Generator())
    expected = ours.b @ ours.a
    for other in (by_qr(parts, 3), by_dense(parts, previous, 3)):
        torch.testing.assert_close(other.b @ other.a, expected, rtol=1e-4, atol=1e-5)
    stacked = aggregate("stacking", parts, previous, 3, torch.Generator())
    torch.testing.assert_close((stacked.b @ stacked.a).double(), dense_mean(parts, previous), rtol=1e-4, atol=1e-5)
