"""Sliced models against zero-masked ones: every family, uneven plans, adapters, padding, generation, training."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fl_edge.errors import ConfigError
from fl_edge.pruning import PruningPlan, full_plan, kept_indices, members, plain, prune, unit_params
from fl_edge.pruning.architectures import FAMILIES as KNOWN
from tests.tiny_transformers import (
    DECODERS,
    FAMILIES,
    draw_batch,
    draw_plan,
    fill,
    logits,
    make_config,
    make_model,
    mask_units,
    same_everywhere,
)

# peft asks transformers by a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

make_empty: Any = transformers.AutoModelForSequenceClassification.from_config
CLOSE: Any = {"rtol": 0, "atol": 1e-5}
SEEDS = st.integers(0, 2**32 - 1)


def with_lora(model: Any, seed: int, name: str = "default", rank: int = 3, **changes: Any) -> Any:
    """A peft model with adapters on every prunable map, drawn anew, and only them trainable."""
    targets = [member.path for member in members(model)]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **changes)
    wrapped = peft.get_peft_model(model, config, adapter_name=name)
    redraw(wrapped, seed)
    return wrapped.eval()


def redraw(model: nn.Module, seed: int) -> None:
    fill(nn.ParameterList([p for name, p in model.named_parameters() if "lora_" in name]), seed)


def test_every_family_of_the_tests_is_known() -> None:
    assert set(KNOWN) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=SEEDS, ratio=st.sampled_from([0.0, 0.2, 0.5, 0.8, None]), batch=st.integers(1, 4), left=st.booleans())
@settings(max_examples=6, deadline=None)
def test_sliced_equals_masked(family: str, seed: int, ratio: float | None, batch: int, left: bool) -> None:
    rng = np.random.default_rng(seed)
    task = ("bare", "classification", "masked" if family not in DECODERS else "causal")[rng.integers(3)]
    sliced = make_model(family, task, ("eager", "sdpa")[rng.integers(2)], seed)
    plan, inputs = draw_plan(sliced, rng, ratio), draw_batch(rng, batch, left=left)
    masked = copy.deepcopy(sliced)
    mask_units(masked, plan)
    prune(sliced, plan)
    torch.testing.assert_close(logits(sliced, inputs), logits(masked, inputs), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_slicing_removes_what_the_plan_removes(family: str) -> None:
    model = make_model(family)
    plan = draw_plan(model, np.random.default_rng(1), 0.5)
    before, sizes = sum(p.numel() for p in model.parameters()), unit_params(model)
    assert plan != full_plan(model)
    prune(model, plan)
    gone = sum(
        (plan.heads[layer] - len(kept.heads)) * head + (plan.channels[layer] - len(kept.channels)) * channel
        for layer, (kept, (head, channel)) in enumerate(zip(plan.layers, sizes, strict=True))
    )
    assert before - sum(p.numel() for p in model.parameters()) == gone > 0
    assert unit_params(model) == sizes
    assert full_plan(model).covers(plan)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
            assert module.weight.is_contiguous()
            assert module.bias is None or module.bias.shape == module.weight.shape[:1]


def test_numbers_that_modules_keep_of_their_own_follow() -> None:
    pruned = {family: make_model(family, "bare") for family in ("bert", "distilbert", "mistral")}
    for model in pruned.values():
        prune(model, same_everywhere(model, (1, 2, 3), (0, 5)))
    attention = pruned["bert"].encoder.layer[1].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (3, 24)
    assert pruned["distilbert"].transformer.layer[1].attention.n_heads == 3
    assert pruned["mistral"].layers[1].mlp.intermediate_size == 2
    assert pruned["mistral"].layers[1].self_attn.num_key_value_groups == 2
    assert pruned["mistral"].config.num_attention_heads == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_equal_one(family: str) -> None:
    rng = np.random.default_rng(2)
    once = make_model(family)
    twice = copy.deepcopy(once)
    first = draw_plan(once, rng, 0.3)
    second = draw_plan(once, rng, 0.4, of=first)
    prune(once, second)
    prune(twice, first)
    prune(twice, second, present=first)
    assert {name: tensor.tolist() for name, tensor in twice.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in once.state_dict().items()
    }
    prune(twice, second, present=second)
    assert torch.equal(logits(once, batch := draw_batch(rng)), logits(twice, batch))


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_kept_indices_count_in_what_is_present(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = make_model("qwen2")
    first = draw_plan(model, rng)
    second = draw_plan(model, rng, of=first)
    for member in members(model):
        direct = kept_indices(member, second)
        there = kept_indices(member, first)
        assert direct.dtype == torch.int64
        assert torch.equal(there[kept_indices(member, second, first)], direct)
        total = full_plan(model).total(member.layer, member.unit) * member.width
        dense = torch.arange(total).view(-1, member.width)[list(second.kept(member.layer, member.unit))].flatten()
        assert torch.equal(direct, dense)


def test_members_are_the_whole_dependency_group() -> None:
    found = {
        (m.path.removeprefix("model.layers.0."), m.unit, m.axis, m.width) for m in members(make_model("llama"))[:7]
    }
    assert found == {
        ("self_attn.q_proj", "heads", 0, 8),  # two query heads of width 4
        ("self_attn.k_proj", "heads", 0, 4),
        ("self_attn.v_proj", "heads", 0, 4),
        ("self_attn.o_proj", "heads", 1, 8),
        ("mlp.gate_proj", "channels", 0, 1),
        ("mlp.up_proj", "channels", 0, 1),
        ("mlp.down_proj", "channels", 1, 1),
    }
    assert len(members(make_model("bert"))) == 2 * 6


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_with_a_cache_equals_the_masked_model(family: str, attention: str) -> None:
    rng = np.random.default_rng(3)
    sliced = make_model(family, "causal", attention)
    plan, inputs = draw_plan(sliced, rng), draw_batch(rng, 3, 6, left=True)
    masked = copy.deepcopy(sliced)
    mask_units(masked, plan)
    prune(sliced, plan)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    expected = masked.generate(**inputs, use_cache=False, **asked)
    assert torch.equal(sliced.generate(**inputs, use_cache=True, **asked), expected)
    assert expected.shape == (3, 14)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_before_or_after_pruning_is_the_same(family: str) -> None:
    rng = np.random.default_rng(4)
    model = make_model(family)
    plan, inputs = draw_plan(model, rng, 0.5), draw_batch(rng)
    before = with_lora(copy.deepcopy(model), seed=5, name="tuned", task_type="SEQ_CLS")
    full = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    assert [m.path for m in members(before)] == [m.path for m in members(model)]
    prune(before, plan)

    prune(model, plan)
    after = with_lora(model, seed=6, name="tuned", task_type="SEQ_CLS")
    state = after.state_dict()
    reach: dict[tuple[str, int], Any] = {
        (member.path, member.axis): kept_indices(member, plan) for member in members(after)
    }
    for name, tensor in full.items():
        if "lora_" in name:
            path = name.removeprefix("base_model.model.").partition(".lora_")[0]
            axis = 0 if "lora_B" in name else 1
            rows = reach.get((path, axis))
            state[name].copy_(tensor if rows is None else tensor.index_select(axis, rows))
        elif "modules_to_save" in name:
            state[name].copy_(tensor)
    assert torch.equal(logits(before, inputs), logits(after, inputs))
    for one, other in zip(before.modules(), after.modules(), strict=True):
        assert getattr(one, "in_features", None) == getattr(other, "in_features", None)
        assert getattr(one, "out_features", None) == getattr(other, "out_features", None)


@pytest.mark.parametrize("family", ["roberta", "qwen3"])
def test_sliced_equals_masked_with_several_adapters_merged_or_not(family: str) -> None:
    rng = np.random.default_rng(7)
    sliced = with_lora(make_model(family), 8, "one", lora_bias=family == "roberta", bias="none")
    sliced.add_adapter("two", peft.LoraConfig(r=2, target_modules=sliced.peft_config["one"].target_modules))
    redraw(sliced, 9)
    masked = copy.deepcopy(sliced)
    plan, inputs = draw_plan(sliced, rng, 0.5), draw_batch(rng)
    prune(sliced, plan)
    for name in ("one", "two"):
        sliced.set_adapter(name)
        reference = copy.deepcopy(masked)
        reference.set_adapter(name)
        merged = reference.merge_and_unload()
        mask_units(merged, plan)
        torch.testing.assert_close(logits(sliced, inputs), logits(merged, inputs), **CLOSE)
    torch.testing.assert_close(logits(sliced.merge_and_unload(), inputs), logits(merged, inputs), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_trains_its_adapter_alone(family: str) -> None:
    rng = np.random.default_rng(10)
    model = with_lora(make_model(family), 11)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    prune(model, draw_plan(model, rng))
    model.train()
    loss = model(**draw_batch(rng), labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in frozen) == ("lora_" in name)
        assert (parameter.grad is None) == (name in frozen)
        assert parameter.grad is None or (bool(torch.isfinite(parameter.grad).all()) and parameter.grad.any())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_memory_can_be_sliced(family: str) -> None:
    real = make_model(family)
    with torch.device("meta"):
        empty = make_empty(make_config(family), dtype=torch.bfloat16)
    plan = draw_plan(real, np.random.default_rng(12))
    prune(real, plan)
    prune(empty, plan)
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {
        name: tensor.shape for name, tensor in real.state_dict().items()
    }
    assert {(p.device.type, p.dtype) for p in empty.parameters()} == {("meta", torch.bfloat16)}


def refused(model: Any, said: str, *plans: PruningPlan) -> None:
    """Pruning ends in one line, and the model is as it was."""
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=said) as caught:
        prune(model, *plans)
    assert "\n" not in str(caught.value)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    plan = full_plan(make_model("bert"))
    config = transformers.AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=10, n_positions=8)
    refused(make_empty(config), "'gpt2'; known are bert, distilbert, llama, mistral", plan)
    refused(nn.Linear(2, 2), "'Linear'; known are bert", plan)
    with pytest.raises(ConfigError, match="known are"):
        members(nn.Linear(2, 2))


def test_a_model_without_a_layer_has_no_prunable_unit() -> None:
    for look in (members, full_plan, unit_params):
        with pytest.raises(ConfigError, match=r"BertModel has no prunable unit: encoder.layer is empty"):
            look(make_model("bert", "bare", num_hidden_layers=0))


def test_plans_that_do_not_fit_are_refused_and_nothing_is_touched() -> None:
    rng = np.random.default_rng(13)
    model = make_model("bert")
    small = same_everywhere(model, (0, 2), (1, 2, 3))
    refused(model, "plan is one of another model: roberta, 2 layers", full_plan(make_model("roberta")))
    refused(model, "plan is one of another model: bert, 2 layers, heads .4., channels .30.",
            full_plan(make_model("bert", intermediate_size=30)))  # fmt: skip
    refused(model, "present plan is one of another model", small, full_plan(make_model("roberta")))
    refused(model, "keeps head 1 of layer 0, which has been removed", full_plan(model), small)
    refused(model, "keeps channel 0 of layer 0, which", same_everywhere(model, (0, 2), (0, 1)), small)
    refused(model, "query has 32 rows, but 16 by the plan of what is present", small, small)
    prune(model, small)
    refused(model, "query has 16 rows, but 32", draw_plan(model, rng, 0.5))


def test_what_cannot_be_sliced_is_refused() -> None:
    dora = with_lora(make_model("bert"), 14, use_dora=True)
    plan = same_everywhere(dora, (0,), (0,))
    refused(dora, "not plain LoRA", plan)
    ia3 = peft.get_peft_model(
        make_model("bert"), peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[])
    )
    refused(ia3, "not plain LoRA", plan)
    odd = make_model("bert")
    odd.bert.encoder.layer[1].output.dense = nn.Bilinear(2, 2, 2)
    refused(odd, "layer.1.output.dense: it is a Bilinear, only nn.Linear", plan)


def test_plain_looks_under_the_wrapper() -> None:
    model = make_model("bert")
    assert plain(model) is model
    assert plain(with_lora(model, 15)) is model
    assert plain(odd := SimpleNamespace()) is odd  # type: ignore[arg-type, comparison-overlap]
