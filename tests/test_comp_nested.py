"""Size classes from one run: subsets of each other, on target, solved for what they keep, resumed, and refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.decision import decide
from fl_edge.comp.local import TextSource
from fl_edge.comp.nested import prune_nested
from fl_edge.comp.run import Result
from fl_edge.comp.state import run_key
from fl_edge.comp.workbench import Workbench
from fl_edge.errors import ConfigError, DataError
from fl_edge.pruning import load_pruned, read_plan
from tests.tiny_comp import CPU, checkpoint_of, config, contents, draw_tokens, source_of
from tests.tiny_transformers import DECODERS

RATIOS = (0.4, 0.2, 0.3)
SETTINGS: dict[str, dict[str, Any]] = {
    "masks": {},
    "curves": {"allocation": "curves"},
    "weights and biases in blocks": {"restore": "weights", "bias": True, "repair": True, "block": 32},
    "nothing restored, layers by loss": {"restore": "none", "layer_rule": "loss", "prune_attention": False},
}


def nest(
    model: Path, out: Path, ratios: tuple[float, ...] = RATIOS, on_layer: Any = None, **changes: Any
) -> list[Result]:
    tokens, settings = draw_tokens(), config(**changes)
    return prune_nested(
        model,
        out,
        settings,
        ratios,
        source_of(tokens, settings),
        key=run_key(model, settings, tokens, str(ratios)),
        device=CPU,
        on_layer=on_layer,
    )


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_classes_are_subsets_and_on_target(family: str, name: str, tmp_path: Path) -> None:
    results = nest(checkpoint_of(tmp_path / "model", family), tmp_path / "out", **SETTINGS[name])
    assert [result.config.ratio for result in results] == sorted(RATIOS)
    if name == "masks":  # elsewhere a class may have to keep a layer, so as not to lose less of the others
        assert any(len(a.outline.removed) < len(b.outline.removed) for a, b in pairwise(results))
    for a, b in pairwise(results):
        assert a.plan.covers(b.plan)
        assert not b.plan.covers(a.plan)
        assert a.outline.removed == b.outline.removed[: len(a.outline.removed)]
    for result in results:
        folder = tmp_path / "out" / f"{result.config.ratio:g}"
        model = load_pruned(folder)
        assert read_plan(folder) == result.plan
        assert sum(parameter.numel() for parameter in model.parameters()) == result.after


def test_each_mask_is_the_solution_for_what_the_class_keeps(tmp_path: Path) -> None:
    model, settings, layer = checkpoint_of(tmp_path / "model"), config(), 1
    results = nest(model, tmp_path / "out")
    bench = Workbench(Checkpoint(model, CPU))
    source = TextSource(bench, draw_tokens(), "own")
    source.begin()
    for before in range(layer + 1):
        bench.open(before)
        both = source.both(before)
        weight = bench.consumer(before, "channels").weight
        bench.checkpoint.release(before)
    for result in results:
        kept = torch.tensor(result.plan.layers[layer].channels)
        found = load_pruned(tmp_path / "out" / f"{result.config.ratio:g}")
        w, gram = weight.double(), both["channels"].gram
        matrix = gram * (w.T @ w)
        right = (both["channels"].cross * w.T).sum(1)
        damping = settings.damping * float(matrix.diagonal().mean())
        system = matrix[kept][:, kept] + damping * torch.eye(len(kept), dtype=torch.float64)
        mask = torch.linalg.solve(system, right[kept] + damping)
        got: Any = found.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight
        torch.testing.assert_close(got, (w[:, kept] * mask).float(), rtol=1e-4, atol=1e-6)


def test_settled_units_are_tuned_as_an_elimination_leaves_them() -> None:
    from fl_edge.comp.statistics import Statistics

    inputs, weight = torch.randn(200, 24), torch.randn(8, 24)
    statistics = Statistics.of(inputs, inputs @ weight.T)
    chosen = decide(statistics, weight, None, 9, 1, config())
    again = decide(statistics, weight, None, 9, 1, config(), chosen.order)
    assert again.kept == chosen.kept
    assert chosen.mask is not None
    assert again.mask is not None
    torch.testing.assert_close(again.mask, chosen.mask)
    assert not decide(statistics, weight, None, 0, 1, config(), ()).order


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_killed_run_goes_on_to_the_same_bits(layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint_of(tmp_path / "model", "qwen2")
    nest(model, tmp_path / "whole")

    def kill(report: Any, _: int) -> None:
        if report.layer == layer:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nest(model, tmp_path / "out", on_layer=kill)
    assert not list((tmp_path / "out").rglob("plan.json"))
    monkeypatch.setattr("fl_edge.comp.local.similarities", None)  # layers are not measured again
    results = nest(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert nest(model, tmp_path / "out") == results


def test_a_guard_that_stops_a_class_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give more calibration text"):
        nest(checkpoint_of(tmp_path / "model"), tmp_path / "out", max_variance=1e-9)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


@pytest.mark.parametrize("ratios", [(), (0.2, 0.2), (0.2, 1.2)])
def test_ratios_that_cannot_be(ratios: tuple[float, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        nest(checkpoint_of(tmp_path / "model"), tmp_path / "out", ratios)
