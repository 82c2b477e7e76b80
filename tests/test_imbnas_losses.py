"""Class weights and losses, each against a second way to write it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fl_edge.errors import ConfigError, DataError
from fl_edge.imbnas.config import LOSSES, LossConfig
from fl_edge.imbnas.losses import NormedLinear, ldam_margins, make_head, make_loss
from fl_edge.imbnas.weighting import beta_at, effective_weights

CONFIG = LossConfig()
COUNTS = torch.tensor([5000, 300, 40, 5, 1])
some_counts = st.lists(st.integers(0, 5000), min_size=2, max_size=30).filter(any)


def batch(seed: int = 0, size: int = 64, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, classes, generator=generator, dtype=torch.float64) / 3
    return logits.requires_grad_(), torch.randint(classes, (size,), generator=generator)


def exact_weights(counts: list[int], beta: Fraction) -> list[float]:
    """The effective number as the sum 1 + beta + beta^2 + ..., in fractions."""
    inverse = [1 / sum((beta**k for k in range(n)), Fraction()) if n else Fraction() for n in counts]
    return [float(len(counts) * value / sum(inverse)) for value in inverse]


@pytest.mark.parametrize("beta", [Fraction(0), Fraction(1, 2), Fraction(9, 10), Fraction(99, 100), Fraction(1)])
def test_weights_are_those_of_the_effective_number(beta: Fraction) -> None:
    counts = [30, 12, 3, 1, 0]
    weights = effective_weights(torch.tensor(counts), float(beta))
    np.testing.assert_allclose(weights.numpy(), exact_weights(counts, beta), rtol=1e-12)


@settings(deadline=None)
@given(counts=some_counts, beta=st.sampled_from([0.0, 0.9, 0.999, 0.9999, 1.0]))
def test_weights_sum_to_the_number_of_classes(counts: list[int], beta: float) -> None:
    weights = effective_weights(torch.tensor(counts), beta)
    assert float(weights.sum()) == pytest.approx(len(counts))
    assert torch.equal(weights > 0, torch.tensor(counts) > 0)


def test_weights_are_one_for_balanced_counts_and_rise_as_classes_shrink() -> None:
    torch.testing.assert_close(effective_weights(torch.full((7,), 450), 0.9999), torch.ones(7, dtype=torch.float64))
    rising = effective_weights(torch.arange(5000, 0, -1), 0.9999)
    assert (rising[1:] > rising[:-1]).all()


def test_counts_without_any_sample_have_no_weights() -> None:
    with pytest.raises(DataError, match="none of 3 classes has samples"):
        effective_weights(torch.zeros(3), 0.9)


@pytest.mark.parametrize(("epochs", "start", "first"), [(200, 0.8, 160), (30, 0.8, 24), (10, 0.75, 8), (9, 0.0, 0)])
def test_drw_switches_at_the_right_epoch(epochs: int, start: float, first: int) -> None:
    config = LossConfig(drw_start=start)
    logits, labels = batch()
    logits = logits.detach()
    drw, plain, weighted = (make_loss(name, COUNTS, config) for name in ("drw", "ce", "cb"))
    assert abs(float(plain(logits, labels, 0.0) - weighted(logits, labels, 0.0))) > 0.01
    for epoch in range(epochs):
        progress = epoch / epochs
        expected = weighted if epoch >= first else plain
        assert float(drw(logits, labels, progress)) == float(expected(logits, labels, progress))
        assert beta_at(progress, config) == (config.beta if epoch >= first else 0)


def reference(name: str, logits: Tensor, labels: Tensor, progress: float) -> Tensor:
    """Every loss written out sample by sample."""
    weights = effective_weights(COUNTS, CONFIG.beta)
    total, norm = torch.zeros((), dtype=torch.float64), 0.0
    largest = max(n**-0.25 for n in COUNTS.tolist())
    for row, y in zip(logits, labels.tolist(), strict=True):
        z, weight, factor = list(row), 1.0, 1.0
        if name == "balanced_softmax":
            p = COUNTS[y] * z[y].exp() / sum(n * v.exp() for n, v in zip(COUNTS.tolist(), z, strict=True))
        else:
            if name.startswith("ldam"):
                z[y] = z[y] - CONFIG.margin * int(COUNTS[y]) ** -0.25 / largest
                z = [CONFIG.scale * v for v in z]
            p = z[y].exp() / sum(v.exp() for v in z)
        if name == "cb" or (name in ("drw", "ldam_drw") and progress >= 0.8):
            weight = float(weights[y])
        if name == "focal":
            factor = (1 - p) ** CONFIG.gamma
        total, norm = total - weight * factor * p.log(), norm + weight
    return total / norm


@pytest.mark.parametrize("progress", [0.0, 0.79, 0.8])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_their_definitions(name: str, progress: float) -> None:
    logits, labels = batch(3, 24)
    found, expected = (
        make_loss(name, COUNTS, CONFIG)(logits, labels, progress),
        reference(name, logits, labels, progress),
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_weighted_losses_are_torchs_weighted_mean() -> None:
    logits, labels = batch()
    weights = effective_weights(COUNTS, CONFIG.beta)
    expected = functional.cross_entropy(logits, labels, weight=weights)
    torch.testing.assert_close(make_loss("cb", COUNTS, CONFIG)(logits, labels, 0.0), expected, rtol=1e-6, atol=0)


def test_balanced_softmax_rests_where_all_classes_are_equally_likely() -> None:
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([70, 20, 10]))
    logits = torch.zeros(100, 3, requires_grad=True)
    loss = make_loss("balanced_softmax", torch.tensor([70, 20, 10]), CONFIG)(logits, labels, 0.5)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0].sum(0), torch.zeros(3), rtol=0, atol=1e-6)


def test_margins_grow_as_classes_shrink() -> None:
    assert ldam_margins(torch.tensor([16, 1, 0]), 0.5).tolist() == [0.25, 0.5, 0.0]


@settings(max_examples=40, deadline=None)
@given(counts=some_counts, name=st.sampled_from(LOSSES), seed=st.integers(0, 100), progress=st.sampled_from([0.0, 0.9]))
def test_absent_classes_and_single_samples_make_no_nan(
    counts: list[int], name: str, seed: int, progress: float
) -> None:
    """Labels of absent classes, too: another device's count may be wrong."""
    logits, labels = batch(seed, 16, len(counts))
    loss = make_loss(name, torch.tensor(counts), CONFIG)(logits, labels, progress)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_a_batch_of_classes_without_weight_costs_nothing() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = make_loss("cb", torch.tensor([5, 0, 2]), CONFIG)(logits, torch.ones(4, dtype=torch.int64), 0.0)
    assert loss.item() == 0


