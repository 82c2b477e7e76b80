"""A device's round: LoRA put on and taken off without a trace, and steps against LoRA written out by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_edge.errors import ReplyError
from fl_edge.fedspine import training
from fl_edge.fedspine.factors import Factors
from fl_edge.fedspine.importance import UnitScores, unit_scores
from fl_edge.fedspine.lora import attach, detach, factors_of, head_names, head_of, load_head
from fl_edge.fedspine.training import LocalRound, mean_loss, train_round
from fl_edge.pruning import full_plan, members, prune
from tests.tiny import same_bits
from tests.tiny_fedspine import SETTINGS, draw_factors
from tests.tiny_transformers import ENCODERS, FAMILIES, draw_batch, draw_plan, make_model


def draw_batches(count: int = 3, causal: bool = False, seed: int = 1) -> list[dict[str, Tensor]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        batch = draw_batch(rng, batch=4)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100) if causal else torch.arange(4) % 3
        found.append(batch | {"labels": labels})
    return found


def pruned(family: str, task: str = "classification", **changes: Any) -> Any:
    model = make_model(family, task, **changes)
    prune(model, draw_plan(model, np.random.default_rng(3), 0.4))
    return model.requires_grad_(False)


def run(model: Any, rank: int = 3, seed: int = 5, causal: bool = False, **settings: Any) -> LocalRound:
    maps = members(model)
    return train_round(
        model, maps, draw_factors(maps, model, rank), head_of(model), draw_batches(causal=causal),
        draw_batches(2, causal, seed=9), replace(SETTINGS, **settings), seed,
    )  # fmt: skip


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that could be left behind: attributes of all modules, requires_grad, hooks."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
    return found | {f"{name}?": parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_leaves_the_base_to_the_bit_and_no_trace(family: str) -> None:
    model = pruned(family)
    before, looks, config = copy.deepcopy(model.state_dict()), traces(model), model.config.to_dict()
    maps = members(model)
    for rank in (2, 5):
        drawn = draw_factors(maps, model, rank, seed=rank)
        attached = attach(model, maps, drawn, scale=2.0, dropout=0.1)
        for path, factors in factors_of(attached).items():
            assert torch.equal(factors.a, drawn[path].a)
            assert torch.equal(factors.b, drawn[path].b)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(trainable) == 2 * len(maps)
        assert all(".lora_" in name for name in trainable)
        detach(model, maps)
        model.requires_grad_(False)
        assert same_bits(model.state_dict(), before)
        assert traces(model) == looks
        assert model.config.to_dict() == config


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_scale_is_the_same_for_every_rank(scale: float) -> None:
    """Rank r with columns of zeros behind it computes what rank r without them computes."""
    model = make_model("bert").requires_grad_(False)
    maps, batch = members(model), draw_batches(1)
    narrow = draw_factors(maps, model, 2)
    wide = {
        path: Factors(functional.pad(f.a, (0, 0, 0, 3), value=0.7), functional.pad(f.b, (0, 3)))
        for path, f in narrow.items()
    }
    losses, plain = [], mean_loss(model, batch)
    for adapter in (narrow, wide):
        attached = attach(model, maps, adapter, scale=scale, dropout=0.0)
        assert [each.scale for each in attached] == pytest.approx([scale] * len(maps))
        losses.append(mean_loss(model, batch))
        detach(model, maps)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for member in maps:  # and it is s B A that is added
        weight = model.get_parameter(f"{member.path}.weight")
        weight += scale * narrow[member.path].b @ narrow[member.path].a
    assert mean_loss(model, batch) == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[0] - plain) > 1e-2


def by_hand(model: Any, rank: int, clip: float) -> tuple[dict[str, Factors], dict[str, Tensor], list[float]]:
    """The same round with merged weights under plain autograd, and AdamW written out."""
    maps, head = members(model), head_names(model)
    start = draw_factors(maps, model, rank)
    theta = {f"{p}/a": f.a.clone() for p, f in start.items()} | {f"{p}/b": f.b.clone() for p, f in start.items()}
    theta |= {name: model.get_parameter(name).clone() for name in head}
    first, second = ({name: torch.zeros_like(t) for name, t in theta.items()} for _ in range(2))
    moved: list[float] = []
    for step, batch in enumerate(draw_batches(), 1):
        for tensor in theta.values():
            tensor.requires_grad_()
        weights = {name: theta[name] for name in head}
        for member in maps:
            name = f"{member.path}.weight"
            weights[name] = model.get_parameter(name) + 2.0 * theta[f"{member.path}/b"] @ theta[f"{member.path}/a"]
        loss = torch.func.functional_call(model, weights, kwargs=batch).loss
        grads = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
        moved.append(sum(float((theta[n].detach() * g).abs().sum()) for n, g in grads.items() if "/" in n))
        length = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        cut = min(1.0, clip / (length + 1e-6)) if clip else 1.0
        for name, grad in grads.items():
            first[name] = 0.9 * first[name] + 0.1 * cut * grad
            second[name] = 0.999 * second[name] + 0.001 * (cut * grad).square()
            unbiased = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            old = theta[name].detach()
            theta[name] = old * (1 - 1e-2 * 0.01) - 1e-2 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    adapter = {path: Factors(theta[f"{path}/a"], theta[f"{path}/b"]) for path in start}
    return adapter, {name: theta[name] for name in head}, moved


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_round_is_lora_written_out_by_hand(family: str, clip: float) -> None:
    quiet: dict[str, Any] = (
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    )
    model = pruned(family, **quiet)
    adapter, head, moved = by_hand(copy.deepcopy(model), 3, clip)
    done = run(model, clip_norm=clip)
    for path, factors in done.adapter.items():
        assert torch.allclose(factors.a, adapter[path].a, atol=2e-4), path
        assert torch.allclose(factors.b, adapter[path].b, atol=2e-4), path
    assert done.head.keys() == head.keys()
    for name, parameter in done.head.items():
        assert torch.allclose(parameter, head[name], atol=2e-4), name
    assert done.update_importance == pytest.approx(np.mean(moved), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["classification", "causal"])
def test_a_round_trains_factors_and_head_and_nothing_else(
    family: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family in ENCODERS and task == "causal":
        return
    model = pruned(family, task)
    before, looks, maps = copy.deepcopy(model.state_dict()), traces(model), members(model)
    seen: list[UnitScores] = []

    def watched(maps: Any, layers: int, normalise: bool) -> UnitScores:
        for name, parameter in model.named_parameters():
            free = ".lora_" in name or name in head_names(model)
            assert parameter.requires_grad is free, name
            assert (parameter.grad is not None) is free, name
        seen.append(unit_scores(maps, layers, normalise))
        return seen[-1]

    monkeypatch.setattr(training, "unit_scores", watched)
    start = draw_factors(maps, model, 3)
    done = run(model, causal=task == "causal")
    after = model.state_dict()
    for name in before.keys() - set(head_names(model)):
        assert torch.equal(before[name], after[name]), name
    assert traces(model) == looks
    assert same_bits(done.head, {name: after[name] for name in head_names(model)})
    for path, factors in done.adapter.items():
        assert not torch.equal(factors.a, start[path].a), path
        assert not torch.equal(factors.b, start[path].b), path
    assert all(not torch.equal(parameter, before[name]) for name, parameter in done.head.items())
    assert bool(done.head) is (task == "classification")
    assert done.importance.steps == len(seen) == 3
    assert done.importance.mean is not None
    # lambda = 0.9 over three iterations: 0.81, 0.9 and 1 parts
    newest = done.importance.mean[1]["heads"] * 2.71 - 0.9 * seen[1][1]["heads"] - 0.81 * seen[0][1]["heads"]
    assert torch.allclose(newest, seen[2][1]["heads"], atol=1e-5)
    assert not any(
        parameter.requires_grad for parameter in [*done.head.values(), *(f.a for f in done.adapter.values())]
    )


def test_heads_of_the_families() -> None:
    heads = {family: {name.rsplit(".", 1)[0] for name in head_names(make_model(family))} for family in FAMILIES}
    assert heads["bert"] == {"bert.pooler.dense", "classifier"}
    assert heads["roberta"] == {"classifier.dense", "classifier.out_proj"}
    assert heads["distilbert"] == {"pre_classifier", "classifier"}
    assert all(heads[family] == {"score"} for family in ("llama", "mistral", "qwen2", "qwen3"))
    assert head_names(make_model("llama", "causal")) == []
    assert head_names(make_model("bert", "masked")) == []


def test_the_loss_is_that_of_the_probe_before_and_after() -> None:
    model = pruned("bert")
    other = copy.deepcopy(model)
    done, probe = run(model, scale=1.0), draw_batches(2, seed=9)
    for adapter, head, expected in (
        (draw_factors(members(other), other, 3), head_of(other), done.loss_before),
        (done.adapter, done.head, done.loss_after),
    ):
        attach(other, members(other), adapter, scale=1.0, dropout=0.5)
        load_head(other, head, trainable=False)
        assert mean_loss(other, probe) == pytest.approx(expected, rel=1e-6)
        detach(other, members(other))
    assert done.loss_after < done.loss_before


def global_numpy() -> str:
    return repr(np.random.get_state())  # noqa: NPY002 - the one that must stay as it is


def test_equal_seeds_give_equal_bits_and_the_global_generators_stay() -> None:
    model = pruned("bert")  # with dropout in the base
    torch_state, numpy_state = torch.get_rng_state(), global_numpy()
    head = copy.deepcopy(head_of(model))

    def bits(seed: int) -> dict[str, Tensor]:
        load_head(model, head, trainable=False)
        done = run(model, dropout=0.3, seed=seed)
        return {p: f.b for p, f in done.adapter.items()} | done.head

    first = bits(5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert global_numpy() == numpy_state
    torch.rand(3)
    assert same_bits(bits(5), first)
    assert not same_bits(bits(6), first)


def test_a_round_without_iterations_gives_back_what_it_got() -> None:
    model = pruned("bert")
    maps = members(model)
    start = draw_factors(maps, model, 2)
    done = train_round(model, maps, start, head_of(model), [], draw_batches(1), SETTINGS, 1)
    assert all(torch.equal(done.adapter[path].b, start[path].b) for path in start)
    assert (done.importance.steps, done.update_importance) == (0, 0.0)
    assert done.loss_after == done.loss_before


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"learning_rate": 1e30}, "the loss after training is"), ({"scale": 1e38}, "the loss before training is")],
)
def test_training_that_diverges_is_one_line_and_leaves_the_model_whole(settings: dict[str, Any], words: str) -> None:
    model = pruned("bert")
    before, looks = copy.deepcopy(model.state_dict()), traces(model)
    with pytest.raises(ReplyError, match=rf"^{words} (nan|inf); a smaller learning_rate than .* is due$"):
        run(model, **settings)
    assert traces(model) == looks
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before.keys() - set(head_names(model)))
    assert math.isfinite(run(make_model("bert").requires_grad_(False)).loss_after)


def test_what_does_not_fit_the_model_is_one_line_and_leaves_no_trace() -> None:
    model = pruned("bert")
    maps, looks = members(model), traces(model)
    full = make_model("bert")
    with pytest.raises(
        ReplyError, match=r"^the factors of bert\.encoder\.\S+ are \(32, 3\) x \(3, 32\); the model takes"
    ):
        attach(model, maps, draw_factors(maps, full, 3), scale=1.0, dropout=0.0)
    mixed = draw_factors(maps, model, 3) | {maps[2].path: draw_factors(maps, model, 2)[maps[2].path]}
    with pytest.raises(ReplyError, match=f"^the factors of {maps[2].path} are"):
        attach(model, maps, mixed, scale=1.0, dropout=0.0)
    good, head = draw_factors(maps, model, 3), head_of(model)
    for bad, words in (
        ({n: t for n, t in head.items() if n != "classifier.bias"}, "that of the model has"),
        ({}, "the head has no parameters"),
        (head | {"classifier.bias": torch.zeros(4)}, r"classifier\.bias is \(4,\); the model has \(3,\)"),
    ):
        with pytest.raises(ReplyError, match=words) as caught:
            train_round(model, maps, good, bad, [], draw_batches(1), SETTINGS, 1)
        assert "\n" not in str(caught.value)
    assert traces(model) == looks


def test_a_plan_without_cuts_trains_too() -> None:
    model = make_model("qwen3").requires_grad_(False)
    done = run(model, rank=1)
    assert done.importance.mean is not None
    assert [len(layer["heads"]) for layer in done.importance.mean] == list(full_plan(model).heads)
