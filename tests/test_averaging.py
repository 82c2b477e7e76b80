"""Weights of devices are checked before they are averaged, and averaged by samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.models.averaging import check_weights, weighted_mean


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({}, "weights of 0 tensors; the 1 of a were due"),
        ({"a": torch.zeros(3)}, r"a is torch.float32 of shape \(3,\); due is torch.float32 of \(2,\)"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "a is torch.int64"),
        ({"a": torch.tensor([1.0, float("nan")])}, "a is not all finite numbers"),
    ],
)
def test_weights_of_another_kind_are_refused(weights: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(ReplyError, match=reason):
        check_weights(weights, {"a": torch.zeros(2)})


def test_the_mean_counts_samples_and_keeps_the_type() -> None:
    found = weighted_mean([(2, {"a": torch.tensor([1.0])}), (1, {"a": torch.tensor([4.0])})])
    assert found["a"].tolist() == [2.0]
    assert weighted_mean([(1, {"a": torch.ones(1, dtype=torch.float16)})])["a"].dtype == torch.float16


def test_the_mean_of_small_weights_loses_no_digits() -> None:
    """Summed in float64: in float32 the small one would be gone."""
    parts = [(1, {"a": torch.tensor([1e8])}), (1, {"a": torch.tensor([1.0])}), (1, {"a": torch.tensor([-1e8])})]
    assert weighted_mean(parts)["a"].item() == pytest.approx(1 / 3, rel=1e-6)
