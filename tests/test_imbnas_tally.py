"""Right answers by class: sums, class means, groups."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_matrix
from torch import Tensor

from fl_edge.errors import DataError
from fl_edge.imbnas.config import TailConfig
from fl_edge.imbnas.tally import Tally, confusion_matrix, group_accuracies, groups

answers = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=80)


def tensors(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    found = torch.tensor(pairs)
    return found[:, 0], found[:, 1]


@settings(deadline=None)
@given(pairs=answers)
def test_accuracies_agree_with_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predictions, labels = tensors([*pairs, *((0, label) for label in range(5))])  # every class has a sample
    tally = Tally.of(predictions, labels, 5)
    assert tally.accuracy == pytest.approx(accuracy_score(labels, predictions))
    assert tally.balanced == pytest.approx(balanced_accuracy_score(labels, predictions))
    matrix = confusion_matrix(predictions, labels, 5)
    assert matrix.tolist() == sklearn_matrix(labels, predictions, labels=range(5)).tolist()


@settings(deadline=None)
@given(pairs=answers, cuts=st.lists(st.integers(0, 80), max_size=4), seed=st.integers(0, 99))
def test_tallies_of_shards_add_up_in_any_order(pairs: list[tuple[int, int]], cuts: list[int], seed: int) -> None:
    predictions, labels = tensors(pairs)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    shards = torch.tensor_split(order, sorted(cuts))
    pooled = sum((Tally.of(predictions[s], labels[s], 5) for s in shards), Tally.empty(5))
    whole = Tally.of(predictions, labels, 5)
    assert torch.equal(pooled.correct, whole.correct)
    assert torch.equal(pooled.total, whole.total)
    assert pooled.balanced == whole.balanced
    matrix = sum((confusion_matrix(predictions[s], labels[s], 5) for s in shards), torch.zeros(5, 5, dtype=torch.int64))
    assert torch.equal(Tally.from_confusion(matrix).correct, whole.correct)
    assert torch.equal(Tally.from_confusion(matrix).total, whole.total)


@settings(deadline=None)
@given(
    rates=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 9)), min_size=2, max_size=6),
    copies=st.lists(st.integers(1, 500), min_size=6, max_size=6),
)
def test_class_mean_accuracy_ignores_how_often_a_class_occurs(rates: list[tuple[int, int]], copies: list[int]) -> None:
    correct, wrong = torch.tensor(rates).T
    factors = torch.tensor(copies[: len(rates)])
    once, often = Tally(correct, correct + wrong), Tally(correct * factors, (correct + wrong) * factors)
    assert often.balanced == once.balanced


def test_classes_without_samples_are_left_out() -> None:
    tally = Tally.of(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0]), 3)
    assert tally.balanced == pytest.approx(2 / 3)
    assert math.isnan(tally.per_class[1])
    for score in ("balanced", "accuracy"):
        with pytest.raises(DataError, match="none of 3 classes has samples to be scored on"):
            getattr(Tally.empty(3), score)


@settings(deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 80), max_size=4), size=st.integers(0, 80))
def test_expected_right_answers_add_up_to_the_bit_in_any_order(seed: int, cuts: list[int], size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = (4 * torch.randn(size, 5, generator=generator, dtype=torch.float64)).softmax(1)
    labels = torch.randint(5, (size,), generator=generator)
    shards = torch.tensor_split(torch.randperm(size, generator=generator), sorted(cuts))
    whole = Tally.expected(probabilities, labels)
    pooled = sum((Tally.expected(probabilities[s], labels[s]) for s in shards), Tally.empty(5))
    assert torch.equal(pooled.correct, whole.correct)
    assert torch.equal(pooled.total, whole.total)
    for label in range(5):
        own = probabilities[labels == label, label]
        assert float(whole.correct[label]) == pytest.approx(float(own.sum()), abs=1e-7)
        assert int(whole.total[label]) == len(own)


def test_expected_right_answers_of_who_is_sure_are_the_right_ones() -> None:
    labels, predictions = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, 1])
    sure = torch.nn.functional.one_hot(predictions, 3).double()
    expected, counted = Tally.expected(sure, labels), Tally.of(predictions, labels, 3)
    assert expected.correct.tolist() == counted.correct.tolist()
    assert expected.balanced == counted.balanced
    assert expected.accuracy == counted.accuracy == 0.5


def test_groups_at_their_bounds() -> None:
    found = groups(torch.tensor([101, 100, 20, 19, 0]))
    assert {name: classes.tolist() for name, classes in found.items()} == {
        "many": [0],
        "medium": [1, 2],
        "few": [3, 4],
    }


def test_group_accuracies() -> None:
    counts = torch.tensor([120, 90, 12, 3])
    tally = Tally(torch.tensor([9, 5, 1, 0]), torch.tensor([10, 10, 10, 30]))
    assert group_accuracies(tally, counts, TailConfig()) == pytest.approx({"many": 0.9, "medium": 0.5, "few": 0.05})
    scaled = TailConfig(group_scale=500)  # bounds of 24 and 4.8
    assert group_accuracies(tally, counts, scaled) == pytest.approx({"many": 0.7, "medium": 0.1, "few": 0.0})
    no_tail = Tally(torch.tensor([9, 5, 0, 0]), torch.tensor([10, 10, 0, 0]))
    assert group_accuracies(no_tail, counts, TailConfig()) == pytest.approx({"many": 0.9, "medium": 0.5})
