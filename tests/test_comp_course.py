"""COMP over the layers of whole models, against models with masks hooked in and two streams kept by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_edge.comp import survey
from fl_edge.comp.config import CompConfig, faithful
from fl_edge.comp.course import LayerReport, Progress, prune_layers
from fl_edge.comp.decision import Decision
from fl_edge.comp.local import TextSource
from fl_edge.comp.outline import Outline, Sizes
from fl_edge.comp.similarity import Similarity
from fl_edge.comp.statistics import Statistics
from fl_edge.comp.survey import Loss
from fl_edge.comp.walker import Walker
from fl_edge.comp.watching import watched
from fl_edge.comp.workbench import Workbench
from fl_edge.errors import ConfigError, DataError
from fl_edge.pruning import LayerPlan, Unit
from fl_edge.pruning.plan import UNITS
from fl_edge.seeding import numpy_rng, torch_rng
from tests.tiny_comp_core import (
    LOOSE,
    Recorded,
    Run,
    bench_units,
    blocks_of,
    columns,
    configured,
    consumer,
    draw_tokens,
    folded_model,
    load,
    logits_of,
    masked_model,
    open_bench,
    pass_through,
    run_course,
    save,
    skip_block,
)
from tests.tiny_transformers import DECODERS

LAYERS = 5
Target = Literal["own", "dense", "stream"]
TARGETS: tuple[Target, ...] = ("own", "dense", "stream")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save(tmp_path_factory.mktemp(family), family, LAYERS) for family in DECODERS}


@pytest.fixture(scope="module")
def bench(folders: dict[str, Path]) -> Workbench:
    return open_bench(folders["llama"])


# the walker, against two streams by hand


def drawn_decision(kept: tuple[int, ...], width: int, outputs: int, seed: int, biased: bool) -> Decision:
    rng = torch_rng(seed, "decision")
    mask = 1 + 0.5 * torch.randn(len(kept) * width, generator=rng, dtype=torch.float64)
    bias = torch.randn(outputs, generator=rng, dtype=torch.float64) if biased else None
    return Decision(kept, mask, None, bias, (), False, 0.0, 0.0, 0.0)


def drawn_kept(model: Any, layer: int, unit: Unit) -> tuple[int, ...]:
    total = bench_units(model, unit)
    rng = numpy_rng(layer, "kept", unit)
    return tuple(sorted(rng.choice(total, total // 2, replace=False).tolist()))


@torch.no_grad()
def divide(model: Any, layer: int, scale: float) -> None:
    """What a layer adds to the hidden states is divided."""
    for unit in UNITS:
        linear = consumer(model, layer, unit)
        linear.weight.div_(scale)
        if linear.bias is not None:
            linear.bias.div_(scale)


@torch.no_grad()
def take_in(linear: Any, decision: Decision, width: int) -> None:
    """Mask a consumer instead of slicing it."""
    mask = torch.zeros(linear.in_features, dtype=torch.float64)
    assert decision.mask is not None
    mask[columns(decision.kept, width)] = decision.mask
    linear.weight.mul_(mask.to(linear.weight))
    if decision.bias is not None:
        linear.bias = torch.nn.Parameter(decision.bias.to(linear.weight))


def assert_statistics(found: Statistics, inputs: Tensor, wanted: Tensor) -> None:
    x, y = inputs.flatten(0, 1).double(), wanted.flatten(0, 1).double()
    assert found.tokens == len(x)
    for sums, expected in (
        (found.gram, x.T @ x),
        (found.cross, x.T @ y),
        (found.inputs, x.sum(0)),
        (found.targets, y.sum(0)),
        (torch.tensor(found.energy), y.square().sum().float()),
    ):
        torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("family", "growth"), [("llama", 1.0), *((family, 1.7) for family in ("llama", "qwen3", "opt"))]
)
@pytest.mark.parametrize("target", TARGETS)
def test_the_walker_sees_what_two_models_side_by_side_do(
    family: str, target: Target, growth: float, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 1 is removed; what is left of the others is drawn, with biases where growth is made up for."""
    monkeypatch.setattr(survey, "_CHUNK_TOKENS", 3 * 16)
    tokens, bench = draw_tokens(), open_bench(folders[family])
    dense, pruned = load(folders[family]), load(folders[family])
    whole = pass_through(dense, tokens)
    skip_block(blocks_of(pruned)[1])
    walker, scale = Walker(bench, tokens), 1.0
    walker.begin()
    for layer in range(LAYERS):
        if layer == 1:
            bench.checkpoint.load(layer)
            walker.skip(layer, growth)
            bench.checkpoint.release(layer)
            scale = growth
            continue
        bench.open(layer, scale)
        divide(pruned, layer, scale)
        for unit in UNITS:
            passed = pass_through(pruned, tokens)
            here, there, block = passed[layer, unit], whole[layer, unit], whole[layer]
            own = {"heads": passed[layer].before, "channels": passed[layer].after - here.after}[unit]
            after = {"heads": block.before + there.after, "channels": block.after}[unit]
            wanted = {"own": here.after, "dense": there.after / scale, "stream": after / scale - own}[target]
            assert_statistics(walker.measure(layer, unit, target), here.before, wanted)
            width = bench.member(layer, unit).width
            drawn = drawn_decision(drawn_kept(dense, layer, unit), width, 32, layer, growth > 1)
            bench.apply(layer, unit, drawn)
            take_in(consumer(pruned, layer, unit), drawn, width)
        walker.advance(layer)
        bench.close(layer)
        leaving = pass_through(pruned, tokens)[layer].after
        torch.testing.assert_close(walker.pruned, leaving, rtol=1e-4, atol=1e-4 * float(leaving.abs().max()))
        torch.testing.assert_close(walker.dense, whole[layer].after)
    assert walker.scale == growth


