"""The training module against references: autograd, centralised SGD, a plain twin of the released algorithm."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fl_edge.edge.traffic import round_bytes
from fl_edge.errors import ReplyError
from fl_edge.mergesfl.bottoms import Turn, aggregate, batch_indices, bottom_step, forward, repeat_forward
from fl_edge.mergesfl.config import MergeSFLConfig, released
from fl_edge.mergesfl.merging import dispatch, merge, split, top_step
from fl_edge.mergesfl.planning import make_plan
from fl_edge.mergesfl.replies import checked_batch, checked_weights
from fl_edge.mergesfl.report import RoundReport
from fl_edge.mergesfl.sgd import descend
from fl_edge.mergesfl.state import ControlState
from fl_edge.models.split import SplitModel
from fl_edge.seeding import numpy_rng
from tests.tiny import CLASSES, FEATURES, make_data, make_model, make_strategy, same_bits, train

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@given(SIZES)
def test_split_undoes_merge(sizes: list[int]) -> None:
    parts = [torch.randn(size, 3) for size in sizes]
    assert all(torch.equal(one, other) for one, other in zip(parts, split(merge(parts), sizes), strict=True))


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(0, 100))
def test_dispatched_gradient_is_that_of_the_workers_own_mean_loss(sizes: list[int], seed: int) -> None:
    top = make_model(seed=seed).top
    frozen = copy.deepcopy(top)
    features = [torch.randn(size, FEATURES) for size in sizes]
    labels = [torch.randint(CLASSES, (size,)) for size in sizes]
    gradients = top_step(top, features, labels, 0.5).gradients
    for own, targets, gradient in zip(features, labels, gradients, strict=True):
        alone = own.clone().requires_grad_()
        functional.cross_entropy(frozen(alone), targets).backward()  # type: ignore[no-untyped-call]
        assert alone.grad is not None
        assert torch.allclose(gradient, alone.grad, atol=1e-6)


def test_dispatch_scales_each_slice_to_its_own_mean() -> None:
    one, two = dispatch(torch.ones(3, 1), [1, 2])
    assert one.tolist() == [[3.0]]
    assert two.tolist() == [[1.5], [1.5]]


def centralised_step(model: SplitModel, inputs: torch.Tensor, labels: torch.Tensor, rate: float) -> None:
    functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
    descend(model, rate)


def test_one_worker_is_centralised_sgd_step_for_step(tmp_path: Path) -> None:
    strategy = train(tmp_path, rounds=2, devices=1, min_workers=1, tau=5, fill=False, scale="none")
    model, config = make_model(), strategy.config
    inputs, labels = make_data(0)
    for server_round in (1, 2):
        for step in range(5):
            chosen = batch_indices(Turn(3, server_round, "device-0"), step, 6, 20)
            centralised_step(model, inputs[chosen], labels[chosen], config.learning_rate_at(server_round))
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, strategy.model.state_dict()[name], atol=1e-6), name


def test_two_workers_and_one_iteration_are_centralised_sgd_on_the_concatenated_batch() -> None:
    model, rate, sizes = make_model().double(), 0.3, [2, 5]
    reference = copy.deepcopy(model)
    inputs = [torch.randn(size, 4, dtype=torch.float64) for size in sizes]
    labels = [torch.randint(CLASSES, (size,)) for size in sizes]
    bottoms = [copy.deepcopy(model.bottom) for _ in sizes]
    features = [bottom(own) for bottom, own in zip(bottoms, inputs, strict=True)]
    step = top_step(model.top, [f.detach() for f in features], labels, rate)
    for bottom, own, gradient in zip(bottoms, features, step.gradients, strict=True):
        bottom_step(bottom, own, gradient, rate)
    model.bottom.load_state_dict(aggregate([bottom.state_dict() for bottom in bottoms], [float(s) for s in sizes]))
    centralised_step(reference, torch.cat(inputs), torch.cat(labels), rate)
    for name, weight in reference.state_dict().items():
        assert torch.allclose(weight, model.state_dict()[name], atol=1e-12), name


def test_repeated_forward_has_the_bits_of_the_first_one() -> None:
    turn, inputs = Turn(1, 2, "x"), torch.randn(6, 4)
    bottom = make_model(rich=True).bottom
    first = forward(bottom, inputs, turn, 4)
    after = {name: value.clone() for name, value in bottom.state_dict().items()}
    again = repeat_forward(bottom, inputs, turn, 4)
    assert torch.equal(first, again)
    assert same_bits(after, bottom.state_dict())
    assert not torch.equal(first, forward(bottom, inputs, turn, 5))  # other dropout masks


@pytest.mark.parametrize("rich", [False, True])
def test_a_client_that_forgets_everything_trains_to_the_same_bits(tmp_path: Path, rich: bool) -> None:
    remembers = train(tmp_path / "a", rich=rich)
    forgets = train(tmp_path / "b", rich=rich, keep_live=0)
    assert same_bits(remembers.model.state_dict(), forgets.model.state_dict())
    assert remembers.snapshot()[1] == forgets.snapshot()[1]


def test_running_statistics_are_averaged_and_counters_stay_integers(tmp_path: Path) -> None:
    norms = [nn.BatchNorm1d(2) for _ in range(2)]
    for index, norm in enumerate(norms):
        norm(torch.full((4, 2), 10.0 * index) + torch.arange(8.0).view(4, 2))
    mean = aggregate([norm.state_dict() for norm in norms], [1.0, 3.0])
    one, two = (norm.state_dict()["running_mean"] for norm in norms)
    expected = 0.25 * one + 0.75 * two
    assert torch.allclose(mean["running_mean"], expected)
    assert mean["num_batches_tracked"].dtype == torch.int64
    assert mean["num_batches_tracked"] == 1
    state = train(tmp_path, rich=True).model.bottom.state_dict()
    assert state["1.num_batches_tracked"].item() == 6  # 2 rounds of 3 iterations


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)))
def test_order_of_arrival_never_changes_the_aggregate(order: list[int]) -> None:
    from flwr.app import Message

    from fl_edge.link.content import make_content
    from fl_edge.link.local import LocalGrid
    from tests.tiny import make_app

    strategies = [make_strategy(selection="all") for _ in range(2)]
    summed: list[list[float]] = []

    def watched(states: list[dict[str, torch.Tensor]], weights: list[float]) -> dict[str, torch.Tensor]:
        summed.append([float(state["0.bias"][0]) for state in states])
        return aggregate(states, weights)

    for strategy, arrival in zip(strategies, (range(4), order), strict=True):
        grid = LocalGrid(make_app(Path("/nonexistent")), 4)
        begun = strategy.configure_train(1, None, None, grid)  # type: ignore[arg-type]
        replies = []
        for index in arrival:
            weights = make_model(seed=index).bottom.state_dict()
            content = make_content({"compute_s": 0.1 * index + 0.1, "transfer_s": 0.1}, weights)
            replies.append(Message(content, reply_to=begun[index]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fl_edge.strategies.mergesfl.aggregate", watched)
            strategy.aggregate_train(1, replies)
    assert summed[0] == summed[1]  # float sums depend on their order
    assert same_bits(*(strategy.model.state_dict() for strategy in strategies))
    assert strategies[0].snapshot()[1] == strategies[1].snapshot()[1]


@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(0, 30))),
)
def test_batches_are_distinct_samples_and_an_epoch_uses_each_at_most_once(case: tuple[int, int, int]) -> None:
    samples, size, step = case
    turn = Turn(5, 1, "device")
    batch = batch_indices(turn, step, size, samples)
    assert len(set(batch.tolist())) == size
    assert 0 <= batch.min() <= batch.max() < samples
    assert torch.equal(batch, batch_indices(turn, step, size, samples))
    per_epoch = samples // size
    epoch = [batch_indices(turn, step // per_epoch * per_epoch + k, size, samples) for k in range(per_epoch)]
    assert len(set(torch.cat(epoch).tolist())) == per_epoch * size


def test_counted_bytes_are_those_of_the_formula(tmp_path: Path) -> None:
    strategy = make_strategy()
    reports: list[RoundReport] = []
    strategy.observers.append(reports.append)
    from fl_edge.link.local import LocalGrid
    from tests.tiny import make_app

    strategy.start(LocalGrid(make_app(tmp_path), 4), num_rounds=3)
    parameters = sum(weight.numel() for weight in strategy.model.bottom.state_dict().values())
    for report in reports:
        formula = round_bytes(parameters, strategy.config.tau, report.batch_sizes, 4 * FEATURES)
        assert report.up_bytes + report.down_bytes == formula
    assert strategy.state.traffic.total_bytes == sum(report.up_bytes + report.down_bytes for report in reports)


def test_released_variant_is_the_released_algorithm(tmp_path: Path) -> None:
    """A plain twin: random cohort, equal batches, merging, uniform mean, one learning rate for both halves."""
    settings = released(MergeSFLConfig(tau=3, batch_size=6, ingress_batches=2.0, min_workers=2))
    strategy = make_strategy(devices=5)
    strategy.config = settings
    from fl_edge.link.local import LocalGrid
    from tests.tiny import make_app

    reports: list[RoundReport] = []
    strategy.observers.append(reports.append)
    strategy.start(LocalGrid(make_app(tmp_path), 5), num_rounds=3)

    model, state = make_model(), ControlState()
    for index in range(5):
        state.meet(f"device-{index}", torch.bincount(make_data(index)[1], minlength=CLASSES).tolist(), 1.0, 1.0)
    names = [f"device-{index}" for index in range(5)]
    for server_round, report in enumerate(reports, 1):
        plan = make_plan(state.workers(names), settings, numpy_rng(3, "plan", server_round))
        cohort = [int(index) for index in plan.workers]
        assert report.devices == [names[index] for index in cohort]
        assert report.batch_sizes == [6] * len(cohort) == [6, 6]  # ingress of two full batches
        rate = 0.1 * 0.993 ** (server_round - 1)
        bottoms = [copy.deepcopy(model.bottom) for _ in cohort]
        for step in range(3):
            chosen = [batch_indices(Turn(3, server_round, names[i]), step, 6, 20) for i in cohort]
            features = [b(make_data(i)[0][rows]) for b, i, rows in zip(bottoms, cohort, chosen, strict=True)]
            merged = torch.cat([f.detach() for f in features]).requires_grad_()
            labels = torch.cat([make_data(i)[1][rows] for i, rows in zip(cohort, chosen, strict=True)])
            functional.cross_entropy(model.top(merged), labels).backward()  # type: ignore[no-untyped-call]
            assert merged.grad is not None
            for index, (bottom, own) in enumerate(zip(bottoms, features, strict=True)):
                own.backward(merged.grad[6 * index : 6 * index + 6] * 12 / 6)
                descend(bottom, rate)
            descend(model.top, rate)
        mean = {
            name: torch.stack([bottom.state_dict()[name] for bottom in bottoms]).mean(0)
            for name in model.bottom.state_dict()
        }
        model.bottom.load_state_dict(mean)
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, strategy.model.state_dict()[name], atol=1e-6), name


def test_learning_rate_decays_to_its_floor() -> None:
    config = MergeSFLConfig(learning_rate=0.1, lr_decay=0.5, lr_floor=0.02)
    rates = [config.learning_rate_at(server_round) for server_round in range(1, 6)]
    assert rates[:3] == pytest.approx([0.1, 0.05, 0.025])
    assert rates[3:] == [0.02, 0.02]
    assert all(one >= two for one, two in pairwise(rates))


GOOD = {"features": torch.zeros(2, 5), "labels": torch.tensor([0, 2], dtype=torch.int16)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"features": torch.zeros(3, 5)}, "features of shape \\(3, 5\\)"),
        ({"features": torch.zeros(2, 5, dtype=torch.float64)}, "float64"),
        ({"features": torch.full((2, 5), float("nan"))}, "not all finite"),
        ({"features": torch.full((2, 5), float("inf"))}, "not all finite"),
        ({"labels": torch.tensor([0, 3], dtype=torch.int16)}, "outside 0 to 2"),
        ({"labels": torch.tensor([-1, 0], dtype=torch.int16)}, "outside 0 to 2"),
        ({"labels": torch.tensor([1], dtype=torch.int16)}, "labels of shape \\(1,\\)"),
    ],
)
def test_a_batch_that_must_not_be_applied_is_refused(change: dict[str, torch.Tensor], complaint: str) -> None:
    checked_batch(GOOD, 2, (5,), 3)
    with pytest.raises(ReplyError, match=complaint):
        checked_batch({**GOOD, **change}, 2, (5,), 3)
    with pytest.raises(ReplyError, match="no tensor labels"):
        checked_batch({"features": GOOD["features"]}, 2, (5,), 3)


def test_weights_that_must_not_be_applied_are_refused() -> None:
    own = make_model(rich=True).bottom.state_dict()
    assert same_bits(checked_weights(own, own), own)
    with pytest.raises(ReplyError, match="not all finite"):
        checked_weights({**own, "0.weight": own["0.weight"] * float("nan")}, own)
    with pytest.raises(ReplyError, match="no tensor"):
        checked_weights({}, own)
