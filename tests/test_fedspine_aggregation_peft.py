"""Aggregation against peft's own combinations of adapters: `cat` is stacking, `svd` is FlexLoRA's rule."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fl_edge.fedspine.aggregation import Rule, aggregate
from fl_edge.fedspine.factors import Factors, Part

RANKS, WIDTHS = (2, 5, 3), {"query": (16, 12), "value": (10, 16)}


@pytest.fixture(scope="module")
def combined() -> tuple[Any, list[str], list[float]]:
    """A peft model with an adapter a device and the two combinations of them."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.ModuleDict({name: nn.Linear(inputs, outputs) for name, (outputs, inputs) in WIDTHS.items()})
    names, weights = [f"device{index}" for index in range(len(RANKS))], [0.5, 0.2, 0.3]
    configs = [
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(WIDTHS), init_lora_weights=False) for rank in RANKS
    ]
    model: Any = get_peft_model(base, configs[0], adapter_name=names[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
        model.add_weighted_adapter(names, weights, "cat", combination_type="cat")
        model.add_weighted_adapter(names, weights, "svd", combination_type="svd", svd_rank=4)
    return model, names, weights


def pair(model: Any, module: str, adapter: str) -> Factors:
    layer = model.base_model.model[module]
    return Factors(layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach())


def product(factors: Factors) -> Tensor:
    return factors.b.double() @ factors.a.double()


@pytest.mark.parametrize("module", WIDTHS)
@pytest.mark.parametrize(("rule", "peers", "rank"), [("stacking", "cat", sum(RANKS)), ("flexlora", "svd", 4)])
def test_parity(combined: tuple[Any, list[str], list[float]], module: str, rule: Rule, peers: str, rank: int) -> None:
    model, names, weights = combined
    parts = [Part(pair(model, module, name), weight) for name, weight in zip(names, weights, strict=True)]
    ours = aggregate(rule, parts, parts[0].factors, 4, torch.Generator().manual_seed(0))
    theirs = pair(model, module, peers)
    assert ours.rank == theirs.rank == rank
    assert torch.linalg.norm(product(ours) - product(theirs)) <= 2e-6 * torch.linalg.norm(product(theirs))
