"""The peers of COMP: equal sizes, scores against plain loops, and our rules against Torch-Pruning's own."""

from __future__ import annotations

import copy
import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import comp_models, comp_peers
from benchmarks.comp_peers_cut import LayerScores, even_counts, even_plan, global_plan, prunable_weights
from benchmarks.comp_peers_depgraph import DepGraph
from benchmarks.comp_peers_flap import Flap
from benchmarks.comp_peers_layers import LayerDrop, angular_distance, block_influence, without_layers
from benchmarks.comp_peers_moments import input_moments
from benchmarks.comp_peers_scores import Magnitude, WandaSp
from benchmarks.comp_peers_taylor import Taylor, gradients, mean_squares, taylor_scores
from fl_edge.errors import ConfigError, DataError
from fl_edge.models.vocabulary import decoder_tokenizer
from fl_edge.pruning import full_plan, sparsity, unit_params
from fl_edge.seeding import torch_rng
from tests.tiny_transformers import VOCABULARY, make_model

LAYERS, CHANNELS = 6, 96
needs_torch_pruning = pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="torch-pruning is not installed"
)
VARIANTS = [
    pytest.param(peer, variant, marks=needs_torch_pruning if peer == "Torch-Pruning" else ())
    for peer, variants in comp_peers.PEERS.items()
    for variant in variants
]


def decoder(kind: str = "llama", seed: int = 0) -> Any:
    """A Llama whose heads have keys of their own, or a Qwen with grouped queries."""
    sizes: dict[str, Any] = {"num_hidden_layers": LAYERS, "intermediate_size": CHANNELS, "attention_bias": False}
    if kind == "llama":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    return make_model(kind, "causal", seed=seed, **sizes)