def test_with_target_stream_perfect_tuning_takes_the_pruned_states_to_the_dense_ones(folders: dict[str, Path]) -> None:
    """Weights that are free and fewer tokens than channels: whatever earlier layers did wrong is made good at once."""
    folder, tokens = folders["llama"], draw_tokens(1, 11)
    config = configured(target="stream", restore="weights", damping=1e-9, ratio=0.25, layer_share=0.0, alpha=0.0)
    bench = open_bench(folder)
    source = TextSource(bench, tokens, "stream")
    run_course(config, bench, source)
    torch.testing.assert_close(source.walker.pruned, source.walker.dense, rtol=1e-2, atol=1e-2)


def test_nothing_of_a_watched_map_stays_behind(bench: Workbench) -> None:
    bench.open(0, 2.0)
    linear = bench.consumer(0, "heads")
    entering = torch.ones(2, 3, 32)
    with watched(linear, entering) as seen, bench.undivided(0):
        linear(torch.ones(6, linear.in_features))
    assert seen.outputs.shape == (2, 3, linear.out_features)
    assert not linear._forward_hooks
    bench.close(0)


# whole courses


def assert_same_logits(one: Any, two: Any, tokens: Tensor, tolerance: float = 2e-4) -> None:
    first, second = logits_of(one, tokens), logits_of(two, tokens)
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance * float(second.abs().max()))


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "own": {"target": "own", "score": "sensitivity"},
    "stream, heads left": {"target": "stream", "prune_attention": False, "layer_share": 0.7},
    "repaired": {"repair": True, "layer_share": 0.8, "ratio": 0.5},
    "by loss, again and again": {"layer_rule": "loss", "iterative_layers": True, "repair": True, "ratio": 0.5},
    "on curves": {"allocation": "curves", "restore": "mask"},
    "on curves, heads left": {"allocation": "curves", "prune_attention": False, "bias": False},
    "blocks": {"block": 16, "score": "perturbation"},
    "untuned": {"restore": "none", "layer_share": 0.0},
}


@pytest.mark.parametrize(
    ("family", "variant"), [*((family, "repaired") for family in DECODERS), *(("qwen3", variant) for variant in RUNS)]
)
def test_the_folded_model_is_the_masked_model(family: str, variant: str, folders: dict[str, Path]) -> None:
    config = configured(**RUNS[variant])
    bench, other = open_bench(folders[family]), draw_tokens(3, 9, seed=7)
    source = Recorded(bench, draw_tokens(), config.target)
    run = run_course(config, bench, source)
    assert bool(run.outline.removed) == (config.layer_share > 0)
    folded = folded_model(folders[family], run)
    assert_same_logits(folded, masked_model(folders[family], run, source.decisions), other)
    assert_budget(config, bench, run)
    if config.repair:
        assert all(each != pytest.approx(1) for each in run.outline.growth.values())


