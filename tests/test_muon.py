"""Muon in float32 takes the steps of torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fl_edge.models.muon import Muon, orthogonal
from fl_edge.seeding import torch_rng


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    """Up to the digits that bfloat16 leaves torch's."""
    generator = torch_rng(0, "muon", *shape)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steps = Muon([ours], lr=0.1, weight_decay=0.2), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2)
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for step in steps:
            step.step()
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)
    assert not torch.allclose(ours, start, atol=0.1)


def test_what_has_no_gradient_stays() -> None:
    still = nn.Parameter(torch.ones(2, 2))
    Muon([still], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(2, 2))


def test_singular_values_come_near_one_and_vectors_stay() -> None:
    matrix = torch.diag(torch.tensor([100.0, 10.0, 1.0]))
    found = orthogonal(matrix)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.diagonal(), torch.ones(3), atol=0.5, rtol=0)
    assert torch.equal(found, torch.diag(found.diagonal()))


def test_a_gradient_of_nothing_moves_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 3)), torch.zeros(2, 3))
