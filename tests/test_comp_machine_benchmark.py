"""The benchmark of COMP on a machine measures what it says, at tiny size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import comp_machine, comp_machine_child, comp_machine_files
from benchmarks.comp_machine import BENCHMARK, FAITHFUL, MEASURES, PEER, figure, latency_case, memory_case, targets
from benchmarks.comp_machine_child import run_comp, run_taylor
from benchmarks.comp_machine_latency import Setting, build, macs, measure_latency, plan_of, skeleton
from benchmarks.harness import Results
from fl_edge.comp.config import CompConfig, faithful
from fl_edge.pruning import count_costs, full_plan, load_pruned, read_plan, sparsity, unit_params

TINY = Setting("tiny", 6, prompt=4, decoded=3, prefill=12, decode_turns=1, prefill_turns=1)
RATIO = 0.3


@pytest.fixture(autouse=True)
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Large files go where the test's own do, and none is shared with another test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    comp_machine_files.checkpoint.cache_clear()
    folders: list[tempfile.TemporaryDirectory[str]] = []
    monkeypatch.setattr(comp_machine_files, "_folders", folders)
    yield
    for folder in folders:
        folder.cleanup()


@pytest.mark.parametrize("kind", [False, True])
def test_comp_prunes_a_checkpoint_whose_output_is_checked(kind: bool, tmp_path: Path) -> None:
    folder, out = comp_machine_files.checkpoint("tiny", 4), tmp_path / "out"
    found = run_comp(str(folder), str(out), kind, RATIO, 16, 16, 0, "cpu")
    assert found["off"] < 0.01
    assert found["read_gb"] > sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    layers = comp_machine_files.check_output(out)
    model: Any = load_pruned(out)
    assert layers == len(read_plan(out).layers_kept) == model.config.num_hidden_layers


def test_an_output_that_is_not_as_its_plan_says_is_noticed(tmp_path: Path) -> None:
    folder, out = comp_machine_files.checkpoint("tiny", 3), tmp_path / "out"
    run_comp(str(folder), str(out), True, RATIO, 16, 16, 0, "cpu")
    first, second = (out / f"model-layer-{number:04d}.safetensors" for number in (0, 1))
    assert first.stat().st_size != second.stat().st_size
    second.write_bytes((comp_machine_files.checkpoint("tiny", 3) / "model-00003-of-00004.safetensors").read_bytes())
    with pytest.raises(RuntimeError, match="layer 1 is not as the plan says"):
        comp_machine_files.check_output(out)


def test_the_taylor_run_removes_what_was_asked_from_the_middle() -> None:
    assert run_taylor(str(comp_machine_files.checkpoint("tiny", 8)), RATIO, 2, 8, 0, "cpu")["off"] < 0.05


def test_a_fresh_process_says_what_it_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    folder = comp_machine_files.checkpoint("tiny", 3)
    settings: dict[str, Any] = {"folder": str(folder), "ratio": RATIO, "sequences": 2, "length": 8, "seed": 0}
    found = comp_machine_child.in_fresh_process({"run": "taylor", "device": "cpu", **settings}, 1)
    assert 0 <= found["above_mb"] < found["peak_mb"]
    assert found["seconds"] > 0
    with pytest.raises(RuntimeError, match="has ended with status"):
        comp_machine_child.in_fresh_process({"run": "taylor", "device": "cpu", "folder": str(tmp_path / "no")}, 1)


def test_faithful_and_recommended_differ_in_more_than_their_name() -> None:
    assert faithful(CompConfig()).restore == "mask"
    assert {memory_case(shape, who) for shape in comp_machine.MEMORY_SHAPES for who in (PEER, FAITHFUL)} <= set(
        MEASURES
    )


@pytest.mark.parametrize(("grain", "ratio"), [("layers", 0.5), ("even", 0.3), ("uneven", 0.3)])
def test_plans_have_the_size_and_the_form_that_they_say(grain: str, ratio: float) -> None:
    model = skeleton(TINY.shape, TINY.layers)
    plan = plan_of(TINY, grain, ratio, 1)
    assert sparsity(plan, unit_params(model)) == pytest.approx(ratio, abs=0.02)
    assert len(plan.layers_kept) == (3 if grain == "layers" else 6)
    kept = {len(plan.layers[layer].channels) for layer in plan.layers_kept}
    assert (len(kept) > 2) == (grain == "uneven")


def test_a_model_to_be_timed_has_the_widths_of_its_plan() -> None:
    plan = plan_of(TINY, "uneven", 0.3, 1)
    model = build(TINY.shape, TINY.layers, plan, "cpu", torch.float32)
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert widths == [len(layer.channels) for layer in plan.layers]
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert full_plan(skeleton(TINY.shape, TINY.layers)).layers_kept == tuple(range(6))  # not the one that was sliced


def test_multiply_adds_count_the_head_and_what_attention_sees() -> None:
    whole = full_plan(skeleton(TINY.shape, TINY.layers))
    found = count_costs(skeleton(TINY.shape, TINY.layers), whole)
    assert found.outside_macs == 32 * 128
    plain = found.block_macs + found.outside_macs
    assert macs(whole, TINY, "prefill") == plain + 6.5 * found.attention_macs  # tokens see 1 to 12
    assert macs(whole, TINY, "decode") == plain + 6 * found.attention_macs  # after 4, they see 5 to 7


def test_latencies_are_compared_with_multiply_adds() -> None:
    found = measure_latency(TINY, "layers", 0.5, 0, "cpu")
    for phase in ("decode", "prefill"):
        times = found[f"{phase}_ms"] / found[f"{phase}_dense_ms"]
        assert found[f"{phase}_excess"] == pytest.approx(times / found[f"{phase}_macs"])
        assert 0.5 < found[f"{phase}_macs"] < 0.6  # the head stays


def test_targets_of_nothing_measured_do_not_hold(tmp_path: Path) -> None:
    nothing = Results([], {}, {})
    assert not any(target.holds for target in targets(nothing))
    figure(nothing, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0
    assert {case.name for case in BENCHMARK.cases} == set(MEASURES)
    assert latency_case("tinyllama-1.1b", "even", 0.2) in MEASURES


def test_a_disk_without_space_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comp_machine_files, "_SPARE", 1e12)
    with pytest.raises(SystemExit, match="GB free; set TMPDIR elsewhere"):
        comp_machine_files.checkpoint("tiny", 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comp_machine, "DEVICE", "cuda")
    with pytest.raises(SystemExit, match="--device cuda: torch sees no CUDA device here"):
        comp_machine.device_name()