@pytest.mark.parametrize("bias", [False, True])
def test_the_folded_weights_and_biases_are_those_decided(bias: bool, folders: dict[str, Path]) -> None:
    """Against the masked model by its last hidden states: the walker's own, computed on the way."""
    for family in ("llama", "opt"):
        bench, tokens = open_bench(folders[family]), draw_tokens()
        config = configured(restore="weights", bias=bias, repair=True, ratio=0.4, target="dense")
        source = Recorded(bench, tokens, config.target)
        run = run_course(config, bench, source)
        folded = folded_model(folders[family], run)
        leaving = pass_through(folded, tokens)[len(blocks_of(folded)) - 1].after
        torch.testing.assert_close(source.walker.pruned, leaving, rtol=1e-3, atol=1e-3 * float(leaving.abs().max()))
        for (layer, unit), decision in source.decisions.items():
            name = {"heads": "self_attn.o_proj", "channels": "mlp.down_proj"}[unit]
            if family == "opt":
                name = {"heads": "self_attn.out_proj", "channels": "fc2"}[unit]
            tensors = run.tensors[layer]
            assert decision.weight is not None
            torch.testing.assert_close(tensors[f"{name}.weight"], decision.weight.float())
            assert (f"{name}.bias" in tensors) == (bias or family == "opt" or (family, unit) == ("llama", "heads"))
            if bias:
                assert decision.bias is not None
                torch.testing.assert_close(tensors[f"{name}.bias"], decision.bias.float())


def test_repair_gives_the_pruned_stream_the_dense_streams_length(folders: dict[str, Path]) -> None:
    """At a cut the pruned stream times the scale is as long as the dense one was to become."""
    config = configured(ratio=0.2, layer_share=1.0, repair=True, damping=1e-9)
    bench, tokens = open_bench(folders["llama"]), draw_tokens()
    source = TextSource(bench, tokens, "dense")
    run = run_course(config, bench, source)
    (cut,) = run.outline.removed
    whole = pass_through(load(folders["llama"]), tokens)
    entering, leaving = whole[cut].before[:, 1:], whole[cut].after[:, 1:]
    growth = run.outline.growth[cut]
    assert float((entering * growth).norm()) == pytest.approx(float(leaving.norm()), rel=1e-4)
    assert source.walker.scale == run.progress.scale == growth

    by_hand = load(folders["llama"])
    skip_block(blocks_of(by_hand)[cut])
    for layer in range(cut + 1, LAYERS):
        divide(by_hand, layer, growth)
    untouched = replace(run, tensors={layer: whole_layer(folders["llama"], layer) for layer in run.tensors})
    assert not torch.allclose(logits_of(by_hand, tokens), logits_of(folded_model(folders["llama"], untouched), tokens))
    bench.open(LAYERS - 1, growth)
    for unit in UNITS:
        torch.testing.assert_close(
            bench.consumer(LAYERS - 1, unit).weight, consumer(by_hand, LAYERS - 1, unit).weight, rtol=1e-6, atol=0
        )
    bench.close(LAYERS - 1)


def whole_layer(folder: Path, layer: int) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in blocks_of(load(folder))[layer].state_dict().items()}


