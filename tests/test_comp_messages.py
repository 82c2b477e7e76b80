"""What travels in a pruning on many devices: sums that lose nothing, steps to the bit, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fl_edge.comp.decision import Decision, decide
from fl_edge.comp.history import History, Step
from fl_edge.comp.messages import (
    Order,
    answer_config,
    answer_tensors,
    checked_answer,
    config_text,
    plan_text,
    read_config,
)
from fl_edge.comp.outcome import Figures, Outcome, base_digest
from fl_edge.comp.pooled import Answer, Dense, Measure, Question, Similar, Skipped
from fl_edge.comp.similarity import Similarity
from fl_edge.comp.sums import Form, Sums, form_of
from fl_edge.comp.survey import NONE, Loss
from fl_edge.errors import ReplyError, RunFolderError
from fl_edge.pruning import LayerPlan, PruningPlan
from tests.tiny_comp_core import configured, draw_layer

BIAS = torch.linspace(-1, 1, 5, dtype=torch.float64)
FULL = PruningPlan("llama", (4, 4), (6, 6), (LayerPlan((0, 1, 2, 3), (0, 1, 2, 3, 4, 5)),) * 2)
FIGURES = Figures((10.0, 8.0), (5.0, 6.0), (0.1, 0.05), (40.0, 32.0), 100.0)


def same(one: Decision, two: Decision) -> None:
    assert one.kept == two.kept
    for name in ("mask", "weight", "bias"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert one.tuned == pytest.approx(two.tuned, rel=1e-6, abs=1e-9)
    assert one.untuned == pytest.approx(two.untuned, rel=1e-6, abs=1e-9)


# sums ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(("target", "restore"), [("dense", "mask"), ("dense", "weights"), ("stream", "none")])
def test_sums_of_parts_decide_as_the_statistics_of_the_whole(
    target: str, restore: str, free: bool, bias: Tensor | None
) -> None:
    config = configured(target=target, restore=restore, bias=free)
    whole = draw_layer(3, tokens=90, noise=0.3, mean=0.5)
    statistics, form = whole.statistics, form_of(config)
    parts = [
        Sums.of(type(statistics).of(whole.inputs[rows], whole.targets[rows]), whole.weight, form)
        for rows in (slice(0, 10), slice(10, 55), slice(55, 90))
    ]
    pooled = (parts[0] + parts[1] + parts[2]).expand(whole.weight, bias)
    assert torch.equal(pooled.gram, pooled.gram.T)
    same(decide(pooled, whole.weight, bias, 4, 1, config), decide(statistics, whole.weight, bias, 4, 1, config))


def test_sums_rounded_on_their_way_move_the_solution_less_than_rounded_statistics() -> None:
    """Inputs with a large mean make the system ill-conditioned; what travels is what the layer falls short by."""
    config = configured(target="stream", restore="weights", damping=1e-6)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.float().double()

    def off(found: Decision, exact: Decision) -> float:
        assert found.weight is not None
        assert exact.weight is not None
        assert found.kept == exact.kept
        return float((found.weight - exact.weight).norm() / exact.weight.norm())

    ours, plain = 0.0, 0.0
    for seed in range(8):
        layer = draw_layer(seed, tokens=200, noise=0.1, mean=50.0)
        statistics = layer.statistics
        sums = Sums.of(statistics, layer.weight, form_of(config))
        sent = Sums(sums.tokens, {name: rounded(tensor) for name, tensor in sums.tensors.items()})
        bare = dataclasses.replace(statistics, gram=rounded(statistics.gram), cross=rounded(statistics.cross))
        exact, *found = (
            decide(each, layer.weight, None, 1, 1, config)
            for each in (statistics, sent.expand(layer.weight, None), bare)
        )
        ours, plain = ours + off(found[0], exact), plain + off(found[1], exact)
    assert 0 < ours < plain / 2


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("restore", ["mask", "weights"])
def test_the_own_output_follows_from_the_gram_matrix(restore: str, bias: Tensor | None) -> None:
    layer = draw_layer(5, mean=0.4)
    own = layer.output if bias is None else layer.output + bias
    statistics = type(layer.statistics).of(layer.inputs, own)
    sums = Sums.of(statistics, layer.weight, "own")
    assert sums.tensors.keys() == {"gram", "inputs"}
    found = sums.expand(layer.weight, bias)
    for name in ("gram", "cross", "inputs", "targets"):
        torch.testing.assert_close(getattr(found, name), getattr(statistics, name))
    assert found.energy == pytest.approx(statistics.energy)
    config = configured(target="own", restore=restore)
    assert form_of(config) == "own"
    same(decide(found, layer.weight, bias, 4, 1, config), decide(statistics, layer.weight, bias, 4, 1, config))


def test_a_mask_needs_no_more_than_a_triangle_and_three_vectors() -> None:
    layer = draw_layer(1, neurons=12, outputs=5)
    sizes = {name: tensor.numel() for name, tensor in Sums.of(layer.statistics, layer.weight, "mask").tensors.items()}
    assert sizes == {"gram": 78, "inputs": 12, "targets": 5, "energy": 1, "matched": 12}


# steps ----------------------------------------------------------------------------------------------------------------


def step(kept: tuple[int, ...] = (0, 3, 8), layer: int = 2, **tensors: Tensor) -> Step:
    given: dict[str, Any] = {"mask": None, "weight": None, "bias": None, **tensors}
    decision = Decision(kept, **given, order=(1,), guarded=True, variance=1.0, untuned=1.0, tuned=1.0)
    return Step.of(layer, "channels", decision, torch.bfloat16)


@pytest.mark.parametrize("kept", [(0,), (7,), (8,), (0, 7, 8, 15), tuple(range(33)), (1, 100)])
def test_kept_units_come_back_from_their_bits(kept: tuple[int, ...]) -> None:
    tensors = step(kept).to_tensors()
    assert tensors["kept"].nbytes == kept[-1] // 8 + 1
    again = Step.from_tensors(2, "channels", 1.0, tensors)
    assert again.decision is not None
    assert again.decision.kept == kept


def test_a_step_folds_as_its_decision_does() -> None:
    linear, other = (nn.Linear(3, 4, bias=False, dtype=torch.bfloat16).requires_grad_(False) for _ in range(2))
    other.load_state_dict(linear.state_dict())
    mask, bias = torch.rand(3, dtype=torch.float64) + 0.5, torch.randn(4, dtype=torch.float64)
    weight = torch.randn(4, 3, dtype=torch.float64)
    for tensors in ({"mask": mask}, {"weight": weight, "bias": bias}):
        original = Decision((0, 3, 8), **{"mask": None, "weight": None, "bias": None, **tensors},
                            order=(), guarded=False, variance=0.0, untuned=0.0, tuned=0.0)  # fmt: skip
        original.fold(linear)
        sent = Step.of(0, "channels", original, torch.bfloat16)
        received = Step.from_tensors(0, "channels", 1.0, sent.to_tensors()).decision
        assert received is not None
        received.fold(other)
        assert torch.equal(linear.weight, other.weight)
    assert torch.equal(linear.bias, other.bias)


def test_a_history_is_kept_cut_and_read_in_pieces_of_whole_layers(tmp_path: Path) -> None:
    history = History(tmp_path / "steps")
    mask = torch.ones(3, dtype=torch.float64)
    for layer in range(4):
        heads = dataclasses.replace(step((0, 1, 2), layer, mask=mask), unit="heads")
        for each in (heads, step((0, 1, 2), layer, mask=mask)):
            history.append(each)
    history.append(Step(4, None, 1.5))
    assert len(History(tmp_path / "steps")) == 9
    last = history.read(8)
    assert (last.layer, last.unit, last.growth, last.decision) == (4, None, 1.5, None)
    piece = list(history.since(2, 9, 1))
    assert [(each.layer, each.unit) for each in piece] == [(1, "heads"), (1, "channels")]
    assert len(list(history.since(3, 9, 10**6))) == 6
    assert list(history.since(9, 9, 1)) == []
    history.truncate(3)
    assert len(history) == len(History(tmp_path / "steps")) == 3
    with pytest.raises(RunFolderError, match=r"holds 3 decisions of 5"):
        history.truncate(5)
    (tmp_path / "steps" / "step-000001.safetensors").write_bytes(b"no")
    with pytest.raises(RunFolderError, match=r"cannot read decision 1") as refused:
        history.read(1)
    assert "\n" not in str(refused.value)


def test_an_order_comes_back_as_it_was() -> None:
    mask = torch.rand(3, dtype=torch.float64)
    for question in (Similar((1, 2)), Skipped((), (1, 2)), Measure(1, "heads", 5), Dense((0, 1)), None):
        order = Order(
            "s-1", True, configured(ratio=0.4), question, 3, [step(mask=mask), Step(1, None, 2.0)], "mask", "float64"
        )
        again = Order.of(order.to_config(), order.to_tensors())
        assert (again.question, again.first, again.config) == (question, 3, order.config)
        assert [each.unit for each in again.steps] == ["channels", None]
        assert again.steps[0].decision is not None
        assert again.steps[0].decision.mask is not None
        assert torch.equal(again.steps[0].decision.mask, mask)
    bad = {**order.to_config(), "session": "../outside"}
    with pytest.raises(ReplyError, match=r"is not a name"):
        Order.of(bad, order.to_tensors())


def test_settings_travel_without_those_of_the_run() -> None:
    config = configured(ratio=0.35, bias=True)
    assert read_config({"config": config_text(config)}) == config


# answers --------------------------------------------------------------------------------------------------------------

QUESTION = Measure(1, "channels", 3)
LAYER = draw_layer(2, tokens=40, neurons=6, outputs=4, noise=0.1)


def answer(form: Form = "mask") -> Answer:
    return {(1, "channels"): Sums.of(LAYER.statistics, LAYER.weight, form)}


def check(
    config: dict[str, Any], tensors: dict[str, Tensor], question: Question = QUESTION, form: Form = "mask"
) -> Answer:
    return checked_answer(question, config, tensors, form, 40, 3, lambda layer, unit: (6, 4))


@pytest.mark.parametrize("form", ["own", "mask", "weights"])
@pytest.mark.parametrize("wire", ["float32", "float64"])
def test_an_answer_comes_back_as_it_was(form: Form, wire: str) -> None:
    sent = answer(form)
    found = check(answer_config(sent), answer_tensors(sent, wire), form=form)[1, "channels"]
    for name, tensor in sent[1, "channels"].tensors.items():
        assert found.tensors[name].dtype == torch.float64
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-6 if wire == "float32" else 0, atol=1e-5)


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def edit(_config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"1.channels.{name}"] = change(tensors[f"1.channels.{name}"])

    return edit


def _nan(tensor: Tensor) -> Tensor:
    return tensor.index_fill(0, torch.tensor([1]), torch.nan)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_set("gram", _nan), "1.channels.gram: numbers that are not all finite"),
        (_set("matched", lambda t: t * torch.inf), "1.channels.matched: numbers that are not all finite"),
        (_set("inputs", lambda t: t + 1e35), "1.channels.inputs: numbers that are not all finite"),
        (_set("gram", lambda t: t[:-1]), r"1.channels.gram is \(20,\) torch.float64; floats of shape \(21,\) were due"),
        (_set("gram", lambda t: t.long()), r"1.channels.gram is \(21,\) torch.int64"),
        (_set("gram", lambda t: -t), "1.channels.gram is no Gram matrix"),
        (_set("gram", lambda t: t + 1e3 * (torch.arange(21) == 1)), "1.channels.gram is no Gram matrix"),
        (_set("inputs", lambda t: t + 1e4), "1.channels.inputs: sums that are larger than the Gram matrix allows"),
        (_set("energy", lambda t: -t), "1.channels.energy is -"),
        (lambda config, tensors: tensors.pop("1.channels.targets"), "1.channels.targets: missing"),
        (lambda config, tensors: tensors.update(hidden=torch.ones(3)), "hidden: no such tensor was asked for"),
        (
            lambda config, tensors: config.update(sums='[[1, "channels", 41]]'),
            r"sums over \[41\] tokens; its text has 40",
        ),
        (lambda config, tensors: config.update(sums='[[0, "heads", 40]]'), "it sends sums of .* were due"),
        (lambda config, tensors: config.update(sums="nonsense"), "it sends no sums"),
        (lambda config, tensors: config.pop("sums"), "it sends no sums"),
    ],
)
def test_a_forged_answer_is_refused_in_one_line(edit: Any, says: str) -> None:
    sent = answer()
    config, tensors = answer_config(sent), answer_tensors(sent, "float64")
    check(config, tensors)
    edit(config, tensors)
    with pytest.raises(ReplyError, match=says) as refused:
        check(config, tensors)
    assert "\n" not in str(refused.value)


def similarity() -> Similarity:
    given = {"tokens": 30, "cosines": 20.0, "products": -3.0, "before": 9.0, "after": 4.0}
    return Similarity(**{name: given.get(name, 0.0) for name in Similarity.__dataclass_fields__})  # type: ignore[arg-type]


def test_plain_sums_come_back_and_what_no_text_gives_is_refused() -> None:
    similar = {0: similarity(), 2: dataclasses.replace(similarity(), cosines=1.0, products=1.0)}
    losses = {NONE: Loss(30, 12.0), 0: Loss(30, 0.0)}
    assert check(answer_config(similar), {}, Similar((1,))) == similar
    assert check(answer_config(losses), {}, Skipped((1,), (0,))) == losses
    for question, bad in (
        (Similar((1,)), {0: similar[0]}),
        (Similar((1,)), {**similar, 1: similar[0]}),
        (Similar((1,)), {**similar, 2: dataclasses.replace(similar[2], cosines=31.0)}),
        (Similar((1,)), {**similar, 2: dataclasses.replace(similar[2], products=float("nan"))}),
        (Similar((1,)), {**similar, 2: dataclasses.replace(similar[2], products=7.0)}),
        (Similar((1,)), {**similar, 2: dataclasses.replace(similar[2], before=-1.0)}),
        (Similar((1,)), {**similar, 2: dataclasses.replace(similar[2], tokens=41)}),
        (Skipped((1,), (0,)), {0: Loss(30, 1.0)}),
        (Skipped((1,), (0,)), {**losses, 0: Loss(30, -1.0)}),
        (Skipped((1,), (0,)), {**losses, 0: Loss(0, 1.0)}),
    ):
        with pytest.raises(ReplyError) as refused:
            check(answer_config(bad), {}, question)
        assert "\n" not in str(refused.value)


# outcomes -----------------------------------------------------------------------------------------------------------


def test_an_outcome_comes_back_and_impossible_figures_are_refused() -> None:
    outcome = Outcome(FULL, "/there", 2.5, 100.0, FIGURES)
    said = outcome.to_config()
    assert Outcome.checked(said, FULL) == outcome
    other = dataclasses.replace(FULL, heads=(5, 4))
    for change in (
        {"perplexity": [5.0, float("nan")]},
        {"perplexity": [5.0]},
        {"memory_bytes": "many"},
        {"seconds": -1.0},
        {"peak_bytes": None},
        {"plan": json.dumps({})},
        {"plan": plan_text(other)},
    ):
        with pytest.raises(ReplyError) as refused:
            Outcome.checked({**said, **change}, FULL)
        assert "\n" not in str(refused.value)


def test_the_hash_of_a_base_follows_its_files(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(name.encode())
    before = base_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"other")
    assert base_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"changed")
    assert base_digest(tmp_path) != before
