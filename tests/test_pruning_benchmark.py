"""The pruning benchmark measures what it says, at tiny size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import pruning
from benchmarks.harness import Results
from benchmarks.pruning import BENCHMARK, MEASURES, figure, forward_case, measure_forward, measure_logits, targets
from benchmarks.pruning_memory import training_peak
from benchmarks.pruning_models import build, even_plan, uneven_plan
from fl_edge.pruning import sparsity, unit_params


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.8])
def test_plans_remove_what_was_asked(ratio: float) -> None:
    model = build("tiny", "cpu")
    sizes = unit_params(model)
    assert sparsity(even_plan(model, ratio), sizes) == pytest.approx(ratio, abs=0.05)
    uneven = uneven_plan(model, ratio, np.random.default_rng(0))
    assert ratio - 0.02 < sparsity(uneven, sizes) <= ratio
    assert ratio == 0 or len({len(layer.channels) for layer in uneven.layers}) == 2


def test_a_forward_measurement_compares_times_with_multiply_adds() -> None:
    found = measure_forward("tiny", 1, "even", 0, True)
    assert found["excess"] == pytest.approx(found["pruned_s"] / found["dense_s"] / found["macs"])
    assert found["macs"] == pytest.approx(0.5)
    assert found["sparsity"] == pytest.approx(0.5)


def test_differences_of_logits_are_seen_and_small() -> None:
    found = measure_logits("qwen3", 0, True)
    assert 0 < found["difference"] < 1e-5
    assert found["largest"] > 0.1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of resident memory")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_training_step_trains_fewer_parameters_where_pruned() -> None:
    threads = torch.get_num_threads()
    whole, pruned = (training_peak("tiny", ratio, 0, "cpu")["trained"] for ratio in (0.0, 0.5))
    assert torch.get_num_threads() == threads
    assert 0 < pruned < whole


def test_targets_of_nothing_measured_do_not_hold(tmp_path: Path) -> None:
    nothing = Results([], {}, {})
    assert not any(target.holds for target in targets(nothing))
    figure(nothing, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0
    assert {case.name for case in BENCHMARK.cases} == set(MEASURES)
    assert forward_case("MiniLM", 32, "even") in MEASURES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "DEVICE", "cuda")
    with pytest.raises(SystemExit, match="--device cuda: torch sees no CUDA device here"):
        pruning.device_name()
