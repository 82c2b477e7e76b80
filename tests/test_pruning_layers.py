"""Whole layers removed: against models whose layers are skipped by hand, with caches, masks, adapters and on disk."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.errors import ConfigError
from fl_edge.pruning import (
    LayerPlan,
    PruningPlan,
    count_costs,
    count_lora,
    full_plan,
    kept_indices,
    load_pruned,
    members,
    prune,
    read_plan,
    save_pruned,
    sparsity,
    unit_params,
)
from fl_edge.pruning.configuration import empty
from fl_edge.pruning.units import find_blocks
from tests.tiny_transformers import (
    DECODERS,
    FAMILIES,
    GROUPED,
    draw_batch,
    draw_plan,
    logits,
    make_config,
    make_model,
    mask_units,
    without_layers,
)

# peft asks transformers by a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
CLOSE: Any = {"rtol": 0, "atol": 1e-5}
ASKED: Any = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
DEPTH = 5
MIXED: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}  # Qwen: 2 full, 3 not


def deep(family: str, task: str = "classification", **changes: Any) -> Any:
    return make_model(family, task, **{"num_hidden_layers": DEPTH, **changes})


def skip_layers(model: Any, plan: PruningPlan) -> None:
    """The reference: every layer still runs, but what a removed one makes is replaced by what came in."""
    for index, block in enumerate(find_blocks(model)[1]):
        if plan.layers[index].removed:
            block.register_forward_hook(lambda _, given, made: given[0])


@st.composite
def layer_sets(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(sorted(draw(st.sets(st.integers(0, DEPTH - 1), max_size=DEPTH - 1))))


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 2**32 - 1), gone=layer_sets(), ratio=st.sampled_from([0.0, 0.5]))
@settings(max_examples=5, deadline=None)
def test_a_model_without_layers_equals_one_that_skips_them(
    family: str, seed: int, gone: tuple[int, ...], ratio: float
) -> None:
    rng = np.random.default_rng(seed)
    task = ("bare", "classification", "causal" if family in DECODERS else "masked")[rng.integers(3)]
    sliced = deep(family, task, seed=seed)
    plan, inputs = without_layers(draw_plan(sliced, rng, ratio), gone), draw_batch(rng, left=bool(rng.integers(2)))
    skipping = copy.deepcopy(sliced)
    mask_units(skipping, plan)
    skip_layers(skipping, plan)
    prune(sliced, plan)
    torch.testing.assert_close(logits(sliced, inputs), logits(skipping, inputs), **CLOSE)
    assert len(find_blocks(sliced)[1]) == sliced.config.num_hidden_layers == DEPTH - len(gone)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in (*DECODERS, "bert")),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", MIXED),
        ("qwen3", MIXED),
    ],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("gone", [(0, 3), (2, 3, 4)])
def test_generation_counts_layers_and_positions_as_the_model_has_them(
    family: str, changes: dict[str, Any], attention: str, gone: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(3)
    sliced = deep(family, "causal", attention=attention, **changes)
    plan, inputs = without_layers(draw_plan(sliced, rng, 0.3), gone), draw_batch(rng, 3, 6, left=True)
    skipping = copy.deepcopy(sliced)
    mask_units(skipping, plan)
    skip_layers(skipping, plan)
    prune(sliced, plan)
    expected = skipping.generate(**inputs, use_cache=False, **ASKED)
    assert torch.equal(sliced.generate(**inputs, use_cache=True, **ASKED), expected)
    assert torch.equal(sliced.generate(**inputs, use_cache=False, **ASKED), expected)
    cache = transformers.DynamicCache(config=sliced.config)
    assert len(cache.layers) == DEPTH - len(gone)
    sliced(**inputs, cache=cache, use_cache=True)
    assert len(cache.layers) == DEPTH - len(gone)
    assert [cache.get_seq_length(layer) for layer in range(len(cache.layers))] == [6] * (DEPTH - len(gone))


def test_configuration_and_numbers_of_layers_are_true() -> None:
    model = deep("qwen2", "causal", **MIXED)
    shared = model.config
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 3
    assert shared.layer_types == kinds
    prune(model, first := without_layers(full_plan(model), (0, 2)))
    assert model.config.layer_types == [kinds[layer] for layer in first.layers_kept]
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2]
    assert {module.config.num_hidden_layers for module in model.modules() if hasattr(module, "config")} == {3}
    assert model.model.has_sliding_layers
    prune(model, without_layers(first, (0, 2, 3, 4)), first)
    assert model.config.layer_types == ["full_attention"]
    assert not model.model.has_sliding_layers
    assert (shared.num_hidden_layers, shared.layer_types) == (DEPTH, kinds)  # another model may have it too
    bert = deep("bert", "causal", add_cross_attention=True)
    prune(bert, without_layers(full_plan(bert), (1, 2)))
    assert [(b.attention.self.layer_idx, b.crossattention.self.layer_idx) for b in bert.bert.encoder.layer] == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]
    distilbert = deep("distilbert", "bare")
    prune(distilbert, without_layers(full_plan(distilbert), (4,)))
    assert distilbert.transformer.n_layers == distilbert.config.n_layers == 4


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=3, deadline=None)
def test_steps_equal_one(family: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    once = deep(family)
    twice = copy.deepcopy(once)
    first = without_layers(draw_plan(once, rng, 0.3), (int(rng.integers(DEPTH)),))
    second = draw_plan(once, rng, 0.4, of=first)
    second = without_layers(second, second.layers_kept[:: int(rng.integers(2, 4))])
    prune(once, second)
    prune(twice, first)
    assert full_plan(twice).covers(first.restricted(first.layers_kept))
    prune(twice, second, present=first)
    assert {name: tensor.tolist() for name, tensor in twice.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in once.state_dict().items()
    }
    prune(twice, second, present=second)
    assert torch.equal(logits(once, batch := draw_batch(rng)), logits(twice, batch))
    own = second.restricted(second.layers_kept)
    prune(twice, own, present=own)  # the model's own numbering is a plan as well
    assert all(len(kept_indices(member, own, own)) for member in members(twice))


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_those_of_the_sliced_model(family: str) -> None:
    task, rng = "causal" if family in DECODERS else "masked", np.random.default_rng(5)
    dense = deep(family, task)
    plan = without_layers(draw_plan(dense, rng, 0.5), (0, 3))
    sliced = copy.deepcopy(dense)
    prune(sliced, plan)
    costs = count_costs(dense, plan)
    assert costs == count_costs(sliced, plan) == count_costs(sliced, plan.restricted(plan.layers_kept))
    assert costs == count_costs(empty(type(dense), dense.config), plan)
    assert costs.parameters == sum(parameter.numel() for parameter in sliced.parameters())
    sizes = unit_params(dense)
    assert unit_params(sliced) == [sizes[layer] for layer in plan.layers_kept]
    assert sparsity(plan, sizes) == pytest.approx(1 - costs.prunable / count_costs(dense, full_plan(dense)).prunable)
    with pytest.raises(ConfigError, match="sizes of 3 layers for a plan of 5"):
        sparsity(plan, unit_params(sliced))
    with pytest.raises(ConfigError, match="the model has 3 layers, of which the plan keeps 4"):
        count_costs(sliced, without_layers(full_plan(dense), (0,)))


def test_adapters_go_onto_what_is_left() -> None:
    model = deep("llama")
    plan = without_layers(draw_plan(model, np.random.default_rng(6), 0.4), (1, 2))
    targets = ["q_proj", "down_proj"]
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=targets))
    before = {name: tensor.shape for name, tensor in wrapped.state_dict().items()}
    with pytest.raises(ConfigError, match="cannot remove layers of a model with adapters; remove them first"):
        prune(wrapped, plan)
    assert {name: tensor.shape for name, tensor in wrapped.state_dict().items()} == before
    expected = count_lora(model, plan, 3, targets)
    prune(model, plan)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets))
    assert wrapped.get_nb_trainable_parameters()[0] == expected == count_lora(wrapped, plan, 3, targets)
    smaller = draw_plan(model, np.random.default_rng(7), 0.4, of=plan)
    prune(wrapped, smaller, present=plan)
    assert wrapped.get_nb_trainable_parameters()[0] == count_lora(wrapped, smaller, 3, targets)


def test_plans_that_do_not_fit_are_refused_and_nothing_is_touched() -> None:
    model = deep("opt")
    full = full_plan(model)
    first, other = without_layers(full, (1,)), without_layers(full, (2,))

    def refused(said: str, *plans: PruningPlan) -> None:
        before = {name: tensor.shape for name, tensor in model.state_dict().items()}
        with pytest.raises(ConfigError, match=said) as caught:
            prune(model, *plans)
        assert "\n" not in str(caught.value)
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before

    refused(
        r"present plan is one of another model: opt, 5 layers \(1 removed\), heads .* has opt, 5 layers,", first, first
    )
    prune(model, first)
    refused("keeps layer 1, which has been removed", other, first)
    refused(r"the plan is one of another model: opt, 5 layers \(1 removed\).* this one has opt, 4 layers", first)
    refused("present plan is one of another model: opt, 5 layers, ", full, full)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("even", [True, False])
def test_what_is_left_comes_back_from_disk(family: str, even: bool, tmp_path: Path) -> None:
    task = "causal" if family in DECODERS else "masked"
    model = deep(family, task, **(MIXED if family == "qwen2" else {}))
    plan = full_plan(model)
    if even:
        heads = (0, 2) if family in GROUPED else (0, 1, 2, 3)
        plan = replace(plan, layers=(LayerPlan(heads, (1, 2, 20)),) * DEPTH)
    else:
        plan = draw_plan(model, np.random.default_rng(8), 0.5)
    plan = without_layers(plan, (0, 3))
    prune(model, plan)
    state = torch.get_rng_state()
    save_pruned(model, plan, tmp_path)
    loaded = load_pruned(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    batch = draw_batch(np.random.default_rng(9))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), **CLOSE)
    assert read_plan(tmp_path) == plan
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.get("num_hidden_layers", written.get("n_layers")) == DEPTH - 2
    further = without_layers(plan, (0, 1, 3))
    prune(loaded, further, present=plan)
    auto: Any = transformers.AutoModelForCausalLM if task == "causal" else transformers.AutoModelForMaskedLM
    if not even:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            auto.from_pretrained(tmp_path)
        return
    theirs = auto.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), **CLOSE)
    if task == "causal":
        assert torch.equal(theirs.generate(**batch, **ASKED), model.generate(**batch, **ASKED))


@pytest.mark.parametrize("family", ["llama", "qwen3", "distilbert"])
def test_a_model_without_memory_can_lose_layers(family: str) -> None:
    real = deep(family)
    plan = without_layers(draw_plan(real, np.random.default_rng(12)), (2, 3))
    hollow = empty(type(real), make_config(family, num_hidden_layers=DEPTH))
    prune(real, plan)
    prune(hollow, plan)
    assert {parameter.device.type for parameter in hollow.parameters()} == {"meta"}
    assert {name: tensor.shape for name, tensor in hollow.state_dict().items()} == {
        name: tensor.shape for name, tensor in real.state_dict().items()
    }
