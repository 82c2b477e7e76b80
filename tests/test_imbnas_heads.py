"""A candidate's own head, against scikit-learn's regression and against the losses that training uses."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fl_edge.errors import ConfigError, TrainingError
from fl_edge.imbnas import heads
from fl_edge.imbnas.config import HeadConfig, LossConfig
from fl_edge.imbnas.heads import CONVEX, fit_head, gram_sums, loss_sums, make_objective
from fl_edge.imbnas.losses import make_loss

COUNTS = [60, 30, 12, 5]
EXACT = HeadConfig(ridge=1e-2, iterations=2000, tolerance=1e-10)


def clouds(counts: list[int], seed: int = 0, features: int = 6) -> tuple[Tensor, Tensor]:
    """Return overlapping Gaussian clouds, one a class, with channels of very unequal scale."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(counts), features))
    labels = np.repeat(np.arange(len(counts)), counts)
    points = (centres[labels] + rng.normal(size=(len(labels), features))) * 10.0 ** rng.uniform(-2, 2, features)
    return torch.from_numpy(points + 3).float(), torch.from_numpy(labels)


def standardised(features: Tensor) -> np.ndarray:
    exact = features.double().numpy()
    return np.hstack([(exact - exact.mean(0)) / exact.std(0), np.ones((len(exact), 1))])


@pytest.mark.parametrize("loss", ["ce", "cb", "drw"])
def test_the_optimum_is_that_of_another_solver(loss: str) -> None:
    features, labels = clouds(COUNTS)
    objective = make_objective(loss, torch.tensor(COUNTS), LossConfig())
    head = fit_head(features, labels, objective, EXACT)
    reference = LogisticRegression(
        C=1 / (EXACT.ridge * objective.total), fit_intercept=False, tol=1e-12, max_iter=5000
    ).fit(standardised(features), labels, sample_weight=objective.weights[labels].numpy())
    expected = reference.predict_proba(standardised(features))
    found = torch.softmax(head(features).double(), 1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(("loss", "progress"), [("ce", 0.0), ("cb", 0.0), ("drw", 0.9), ("balanced_softmax", 0.0)])
def test_at_the_optimum_the_training_loss_is_level(loss: str, progress: float) -> None:
    features, labels = clouds(COUNTS, seed=1)
    counts = torch.tensor(COUNTS)
    head = fit_head(features, labels, make_objective(loss, counts, LossConfig()), EXACT)
    inputs = torch.from_numpy(standardised(features))
    mean, std = features.double().mean(0), features.double().std(0, correction=0)
    weight = head.weight.double()
    point = torch.cat([weight * std, (head.bias.double() + weight @ mean)[:, None]], dim=1).requires_grad_()
    value = make_loss(loss, counts, LossConfig())(inputs @ point.T, labels, progress)
    (gradient,) = torch.autograd.grad(value + EXACT.ridge / 2 * point.square().sum(), point)
    assert float(gradient.abs().max()) < 1e-5


@given(cuts=st.lists(st.integers(0, 107), max_size=4), loss=st.sampled_from(CONVEX))
@settings(max_examples=30, deadline=None)
def test_loss_and_gradient_add_up_over_devices(cuts: list[int], loss: str) -> None:
    features, labels = clouds(COUNTS)
    inputs = heads.standardised(features.double(), features.double().mean(0), features.double().std(0))
    objective = make_objective(loss, torch.tensor(COUNTS), LossConfig())
    point = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edges = [0, *sorted(cuts), len(labels)]
    parts = [loss_sums(point, inputs[a:b], labels[a:b], objective) for a, b in itertools.pairwise(edges)]
    whole = loss_sums(point, inputs, labels, objective)
    assert torch.equal(torch.stack([one for one, _ in parts]).sum(), whole[0])
    assert torch.equal(torch.stack([one for _, one in parts]).sum(0), whole[1])
    grams = [gram_sums(inputs[a:b], labels[a:b], objective) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.stack(grams).sum(0), gram_sums(inputs, labels, objective))


def test_a_head_does_not_depend_on_the_order_of_the_samples() -> None:
    """To the bit, which is what makes many devices and one machine find the same architecture."""
    features, labels = clouds([300, 100, 30, 5], features=16)
    objective = make_objective("balanced_softmax", torch.tensor([300, 100, 30, 5]), LossConfig())
    head = fit_head(features, labels, objective, HeadConfig())
    for seed in range(3):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        other = fit_head(features[order], labels[order], objective, HeadConfig())
        assert torch.equal(other.weight, head.weight)
        assert torch.equal(other.bias, head.bias)


def test_scale_and_place_of_the_features_do_not_matter() -> None:
    features, labels = clouds(COUNTS)
    objective = make_objective("balanced_softmax", torch.tensor(COUNTS), LossConfig())
    moved = (features - 3) * torch.tensor([1e-3, 5.0, 40.0, 1.0, 0.1, 7.0]) + torch.tensor([0.0, 1, 2, 3, 4, 5])
    one, two = fit_head(features, labels, objective, EXACT), fit_head(moved, labels, objective, EXACT)
    torch.testing.assert_close(one(features).softmax(1), two(moved).softmax(1), atol=2e-3, rtol=0)


@pytest.mark.parametrize("loss", CONVEX)
def test_a_class_of_one_or_no_sample_and_a_dead_channel(loss: str) -> None:
    features, labels = clouds([40, 20, 0, 1, 0])
    features = torch.cat([features, torch.zeros(len(labels), 1)], dim=1)
    head = fit_head(features, labels, make_objective(loss, torch.tensor([40, 20, 0, 1, 0]), LossConfig()), HeadConfig())
    assert all(bool(torch.isfinite(value).all()) for value in head.parameters())
    scores = head(features)
    predicted = scores.argmax(1)
    assert set(predicted.tolist()) <= {0, 1, 3}
    assert float(scores[:, [2, 4]].mean()) < float(scores[:, [0, 1, 3]].mean()) - 1  # not where chance left them
    assert float((predicted == labels).float().mean()) > 0.8
    single = fit_head(features[:1], labels[:1], make_objective(loss, torch.tensor([1, 0]), LossConfig()), HeadConfig())
    assert int(single(features[:1]).argmax()) == 0


@pytest.mark.parametrize("loss", ["cb", "balanced_softmax"])
def test_rare_classes_are_found_more_often(loss: str) -> None:
    counts = [400, 100, 25, 6]
    features, labels = clouds(counts, seed=2, features=3)
    rare = clouds([200] * 4, seed=2, features=3)  # the same centres
    scores = {}
    for name in ("ce", loss):
        head = fit_head(features, labels, make_objective(name, torch.tensor(counts), LossConfig()), HeadConfig())
        scores[name] = float((head(rare[0]).argmax(1) == rare[1])[rare[1] == 3].float().mean())
    assert scores[loss] > scores["ce"] + 0.1


def test_what_cannot_be_fitted_is_one_line() -> None:
    with pytest.raises(ConfigError, match="loss=ldam is not allowed for own heads; it must be one of ce, cb, drw"):
        make_objective("ldam", torch.tensor(COUNTS), LossConfig())
    features, labels = clouds(COUNTS)
    features[3, 2] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        fit_head(features, labels, make_objective("ce", torch.tensor(COUNTS), LossConfig()), HeadConfig())
