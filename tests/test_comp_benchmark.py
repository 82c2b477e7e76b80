"""The benchmark of COMP against its peers measures what it says, at tiny size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import comp, comp_ours
from benchmarks.comp import BENCHMARK, CHANGED, FAITHFUL, OURS, PUBLISHED, RECOMMENDED, case_name, targets
from benchmarks.comp_models import LENGTH, MODELS, Texts
from benchmarks.comp_ours import federated_difference, held_out, pruned
from benchmarks.comp_peers import PEERS
from benchmarks.comp_peers_cut import prunable_weights
from benchmarks.harness import Results
from benchmarks.harness_report import summarize
from fl_edge.comp.config import CompConfig
from fl_edge.comp.measures import load
from fl_edge.comp.sums import Sums
from fl_edge.seeding import torch_rng
from tests.tiny_comp import CPU, PINNED, checkpoint_of, config
from tests.tiny_transformers import VOCABULARY

GAPS = {FAITHFUL: 0.75, RECOMMENDED: 0.35, PUBLISHED: 2.0}


def draw(name: str, *shape: int) -> Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch_rng(3, name))


TEXT = Texts(draw("pool", 40 * LENGTH), draw("validation", 8, LENGTH), draw("test", 4, LENGTH))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = checkpoint_of(tmp_path / "model", max_position_embeddings=LENGTH)
    monkeypatch.setattr(comp_ours, "texts", lambda *_: TEXT)
    monkeypatch.setattr(comp_ours, "small_model", lambda *_: folder)
    return folder


def test_a_model_is_pruned_from_folder_to_folder(model: Path) -> None:
    found = pruned("tiny", 1, draw("pool", 8, LENGTH), config(ratio=0.3), "cpu")
    assert prunable_weights(found) / prunable_weights(load(model, CPU)) == pytest.approx(0.7, rel=0.01)


@pytest.mark.usefixtures("model")
def test_mask_tuning_is_looked_at_where_units_went(monkeypatch: pytest.MonkeyPatch) -> None:
    found = held_out("tiny", 0.3, 1, 0, "cpu", config(layer_share=0.0))
    assert 0 <= found["lowered"] <= found["tuned_maps"] <= 12
    assert found["tuned_maps"] >= 6  # each of 6 layers has two maps
    untuned = held_out("tiny", 0.3, 1, 0, "cpu", config(layer_share=0.0, restore="none"))
    assert (untuned["lowered"], untuned["worst"]) == (0, 1.0)
    monkeypatch.setattr(Texts, "calibration", lambda self, _seed: self.validation)
    known = held_out("tiny", 0.3, 1, 0, "cpu", config(layer_share=0.0, damping=1e-9))
    assert known["lowered"] == known["tuned_maps"]  # a theorem on the text that masks were tuned on
    assert known["worst"] < 1


@pytest.mark.usefixtures("model")
def test_devices_that_pool_their_sums_are_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comp_ours, "CompConfig", lambda **more: CompConfig(**{**PINNED, "restore": "weights", **more}))
    assert 0 < federated_difference("tiny", 1, 0, "cpu") < 1e-4
    sent = comp_ours._sent
    monkeypatch.setattr(comp_ours, "_sent", lambda value: _wrong(sent(value)))
    assert federated_difference("tiny", 1, 0, "cpu") > 1e-3


def _wrong(value: Any) -> Any:
    if isinstance(value, Sums):
        return Sums(
            value.tokens, {name: tensor * (1.1 if name == "gram" else 1) for name, tensor in value.tensors.items()}
        )
    return value


def results(change: Callable[[dict[str, dict[str, float]]], object] = lambda _: None) -> Results:
    values: dict[str, dict[str, float]] = {}
    for name in MODELS:
        for ratio in comp.RATIOS:
            for method in (*OURS, *PEERS, PUBLISHED):
                gap = GAPS.get(method, 1.0)
                values[case_name(name, ratio, method)] = {
                    "gap": gap, "perplexity": 20 + gap, "dense": 20.0, "left": 1 - ratio
                }  # fmt: skip
        for ratio in comp.CLOSE:
            values[comp.mask_case(name, ratio)] = {"lowered": 9.0, "tuned_maps": 9.0, "worst": 0.9}
        values[f"{name} 20%: many devices"] = {"difference": 1e-6}
    change(values)
    raw = [{"case": case, "seed": 0, "repetition": 0, "values": each} for case, each in values.items()]
    return Results(raw, summarize(raw, BENCHMARK.columns), {})


def test_targets_hold_where_they_should(tmp_path: Path) -> None:
    found = targets(results())
    assert len(found) == 2 * (5 + 3 + 1) + 1
    assert [target.measure for target in found if not target.holds] == []
    comp.figure(results(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("case", "key", "value", "missed"),
    [
        (case_name(MODELS[0], 0.2, RECOMMENDED), "gap", 0.45, ["recommended / the best peer"]),
        (case_name(MODELS[1], 0.4, "FLAP"), "gap", 0.8, ["faithful / the best", "recommended / the best"]),
        (case_name(MODELS[0], 0.2, PUBLISHED), "gap", 0.6, ["recommended / LLM-Pruner as published"]),
        (comp.mask_case(MODELS[0], 0.4), "lowered", 8.0, ["held-out error"]),
        (f"{MODELS[1]} 20%: many devices", "difference", 1e-3, ["weights of many devices"]),
        (case_name(MODELS[0], 0.5, FAITHFUL), "left", 0.52, ["off the target"]),
    ],
)
def test_targets_are_missed_where_they_should(case: str, key: str, value: float, missed: list[str]) -> None:
    found = targets(results(lambda values: values[case].update({key: value})))
    said = [target.measure for target in found if not target.holds]
    assert len(said) == len(missed)
    assert all(part in measure for part, measure in zip(missed, said, strict=True))


def test_without_a_peer_there_is_no_best_one() -> None:
    found = targets(results(lambda values: values.pop(case_name(MODELS[0], 0.2, "Torch-Pruning"))))
    assert [target.value for target in found if not target.holds] == [None, None]


def test_cases_are_what_is_measured() -> None:
    names = [case.name for case in BENCHMARK.cases]
    assert len(names) == len(set(names)) == len(comp.NAMES)
    assert len({str(each) for each in (*OURS.values(), *CHANGED.values())}) == len(OURS) + len(CHANGED)
    assert {case.name for case in BENCHMARK.cases if case.needs} == {
        case_name(name, ratio, "Torch-Pruning") for name in MODELS for ratio in comp.RATIOS
    }