def test_nothing_to_remove_and_own_target_leave_the_model_as_it_is(folders: dict[str, Path]) -> None:
    bench, tokens = open_bench(folders["qwen2"]), draw_tokens()
    config = configured(ratio=0.0, target="own")
    run = run_course(config, bench, TextSource(bench, tokens, config.target))
    assert run.plan == bench.full
    assert_same_logits(folded_model(folders["qwen2"], run), load(folders["qwen2"]), tokens, 1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_coarse_models_stay_coarse(family: str, tmp_path: Path) -> None:
    folder, tokens = save(tmp_path, family, LAYERS, torch.bfloat16), draw_tokens()
    for target in TARGETS:
        config = configured(target=target, repair=True, bias=family == "llama", ratio=0.4)
        bench = open_bench(folder)
        source = TextSource(bench, tokens, config.target)
        run = run_course(config, bench, source)
        every = [tensor for tensors in run.tensors.values() for tensor in tensors.values()]
        assert {tensor.dtype for tensor in (*every, source.walker.pruned)} == {torch.bfloat16}
        folded = folded_model(folder, run)
        leaving = pass_through(folded, tokens)[len(blocks_of(folded)) - 1].after
        assert bool(torch.isfinite(leaving).all())
        assert torch.equal(source.walker.pruned, leaving)


def test_no_autograd_graph_is_ever_built(folders: dict[str, Path]) -> None:
    """Gradients are on; whatever is saved for a backward pass, and whatever asks for a gradient, fails."""

    def refuse(_tensor: Tensor) -> Any:
        raise AssertionError("a graph was built")

    parts: list[Tensor] = []
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(refuse, lambda packed: packed):
        for variant in (
            {"allocation": "curves"},
            {"layer_rule": "loss"},
            {"restore": "weights", "bias": True, "repair": True},
        ):
            config = configured(**variant)
            bench = open_bench(folders["llama"])
            source = Recorded(bench, draw_tokens(), config.target)
            run = run_course(config, bench, source)
            assert torch.is_grad_enabled()
            parts += [source.walker.dense, source.walker.pruned]
            parts += [tensor for tensors in run.tensors.values() for tensor in tensors.values()]
            for decision in source.decisions.values():
                parts += [tensor for tensor in vars(decision).values() if isinstance(tensor, Tensor)]
    assert len(parts) > 100
    assert not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in parts)


