"""Orders and replies: what goes there and back, and what is refused in one line."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.fedspine.importance import Smoothing
from fl_edge.fedspine.lora import attach, factors_of, head_of, map_shapes
from fl_edge.fedspine.messages import (
    Order,
    Reply,
    checked_reply,
    device_adapter,
    order_tensors,
    read_order_tensors,
    reply_config,
    reply_tensors,
)
from fl_edge.fedspine.training import LocalRound, TrainingSettings
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.flower import identify_process
from fl_edge.pruning import full_plan, members, prune
from fl_edge.pruning.plan import UNITS
from tests.tiny import same_bits
from tests.tiny_fedspine import BASE, draw_factors, order_of
from tests.tiny_transformers import FAMILIES, draw_plan, make_model

MEMBERS, HEAD = members(BASE), head_of(BASE)
SHAPES = map_shapes(BASE, MEMBERS)
PLAN = draw_plan(BASE, np.random.default_rng(0), 0.4)
ORDER = order_of(PLAN, rank=2, server_round=4, tau=3)
QUERY = "bert.encoder.layer.0.attention.self.query"


def through_flower(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    identify_process(1)
    message = Message(make_content(config, tensors), 1, "train.fedspine")
    return config_of(message), tensors_of(message)


def good_reply(order: Order = ORDER) -> tuple[dict[str, Any], dict[str, Tensor]]:
    pruned = copy.deepcopy(BASE)
    prune(pruned, order.plan)
    scores = Smoothing(0.9)
    scores.add([{unit: torch.rand(len(PLAN.kept(n, unit))) for unit in UNITS} for n in range(len(PLAN.layers))])
    scores.steps = 3
    done = LocalRound(draw_factors(MEMBERS, pruned, order.rank), HEAD, scores, 1.5, 0.25, 2.0)
    return through_flower(reply_config(order, done, 17, 0.5, 1e7), reply_tensors(done))


def check(config: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
    return checked_reply(config, tensors, ORDER, MEMBERS, HEAD, SHAPES)


def test_an_order_comes_back_from_its_message() -> None:
    config, _ = through_flower(ORDER.to_config(), {})
    assert Order.from_config(config) == ORDER
    assert {field.name for field in fields(TrainingSettings)} <= config.keys()
    assert isinstance(Order.from_config(config).settings.normalise, bool)


def test_an_order_holds_the_settings_of_its_round() -> None:
    order = order_of(PLAN, server_round=3, learning_rate=0.1, lr_decay=0.5, tau=7, clip_norm=0.3, smoothing=0.8)
    assert order.settings.learning_rate == pytest.approx(0.025)
    assert (order.tau, order.settings.clip_norm, order.settings.smoothing) == (7, 0.3, 0.8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_device_gets_the_rows_and_columns_that_pruning_leaves(family: str, rank: int) -> None:
    """Against a model that is pruned with its adapter on, which slices the factors by other code."""
    model = make_model(family)
    maps, plan = members(model), draw_plan(model, np.random.default_rng(2), 0.5)
    adapter = draw_factors(maps, model, 4)
    found = device_adapter(adapter, maps, plan, rank)
    tensors = through_flower({}, order_tensors(found, head_of(model)))[1]
    read, head = read_order_tensors(tensors, maps)
    attached = attach(model, maps, adapter, scale=1.0, dropout=0.0)
    prune(model, plan)
    for path, factors in factors_of(attached).items():
        assert torch.equal(read[path].a, factors.a[:rank])
        assert torch.equal(read[path].b, factors.b[:, :rank])
    assert same_bits(head, head_of(model))
    assert all(found[path].a is not adapter[path].a for path in found)


def test_an_order_without_a_map_is_one_line() -> None:
    tensors = order_tensors(device_adapter(draw_factors(MEMBERS, BASE, 2), MEMBERS, full_plan(BASE), 2), HEAD)
    del tensors[f"{QUERY}.lora_B.weight"]
    with pytest.raises(ReplyError, match=rf"^the order holds no {QUERY}\.lora_B\.weight; server and device have"):
        read_order_tensors(tensors, MEMBERS)


def test_a_good_reply_is_taken_as_it_is() -> None:
    config, tensors = good_reply()
    reply = check(config, tensors)
    assert (reply.samples, reply.steps, reply.loss_before, reply.loss_after) == (17, 3, 1.5, 0.25)
    assert (reply.update_importance, reply.compute_s, reply.bandwidth_bps) == (2.0, 0.5, 1e7)
    assert same_bits(reply.head, HEAD)
    assert reply.adapter.keys() == SHAPES.keys()
    assert torch.equal(reply.adapter[QUERY].b, tensors[f"{QUERY}.lora_B.weight"])
    for layer, scores in enumerate(reply.importance):
        assert {unit: len(score) for unit, score in scores.items()} == {u: len(PLAN.kept(layer, u)) for u in UNITS}
        assert torch.equal(scores["heads"], tensors[f"importance.{layer}.heads"])


def test_a_reply_may_know_nothing_about_importance() -> None:
    config, tensors = good_reply()
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith("importance.")}
    reply = check(config | {"steps": 0}, bare)
    assert (reply.importance, reply.steps) == ([], 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"round": 3}, "it answers round 3; round 4 was due"),
        ({"round": None}, "it answers round None; round 4 was due"),
        ({"plan": full_plan(BASE).digest()}, "it has pruned by another plan than the one it was sent"),
        ({"plan": None}, "it has pruned by another plan than the one it was sent"),
        ({"rank": 4}, "it has trained rank 4; 2 was given"),
        ({"rank": None}, "it has trained rank None; 2 was given"),
        ({"samples": 0}, "0 samples; at least 1 is due"),
        ({"samples": -3}, "samples is -3; a number of at least 0"),
        ({"samples": None}, "samples is None; a number of at least 0 and below 1e+12 is due"),
        ({"steps": None}, "steps is None; a number of at least 0"),
        ({"steps": -1}, "steps is -1; a number of at least 0"),
        ({"steps": 4}, "its importance is of 4 iterations; 3 were asked for"),
        *(
            ({name: value}, f"{name} is {value}; a number of at least 0 and below 1e+12 is due")
            for name in ("loss_before", "loss_after", "update_importance", "compute_s", "bandwidth_bps")
            for value in (math.nan, math.inf, 1e300, -1.0, None, "much")
        ),
    ],
)
def test_numbers_that_cannot_be_are_one_line(change: dict[str, Any], words: str) -> None:
    config, tensors = good_reply()
    config = {name: value for name, value in (config | change).items() if value is not None}
    with pytest.raises(ReplyError) as caught:
        check(config, tensors)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
ROWS = len(PLAN.layers[0].heads) * 8
CHANNELS = len(PLAN.layers[1].channels)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (A, None, f"no tensor {A}"),
        (A, torch.full((2, 32), math.nan), f"{A}: numbers that are not all finite"),
        (B, torch.zeros(ROWS - 1, 2), f"{QUERY}: {ROWS - 1} rows and 32 columns; {ROWS} and 32 were due"),
        (B, torch.zeros(32, 2), f"{QUERY}: 32 rows and 32 columns; {ROWS} and 32 were due"),
        (A, torch.zeros(4, 32), f"{QUERY}: rank 4 in a and 2 in b; 2 was given"),
        ("bert.pooler.dense.lora_A.weight", torch.zeros(2, 32), "bert.pooler.dense.lora_A.weight: no such tensor"),
        ("head.classifier.bias", None, "head.classifier.bias is nothing; floating numbers of shape (3,) were due"),
        ("head.classifier.bias", torch.zeros(4), "head.classifier.bias is (4,) torch.float32; floating"),
        ("head.classifier.bias", torch.zeros(3).long(), "head.classifier.bias is (3,) torch.int64; floating"),
        ("head.classifier.bias", torch.full((3,), -math.inf), "head.classifier.bias: numbers that are not all finite"),
        ("head.extra", torch.zeros(3), "head.extra: no such tensor was sent"),
        ("importance.1.channels", None, "importance.1.channels is nothing"),
        ("importance.1.channels", torch.zeros(40), "importance.1.channels is (40,) torch.float32; floating"),
        ("importance.1.channels", torch.full((CHANNELS,), math.nan), "importance.1.channels: numbers that are not all"),
        ("importance.1.channels", torch.full((CHANNELS,), -0.1), "importance.1.channels: numbers below 0"),
        ("importance.2.heads", torch.zeros(4), "importance.2.heads: no such tensor was sent"),
    ],
)
def test_tensors_that_cannot_be_are_one_line(name: str, value: Tensor | None, words: str) -> None:
    config, tensors = good_reply()
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(ReplyError) as caught:
        check(config, tensors)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_scores_of_no_iteration_are_not_expected() -> None:
    config, tensors = good_reply()
    with pytest.raises(ReplyError, match=r"^importance\.0\.channels: no such tensor was sent$"):
        check(config | {"steps": 0}, tensors)