def draw_tokens(count: int = 6, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (count, length), generator=torch_rng(seed, "tokens"))


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(("peer", "variant"), VARIANTS)
def test_every_variant_meets_the_ratio_and_leaves_the_model_alone(kind: str, peer: str, variant: str) -> None:
    model, tokens = decoder(kind), draw_tokens()
    before = copy.deepcopy(model.state_dict())
    for ratio in (0.2, 0.5):
        pruned: Any = comp_peers.PEERS[peer][variant](model, tokens, ratio)
        wanted = (1 - ratio) * prunable_weights(model)
        assert abs(prunable_weights(pruned) - wanted) <= 0.01 * wanted
        assert torch.isfinite(logits(pruned, tokens)).all()
        assert all(parameter.grad is None for parameter in (*pruned.parameters(), *model.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(
    ratio=st.floats(0.02, 0.6),
    heads=st.sampled_from(["floor", "nearest", "none"]),
    protect=st.integers(0, 1),
    kind=st.sampled_from(["llama", "qwen3"]),
)
@settings(max_examples=40, deadline=None)
def test_even_counts_come_within_half_a_channel(ratio: float, heads: Any, protect: int, kind: str) -> None:
    model = MODELS[kind]
    layers, sizes, full = range(protect, LAYERS - protect), unit_params(model), full_plan(model)
    counts = even_counts(model, ratio, heads, layers)
    total = sum(
        h * len(layer.heads) + c * len(layer.channels) for (h, c), layer in zip(sizes, full.layers, strict=True)
    )
    gone = sum(h * a + c * b for (h, c), (a, b) in zip(sizes, counts, strict=True))
    room = all(a < len(full.layers[0].heads) - 1 and b < CHANNELS - 1 for a, b in counts)
    assert not room or abs(gone - ratio * total) <= 0.5 * sizes[0][1] + 1e-6
    assert all(counts[layer] == (0, 0) for layer in range(LAYERS) if layer not in layers)


MODELS = {kind: decoder(kind) for kind in ("llama", "qwen3")}


@given(seed=st.integers(0, 10**6), ratio=st.floats(0.05, 0.6), heads=st.sampled_from(["pooled", "floor", "nearest"]))
@settings(max_examples=40, deadline=None)
def test_global_plans_remove_the_lowest_first(seed: int, ratio: float, heads: Any) -> None:
    model, generator = MODELS["llama"], torch_rng(seed, "scores")
    scores = [
        LayerScores(torch.rand(4, generator=generator), torch.rand(CHANNELS, generator=generator))
        for _ in model.model.layers
    ]
    plan = global_plan(model, scores, ratio, heads)
    assert sparsity(plan, unit_params(model)) == pytest.approx(ratio, abs=0.003)
    kept = [float(scores[i].channels[c]) for i, layer in enumerate(plan.layers) for c in layer.channels]
    gone = [
        float(x) for i, s in enumerate(scores) for c, x in enumerate(s.channels) if c not in plan.layers[i].channels
    ]
    assert max(gone, default=0.0) <= min(kept)


def test_a_ratio_that_channels_alone_cannot_meet_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"ratio=0.9 cannot be met"):
        Magnitude(heads="none")(MODELS["llama"], draw_tokens(), 0.9)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_moments_are_those_of_all_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = MODELS[kind], draw_tokens()
    seen: dict[str, Tensor] = {}
    path = "model.layers.2.mlp.down_proj"
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    logits(model, tokens)
    hook.remove()
    columns = seen["x"].flatten(0, 1).double()
    monkeypatch.setattr(
        "benchmarks.comp_peers_moments.rows_at_once", lambda sequences: comp_models.rows_at_once(sequences, 24)
    )  # in pieces of two sequences
    found = input_moments(model, tokens, (2,))
    assert set(found) == {path, "model.layers.2.self_attn.o_proj"}
    torch.testing.assert_close(found[path].mean, columns.mean(0))
    torch.testing.assert_close(found[path].variance, columns.var(0, correction=0))
    torch.testing.assert_close(found[path].norm, columns.norm(dim=0))


def test_wanda_keeps_the_columns_that_matter_and_looks_at_the_layers_pruned_before() -> None:
    model, tokens = decoder(), draw_tokens()
    pruned: Any = WandaSp(heads="none")(model, tokens, 0.3)
    for layer in range(LAYERS):
        mixed = copy.deepcopy(pruned)  # pruned up to here, dense from here on
        for index in range(layer, LAYERS):
            mixed.model.layers[index] = copy.deepcopy(model.model.layers[index])
        weight = model.model.layers[layer].mlp.down_proj.weight.double()
        norm = input_moments(mixed, tokens, (layer,))[f"model.layers.{layer}.mlp.down_proj"].norm
        score = (weight.abs() * norm).mean(0)
        left = pruned.model.layers[layer].mlp.down_proj.weight
        order = score.argsort(descending=True)[: left.shape[1]].sort().values
        torch.testing.assert_close(left, weight.float()[:, order])
    dense: Any = WandaSp(sequential=False, heads="none")(model, tokens, 0.3)
    assert not torch.equal(logits(dense, tokens), logits(pruned, tokens))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_taylor_scores_are_sums_over_a_units_weights(kind: str) -> None:
    model, tokens = copy.deepcopy(MODELS[kind]), draw_tokens()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    block = model.model.layers[1]
    lines = [(block.mlp.gate_proj, 0), (block.mlp.up_proj, 0), (block.mlp.down_proj, 1)]
    slope = gradients(MODELS[kind], tokens)
    by_element, by_vector = (taylor_scores(model, slope, {}, vector, False)[1] for vector in (False, True))
    for channel in (0, 7, CHANNELS - 1):
        each = [(m.weight * m.weight.grad).detach().select(axis, channel).double() for m, axis in lines]
        assert float(by_element.channels[channel]) == pytest.approx(sum(float(x.abs().sum()) for x in each), rel=1e-4)
        assert float(by_vector.channels[channel]) == pytest.approx(
            sum(abs(float(x.sum())) for x in each), rel=1e-3, abs=1e-5
        )
    attention, config = block.self_attn, model.config
    width = attention.head_dim * config.num_attention_heads // config.num_key_value_heads
    maps = [(attention.q_proj, 0, width), (attention.k_proj, 0, attention.head_dim)]
    maps += [(attention.v_proj, 0, attention.head_dim), (attention.o_proj, 1, width)]
    last = len(by_element.heads) - 1
    total = sum(
        float((m.weight * m.weight.grad).detach().narrow(axis, last * size, size).abs().sum()) for m, axis, size in maps
    )
    assert float(by_element.heads[last]) == pytest.approx(total, rel=1e-4)


def test_second_order_is_the_mean_square_of_single_sequences() -> None:
    model, tokens = MODELS["llama"], draw_tokens(3)
    curve = mean_squares(model, tokens)
    path = "model.layers.0.mlp.up_proj"
    single = torch.stack([gradients(model, row[None])[path] for row in tokens])
    torch.testing.assert_close(curve[path], single.square().mean(0))
    torch.testing.assert_close(gradients(model, tokens)[path], single.mean(0), rtol=1e-3, atol=1e-6)
    slope = gradients(model, tokens)
    plain = torch.zeros(CHANNELS, dtype=torch.float64)
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        each = f"model.layers.0.mlp.{name}"
        weight = model.get_submodule(each).weight.detach()
        plain += (weight * slope[each] - 0.5 * weight.square() * curve[each]).abs().sum(1 - axis)
    mixed = taylor_scores(model, slope, curve, False, False)[0].channels
    torch.testing.assert_close(mixed, plain, rtol=1e-4, atol=1e-6)


def test_taylor_protects_the_ends_and_takes_more_from_the_rest() -> None:
    model, tokens = MODELS["llama"], draw_tokens()
    widths = [b.mlp.down_proj.in_features for b in _blocks(Taylor()(model, tokens, 0.3))]
    assert widths[0] == widths[-1] == CHANNELS
    assert all(width < CHANNELS for width in widths[1:-1])


def test_steps_are_nested() -> None:
    model, tokens = MODELS["llama"], draw_tokens()
    scores: list[list[LayerScores]] = []

    class Spied(Taylor):
        def _scores(self, model: nn.Module, tokens: Tensor) -> list[LayerScores]:
            scores.append(super()._scores(model, tokens))
            return scores[-1]

    Spied(protect=0, across_layers=True, heads="pooled", steps=3)(model, tokens, 0.3)
    zeros = [sum(int((each.channels == 0).sum()) for each in layers) for layers in scores]
    assert zeros[0] == 0 < zeros[1] < zeros[2]


def test_flap_keeps_the_mean_output_of_the_first_mlp() -> None:
    model, tokens = decoder(), draw_tokens()
    outputs = []
    for each in (model, Flap(heads="none")(model, tokens, 0.3)):
        hook = _blocks(each)[0].mlp.register_forward_hook(lambda _, __, output: outputs.append(output))
        logits(each, tokens)
        hook.remove()
    dense, pruned = (output.flatten(0, 1).mean(0) for output in outputs)
    torch.testing.assert_close(pruned, dense, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


def test_a_block_that_does_nothing_has_no_influence_and_goes_first() -> None:
    model, tokens = decoder(), draw_tokens()
    with torch.no_grad():
        for linear in (model.model.layers[3].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
            linear.weight.zero_()
    influence = block_influence(model, tokens)
    assert influence[3] == pytest.approx(0, abs=1e-6)
    assert min(influence[:3] + influence[4:]) > 1e-3
    assert angular_distance(model, tokens, 1)[3] == pytest.approx(0, abs=1e-3)
    for choice in ("influence", "again", "stretch"):
        pruned: Any = LayerDrop(choice=choice)(model, tokens, 1 / LAYERS)
        assert len(_blocks(pruned)) == LAYERS - 1
        torch.testing.assert_close(logits(pruned, tokens), logits(model, tokens))


def test_influence_is_of_inputs_and_outputs_of_blocks() -> None:
    model, tokens = MODELS["qwen3"], draw_tokens()
    with torch.no_grad():
        states = model.model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    found = block_influence(model, tokens)
    for index, (before, after) in enumerate(pairwise(states[:-1])):  # the last one is behind the final norm
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert found[index] == pytest.approx(1 - float(cosine.mean()), abs=1e-5)
    assert len(_blocks(without_layers(model, [0, 4]))) == LAYERS - 2


@needs_torch_pruning
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_torch_pruning_agrees_with_our_rules(kind: str) -> None:
    """Its group norm and its Taylor score order channels, and heads where it can, as the independent rules here do."""
    model, tokens = MODELS[kind], draw_tokens()
    heads: Any = "nearest" if kind == "llama" else "none"
    for theirs, ours in (
        (DepGraph("magnitude", heads=heads), Magnitude(group=True, heads=heads)),
        (DepGraph("taylor", heads=heads), Taylor(protect=0, heads=heads)),
        (DepGraph("taylor", True, "none", normalizer=None), Taylor(protect=0, across_layers=True, heads="none")),
    ):
        pruned = [each(model, tokens, 0.5) for each in (theirs, ours)]
        torch.testing.assert_close(logits(pruned[0], tokens), logits(pruned[1], tokens), rtol=1e-4, atol=1e-4)


def test_texts_are_split_by_file_and_a_seed_is_a_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["alpha", "beta", "gamma", "delta"]
    sources = [" ".join([words[index % 4]] * 600) for index in range(8)]
    sources.insert(1, "made by gencodec.py " + "delta " * 9000)  # would be validation
    decoder_tokenizer(sources, 300).save_pretrained(tmp_path)
    monkeypatch.setattr(comp_models, "small_model", lambda name, steps: tmp_path)
    monkeypatch.setattr(comp_models, "unseen_sources", lambda name: sources)
    found = comp_models.texts("deep-llama", 1, validation=2, test=3)
    tokens = [set(each.flatten().tolist()) for each in (found.pool, found.validation, found.test)]
    end = set.intersection(*tokens)
    assert len(end) <= 1  # the mark at the end of a file
    assert found.validation.shape == (2, comp_models.LENGTH)
    assert torch.equal(found.calibration(1, 5), found.calibration(1, 5))
    assert not torch.equal(found.calibration(1, 5), found.calibration(2, 5))
    with pytest.raises(DataError, match="test=999 needs"):
        comp_models.texts("deep-llama", 1, validation=2, test=999)


def test_perplexity_is_the_exponential_of_the_models_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = MODELS["llama"], draw_tokens(7)
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss
    assert comp_models.perplexity(model, tokens) == pytest.approx(float(loss.exp()), rel=1e-5)


def test_a_peer_that_is_not_there_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert comp_peers.missing("Torch-Pruning") == "pip install torch-pruning==1.6.1"
    assert not comp_peers.missing("FLAP")


def _blocks(model: Any) -> Any:
    return model.model.layers


def test_equal_scores_go_in_order() -> None:
    model = MODELS["llama"]
    plan = even_plan(model, [LayerScores(torch.ones(4), torch.ones(CHANNELS))] * LAYERS, 0.5, "floor")
    assert plan.layers[0].heads == (2, 3)
    assert plan.layers[0].channels == tuple(range(CHANNELS // 2, CHANNELS))