def test_one_layer_is_in_memory_at_a_time(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = open_bench(folders["llama"])
    present: list[int] = []
    load_layer, before = bench.checkpoint.load, bench.checkpoint.bytes_read

    def watch(layer: int) -> Any:
        found = load_layer(layer)
        present.append(sum(not next(block.parameters()).is_meta for block in blocks_of(bench.checkpoint.skeleton)))
        return found

    monkeypatch.setattr(bench.checkpoint, "load", watch)
    run_course(configured(repair=True), bench, TextSource(bench, draw_tokens(), "dense"))
    assert set(present) == {1}
    assert len(present) == 2 * LAYERS + LAYERS - 1  # two measurements, the second without a layer, and the course
    assert bench.checkpoint.bytes_read > before
    assert all(parameter.is_meta for parameter in bench.checkpoint.skeleton.parameters())


@pytest.mark.parametrize("stop", [1, 3])
def test_a_course_goes_on_from_a_snapshot(stop: int, folders: dict[str, Path]) -> None:
    config = configured(ratio=0.5, repair=True, target="stream")
    tokens, bench = draw_tokens(), open_bench(folders["qwen2"])
    whole = run_course(config, bench, TextSource(bench, tokens, config.target))

    first, progress = TextSource(open_bench(folders["qwen2"]), tokens, config.target), Progress()
    first.begin()
    course = prune_layers(config, whole.outline, Sizes(first.walker.bench), first.walker.bench, first, progress)
    tensors = dict(next(course) for _ in range(stop))
    record = json.loads(json.dumps(progress.to_record()))
    snapshot = {name: tensor.clone() for name, tensor in first.snapshot().items()}

    progress = Progress.from_record(record)
    assert len(progress.layers) == stop
    fresh = open_bench(folders["qwen2"])
    second = TextSource(fresh, tokens, config.target)
    second.restore(snapshot, progress.scale)
    tensors |= dict(prune_layers(config, whole.outline, Sizes(fresh), fresh, second, progress))
    assert progress == whole.progress
    assert list(tensors) == list(whole.tensors) == list(range(LAYERS))
    for layer, each in whole.tensors.items():
        assert tensors[layer].keys() == each.keys()
        assert all(torch.equal(tensors[layer][name], tensor) for name, tensor in each.items())


def test_reports_say_what_was_done(folders: dict[str, Path]) -> None:
    bench = open_bench(folders["llama"])
    source = Recorded(bench, draw_tokens(), "dense")
    run = run_course(configured(ratio=0.4), bench, source)
    for layer, (report, kept) in enumerate(zip(run.progress.reports, run.progress.layers, strict=True)):
        assert report.layer == layer
        assert (report.heads, report.channels) == (len(kept.heads), len(kept.channels))
        if layer in run.outline.removed:
            assert report == LayerReport(layer, removed=True)
            assert kept == LayerPlan((), ())
            assert run.tensors[layer] == {}
            continue
        assert not report.removed
        for unit in UNITS:
            decision = source.decisions[layer, unit]
            assert kept == (
                replace(kept, heads=decision.kept) if unit == "heads" else replace(kept, channels=decision.kept)
            )
            assert report.variance[unit] == decision.variance
            assert report.tuned[unit] == decision.tuned <= report.untuned[unit] == decision.untuned


# several texts


class Pooled(TextSource):
    """Two texts, whose sums are added up."""

    def __init__(self, bench: Workbench, tokens: tuple[Tensor, Tensor], target: str) -> None:
        super().__init__(bench, tokens[0], target)
        self.other = TextSource(bench, tokens[1], target)

    def similarities(self, removed: tuple[int, ...]) -> Mapping[int, Similarity]:
        other = self.other.similarities(removed)
        return {layer: each + other[layer] for layer, each in super().similarities(removed).items()}

    def losses(self, removed: tuple[int, ...], candidates: tuple[int, ...]) -> Mapping[int, Loss]:
        other = self.other.losses(removed, candidates)
        return {layer: each + other[layer] for layer, each in super().losses(removed, candidates).items()}

    def begin(self) -> None:
        super().begin()
        self.other.begin()

    def both(self, layer: int) -> Mapping[Unit, Statistics]:
        other = self.other.both(layer)
        return {unit: each + other[unit] for unit, each in super().both(layer).items()}

    def skip(self, layer: int, growth: float) -> None:
        super().skip(layer, growth)
        self.other.skip(layer, growth)

    def statistics(self, layer: int, unit: Unit) -> Statistics:
        return super().statistics(layer, unit) + self.other.statistics(layer, unit)

    def decided(self, layer: int, unit: Unit, decision: Decision) -> None:
        super().decided(layer, unit, decision)
        self.other.decided(layer, unit, decision)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rule", ["similarity", "loss"])
def test_texts_pooled_are_one_text(family: str, rule: str, folders: dict[str, Path]) -> None:
    config = configured(target="stream", layer_rule=rule, repair=True, ratio=0.4, restore="weights", bias=True)
    tokens, bench = draw_tokens(9, 16), open_bench(folders[family])
    central = run_course(config, bench, TextSource(bench, tokens, config.target))
    pooled = run_course(config, bench, Pooled(bench, (tokens[:2], tokens[2:]), config.target))
    assert pooled.plan == central.plan
    assert pooled.outline.removed == central.outline.removed
    for layer, tensors in central.tensors.items():
        for name, tensor in tensors.items():
            off = float((pooled.tensors[layer][name] - tensor).norm() / tensor.norm())
            assert off < 1e-4


# budgets, with sources that make everything up


class Drawn:
    """Statistics out of nothing; where a layer is spoiled, masks want to vary."""

    def __init__(self, bench: Workbench, seed: int = 0, spoiled: tuple[int, ...] = ()) -> None:
        self.bench, self.seed, self.spoiled = bench, seed, spoiled
        self.calls: list[tuple[Any, ...]] = []

    def similarities(self, removed: tuple[int, ...]) -> Mapping[int, Similarity]:
        values = numpy_rng(self.seed, "importance").uniform(0.01, 0.5, LAYERS)
        return {
            layer: Similarity(1, 1 - float(values[layer]), 0.0, 1.0, 4.0, 1 - float(values[layer]), 0.9)
            for layer in range(LAYERS)
            if layer not in removed
        }

    def losses(self, removed: tuple[int, ...], candidates: tuple[int, ...]) -> Mapping[int, Loss]:
        values = numpy_rng(self.seed, "loss").uniform(-0.1, 0.5, LAYERS)
        return {survey.NONE: Loss(1, 2.0), **{layer: Loss(1, 2 + float(values[layer])) for layer in candidates}}

    def begin(self) -> None:
        self.calls.append(("begin",))

    def skip(self, layer: int, growth: float) -> None:
        self.calls.append(("skip", layer, growth))

    def both(self, layer: int) -> Mapping[Unit, Statistics]:
        return {unit: self._drawn(layer, unit) for unit in UNITS}

    def statistics(self, layer: int, unit: Unit) -> Statistics:
        self.calls.append(("statistics", layer, unit))
        return self._drawn(layer, unit)

    def _drawn(self, layer: int, unit: Unit) -> Statistics:
        weight = self.bench.consumer(layer, unit).weight.double()
        inputs = torch.linalg.qr(torch.randn(64, weight.shape[1], generator=torch_rng(layer, unit)).double()).Q
        mask = torch.ones(weight.shape[1], dtype=torch.float64)
        if layer in self.spoiled:
            mask += torch.randn(len(mask), generator=torch_rng(layer, "mask")).double()
        bias = self.bench.consumer(layer, unit).bias
        return Statistics.of(inputs, (inputs * mask) @ weight.T + (0 if bias is None else bias))

    def decided(self, layer: int, unit: Unit, decision: Decision) -> None:
        assert self.bench.consumer(layer, unit).in_features == len(decision.kept) * self.bench.member(layer, unit).width
        self.calls.append(("decided", layer, unit))

    def snapshot(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        raise NotImplementedError


def removed_part(bench: Workbench, run: Run) -> float:
    """What part of the parameters that can be pruned is gone, by the plan."""
    sizes = Sizes(bench)
    left = sum(len(run.plan.kept(layer, unit)) * sizes.units[layer][unit] for layer in range(LAYERS) for unit in UNITS)
    return 1 - left / sizes.total


def assert_budget(config: CompConfig, bench: Workbench, run: Run) -> None:
    gone = removed_part(bench, run)
    assert abs(gone - config.ratio) <= 0.01 * (1 - config.ratio) + 1e-9
    assert gone == pytest.approx(config.ratio - run.progress.owed / Sizes(bench).total)


@given(
    seed=st.integers(0, 99),
    ratio=st.floats(0, 0.7),
    share=st.floats(0, 1),
    alpha=st.sampled_from([0.0, 1.0, 2.0]),
    rule=st.sampled_from(["similarity", "loss"]),
    allocation=st.sampled_from(["importance", "curves"]),
    attention=st.booleans(),
    restore=st.sampled_from(["mask", "weights", "none"]),
    repair=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_the_budget_is_met_within_one_percent(
    seed: int,
    ratio: float,
    share: float,
    alpha: float,
    rule: str,
    allocation: str,
    attention: bool,
    restore: str,
    repair: bool,
    bench: Workbench,
) -> None:
    config = configured(
        ratio=ratio,
        layer_share=share,
        alpha=alpha,
        layer_rule=rule,
        allocation=allocation,
        prune_attention=attention,
        restore=restore,
        repair=repair,
        bias=repair,
    )
    try:
        run = run_course(config, bench, Drawn(bench, seed))
    except ConfigError:  # no plan can meet it; where that is so is tested with the outline
        return
    assert_budget(config, bench, run)
    for layer, tensors in run.tensors.items():
        kept, sizes = run.plan.layers[layer], Sizes(bench)
        held = sum(
            tensor.numel()
            for name, tensor in tensors.items()
            if "norm" not in name and not name.endswith(("o_proj.bias", "down_proj.bias"))
        )
        assert held == sum(len(getattr(kept, unit)) * sizes.units[layer][unit] for unit in UNITS)
        assert attention or kept.removed or len(kept.heads) == bench.full.heads[layer]


def test_a_source_is_asked_in_order(bench: Workbench) -> None:
    source = Drawn(bench)
    run = run_course(configured(repair=True, ratio=0.4), bench, source)
    (cut,) = run.outline.removed
    expected: list[tuple[Any, ...]] = [("begin",)]
    for layer in range(LAYERS):
        if layer == cut:
            expected.append(("skip", cut, 2.0))
        else:
            expected += [(call, layer, unit) for unit in UNITS for call in ("statistics", "decided")]
    assert source.calls == expected
    assert run.progress.scale == 2.0


@pytest.mark.parametrize(("ratio", "heads"), [(0.1, 4), (0.2, 3), (0.5, 2), (0.75, 1)])
def test_heads_go_by_the_layers_ratio(ratio: float, heads: int, bench: Workbench) -> None:
    run = run_course(configured(ratio=ratio, layer_share=0.0, alpha=0.0), bench, Drawn(bench))
    assert {report.heads for report in run.progress.reports} == {heads}
    assert abs(run.progress.owed) <= Sizes(bench).units[0]["channels"] / 2


def owing(bench: Workbench, ratio: float, spoiled: tuple[int, ...], **changes: Any) -> Progress:
    """A course of equal ratios without heads, where the guard stops the spoiled layers."""
    config = configured(ratio=ratio, layer_share=0.0, prune_attention=False, max_variance=1e-3, alpha=0.0, **changes)
    return run_course(config, bench, Drawn(bench, spoiled=spoiled)).progress


def test_what_the_guard_keeps_later_layers_lose(bench: Workbench, caplog: pytest.LogCaptureFixture) -> None:
    even = owing(bench, 0.2, ())
    with caplog.at_level(logging.WARNING, "flwr.fl_edge"):
        found = owing(bench, 0.2, (1,))
    assert not any(report.guarded for report in even.reports)
    assert [report.guarded for report in found.reports] == [False, True, False, False, False]
    before, after = ([report.channels for report in progress.reports] for progress in (even, found))
    assert after[1] > before[1]
    assert after[0] == before[0]
    assert after[2] < before[2]
    assert abs(sum(after) - sum(before)) <= 1
    (line,) = caplog.messages
    assert line.startswith("layer 1: the guard kept ")
    assert "64 calibration tokens" in line


def test_the_last_layers_guarded_are_an_error_that_names_them(bench: Workbench) -> None:
    with pytest.raises(DataError, match=r"stopped layers 3, 4; give more calibration text") as raised:
        owing(bench, 0.2, (3, 4))
    assert "\n" not in str(raised.value)
    assert "of the ratio 0.2 could be removed" in str(raised.value)


def test_too_few_units_are_an_error_that_says_so(bench: Workbench) -> None:
    """One head and one channel stay in every layer."""
    sizes, progress = Sizes(bench), Progress()
    every = range(LAYERS)
    outline = Outline((), {}, {}, dict.fromkeys(every, 0.95), dict.fromkeys(every, 3), 0.95 * sizes.total)
    with pytest.raises(DataError, match="too few units") as raised:
        dict(prune_layers(configured(ratio=0.95), outline, sizes, bench, Drawn(bench), progress))
    assert {(report.heads, report.channels) for report in progress.reports} == {(1, 1)}
    left = LAYERS * sum(sizes.units[0].values())
    assert str(raised.value).startswith(f"only {1 - left / sizes.total:.3f} of the ratio 0.95 could be removed: ")


@pytest.mark.parametrize("name", ["gram", "cross"])
def test_statistics_that_are_not_finite_end_a_course(
    name: str, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Drawn(bench)
    honest = source.statistics

    def spoil(layer: int, unit: Unit) -> Statistics:
        found = honest(layer, unit)
        return replace(found, **{name: getattr(found, name) * float("nan")})

    monkeypatch.setattr(source, "statistics", spoil)
    with pytest.raises(DataError, match="not finite"):
        run_course(configured(), bench, source)


def test_the_faithful_setting_has_nothing_of_ours_beyond_the_notes() -> None:
    config = configured(
        layer_rule="loss", iterative_layers=True, repair=True, restore="weights", bias=True, score="sensitivity"
    )
    found = faithful(config)
    assert (found.layer_rule, found.iterative_layers, found.repair) == ("similarity", False, False)
    assert (found.restore, found.bias) == ("mask", False)
    assert (found.ratio, found.steps, found.max_variance) == (config.ratio, config.steps, LOOSE)
    assert config.repair
