"""Passes of a text over the dense model that say what each layer matters, before anything is pruned."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.similarity import Similarity
from fl_edge.comp.watching import watched
from fl_edge.pruning import members

NONE = -1  # in place of a layer: no other layer is left out
_CHUNK_TOKENS = 1024  # that go through a layer at once


@dataclass(frozen=True)
class Loss:
    """Negative log-likelihood of a text, nats, and of how many tokens; those of two texts add up."""

    tokens: int
    total: float

    def __add__(self, other: Loss) -> Loss:
        """Return the loss of both texts."""
        return Loss(self.tokens + other.tokens, self.total + other.total)

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.total / max(self.tokens, 1)


def similarities(checkpoint: Checkpoint, tokens: Tensor, removed: Collection[int]) -> dict[int, Similarity]:
    """Return how similar each layer's input and output are in the model without some layers; one pass.

    Parameters
    ----------
    checkpoint
        The dense model.
    tokens
        (s, n) int64: sequences of full length.
    removed
        Layers that are left out.
    """
    hidden, found = checkpoint.embed(tokens), dict[int, Similarity]()
    leaving_attention = {m.layer: m.path for m in members(checkpoint.skeleton) if (m.unit, m.axis) == ("heads", 1)}
    for layer in range(checkpoint.num_layers):
        if layer in removed:
            continue
        checkpoint.load(layer)
        for rows in chunks(tokens):
            entering = hidden[rows]
            linear: nn.Linear = checkpoint.skeleton.get_submodule(leaving_attention[layer])
            with watched(linear, entering) as attention:
                leaving = checkpoint.run(layer, entering)
            part = Similarity.of(entering, entering + attention.outputs, leaving)
            found[layer] = found[layer] + part if layer in found else part
            hidden[rows] = leaving
        checkpoint.release(layer)
    return found


def skipped_losses(
    checkpoint: Checkpoint, tokens: Tensor, removed: Collection[int], candidates: Iterable[int]
) -> dict[int, Loss]:
    """Return the loss of the model without some layers, and in turn without each of the candidates too; one pass.

    All variants go through a layer together, so weights are read once; their hidden states are in memory together.

    Parameters
    ----------
    candidates
        Layers to leave out one at a time. Others as for :func:`similarities`.

    Returns
    -------
    dict
        Loss by the candidate that is left out, and under ``NONE`` with all of them in.
    """
    common = checkpoint.embed(tokens)
    variants = {NONE: common}
    waiting = sorted(set(candidates) - set(removed))
    for layer in range(checkpoint.num_layers):
        if layer in removed:
            continue
        if layer in waiting:
            variants[layer] = common.clone()
        checkpoint.load(layer)
        for skipped, hidden in variants.items():
            if skipped != layer:
                for rows in chunks(tokens):
                    hidden[rows] = checkpoint.run(layer, hidden[rows])
        checkpoint.release(layer)
    return {layer: loss(checkpoint, hidden, tokens) for layer, hidden in variants.items()}


def loss(checkpoint: Checkpoint, hidden: Tensor, tokens: Tensor) -> Loss:
    """Return the loss of a text whose hidden states (s, n, d) have passed the last layer."""
    found = checkpoint.nll(hidden, tokens)
    return Loss(found.numel(), float(found.sum(dtype=torch.float64)))


def chunks(tokens: Tensor) -> list[slice]:
    """Return the sequences (rows) that go through a layer at once, so that activations stay small."""
    step = max(_CHUNK_TOKENS // tokens.shape[1], 1)
    return [slice(start, start + step) for start in range(0, len(tokens), step)]
