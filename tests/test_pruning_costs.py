"""Sizes and multiply-adds by plan, against models that were really sliced."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from fl_edge.pruning import count_costs, count_lora, full_plan, members, prune, sparsity, unit_params
from tests.tiny_transformers import DECODERS, FAMILIES, draw_plan, make_model, same_everywhere

# peft asks transformers by a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, int]]:
    """Multiply-adds of all linear maps in the forward passes inside, by the shapes that go through."""
    seen: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def add(module: Any, inputs: Any, output: torch.Tensor, name: str = name) -> None:
                seen[name] = seen.get(name, 0) + output.numel() * inputs[0].shape[-1]

            hooks.append(module.register_forward_hook(add))
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_those_of_the_sliced_model(family: str) -> None:
    task, rng = "causal" if family in DECODERS else "masked", np.random.default_rng(0)
    dense = make_model(family, task, tie_word_embeddings=True)
    sliced = copy.deepcopy(dense)
    plan = draw_plan(dense, rng, 0.5)
    prune(sliced, plan)
    costs = count_costs(dense, plan)
    assert costs == count_costs(sliced, plan)
    assert costs.parameters == sum(parameter.numel() for parameter in sliced.parameters())
    tokens = 7
    with counted(sliced) as seen, torch.no_grad():
        sliced(torch.randint(2, 60, (1, tokens)))
    inside = {name for name in seen if ".layer." in name or ".layers." in name}
    assert sum(seen[name] for name in inside) == tokens * costs.block_macs
    assert sum(seen[name] for name in seen.keys() - inside) == tokens * costs.outside_macs


def test_attention_counts_scores_and_values_of_the_query_heads_that_stay() -> None:
    model = make_model("qwen3", "causal")  # 8 query heads of width 6 in 4 groups
    assert count_costs(model, full_plan(model)).attention_macs == 2 * (2 * 8 * 6)
    costs = count_costs(model, same_everywhere(model, (1,), (0, 1)))
    assert costs.attention_macs == 2 * (2 * 2 * 6)
    assert costs.macs(10) == costs.block_macs + 10 * costs.attention_macs


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_adapters_are_counted_apart(family: str) -> None:
    model = make_model(family)
    plan, bare = draw_plan(model, np.random.default_rng(1), 0.5), count_costs(model, full_plan(model))
    headed = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    )
    assert count_costs(headed, full_plan(model)) == bare
    paths = [member.path for member in members(model)]
    for targets in (paths, [paths[0].rpartition(".")[2]]):
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=targets))
        assert count_costs(wrapped, full_plan(model)) == bare
        assert count_lora(model, full_plan(model), 3, targets) == wrapped.get_nb_trainable_parameters()[0]
        prune(wrapped, plan)
        assert count_lora(wrapped, plan, 3, targets) == wrapped.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_sparsity_is_the_share_of_prunable_parameters_that_went(family: str) -> None:
    model = make_model(family)
    full, plan = full_plan(model), draw_plan(model, np.random.default_rng(2))
    sizes = unit_params(model)
    assert sparsity(full, sizes) == 0
    whole, left = count_costs(model, full).prunable, count_costs(model, plan).prunable
    assert sparsity(plan, sizes) == pytest.approx(1 - left / whole)
    assert whole == sum(head * full.heads[0] + channel * full.channels[0] for head, channel in sizes)