def test_sure_answers_keep_the_focal_loss_finite() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = make_loss("focal", torch.tensor([1, 1]), LossConfig(gamma=0.5))(logits, torch.tensor([0]), 0.0)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_heads_fit_their_losses_and_come_from_their_generator() -> None:
    before = torch.get_rng_state()
    for name, kind in (("ldam_drw", NormedLinear), ("drw", torch.nn.Linear)):
        first, again = (make_head(name, 8, 5, torch.Generator().manual_seed(1)) for _ in range(2))
        other = make_head(name, 8, 5, torch.Generator().manual_seed(2))
        assert type(first) is kind
        assert torch.equal(first.weight, again.weight)
        assert not torch.equal(first.weight, other.weight)
    assert torch.equal(before, torch.get_rng_state())


def test_the_normed_head_gives_cosines() -> None:
    head = make_head("ldam", 8, 5, torch.Generator().manual_seed(1))
    features = 100 * torch.randn(7, 8, generator=torch.Generator().manual_seed(2))
    expected = torch.stack([functional.cosine_similarity(features, row[None]) for row in head.weight], 1)
    torch.testing.assert_close(head(features), expected)
    assert torch.isfinite(head(torch.zeros(1, 8))).all()


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(ConfigError, match="loss=hinge is not allowed; it must be one of ce, drw, cb"):
        make_loss("hinge", COUNTS, CONFIG)
