"""Drafting on the device: input submodel and adapter stand in for the whole model, for one or several drafts at once.

That the device drafts with its own layers and an adapter until it is unsure, and drafts on from its likeliest guesses
while the cloud verifies, is HAT's. That the last, unsure token is still verified is Kangaroo's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from fl_edge.errors import ConfigError
from fl_edge.hat.caches import crop, fork, keep_branch
from fl_edge.hat.sampling import Sampler


class Shallow(Protocol):
    """What drafting needs of a device's part of the model: :class:`fl_edge.hat.split.DeviceModel`."""

    def embed_and_run(self, tokens: Tensor, cache: DynamicCache) -> Tensor:
        """Return the states (b, n, d) after the input submodel of tokens (b, n), behind those in the cache."""

    def draft_head(self, features: Tensor) -> Tensor:
        """Return logits (..., v) of features (..., d) that are normed already."""

    def new_cache(self) -> DynamicCache:
        """Return an empty cache."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""


class Adapted(Protocol):
    """What drafting needs of an adapter: :class:`fl_edge.hat.adapter.Adapter`."""

    def __call__(self, states: Tensor, cache: DynamicCache) -> Tensor:
        """Return features (b, n, d) of shallow states (b, n, d), behind those in the cache."""

    def new_cache(self) -> DynamicCache:
        """Return an empty cache."""


@dataclass(frozen=True, eq=False)
class Proposal:
    """What is sent to be verified: the newest token and the drafts after it.

    Attributes
    ----------
    tokens, rows
        n tokens and their shallow states (n, d).
    """

    tokens: Sequence[int]
    rows: Tensor


@dataclass(eq=False)
class Branches:
    """Drafts that grow side by side from k first tokens; ``k = 1`` is plain drafting.

    Attributes
    ----------
    tokens
        Of each branch; the newest may still lack its shallow state.
    rows
        Shallow states so far, (k, d) a step.
    final
        Whether the newest token of a branch is its last.
    shallow, adapted
        Caches with k rows.
    """

    tokens: list[list[int]]
    shallow: DynamicCache
    adapted: DynamicCache
    rows: list[Tensor] = field(default_factory=list)
    final: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.final = [False] * len(self.tokens)

    def follow(self, token: int) -> int | None:
        """Return the branch that begins with a token, if any."""
        return next((branch for branch, tokens in enumerate(self.tokens) if tokens[0] == token), None)

    @property
    def done(self) -> bool:
        """Whether every branch is whole: ended, and all its tokens have their state."""
        return all(self.final) and all(len(tokens) <= len(self.rows) for tokens in self.tokens)


class Drafter:
    """The device's text so far, as caches, and its drafts.

    Parameters
    ----------
    model, adapter
        Without an adapter nothing is drafted.
    sampler
        That of the generation.
    threshold
        eta: a draft ends with the first token of which the adapter is less sure.
    """

    def __init__(self, model: Shallow, adapter: Adapted | None, sampler: Sampler, threshold: float) -> None:
        self._model, self._adapter, self._sampler, self._threshold = model, adapter, sampler, threshold
        self._shallow = model.new_cache()
        self._adapted = adapter.new_cache() if adapter else model.new_cache()
        self._behind: list[Tensor] = []  # states (n, d) that the adapter has not seen yet, in order

    def __len__(self) -> int:
        """Return how many tokens have their shallow state."""
        return _length(self._shallow)

    def read(self, tokens: Tensor) -> Tensor:
        """Take in a piece of the prompt (n,) and return its shallow states (n, d)."""
        states = self._model.embed_and_run(tokens[None], self._shallow)[0]
        self._remember(states)
        return states

    def begin(self, firsts: Sequence[int]) -> Branches:
        """Start drafts with the given first tokens, which follow all that was read or held."""
        if len(firsts) == 1:
            return Branches([[firsts[0]]], self._shallow, self._adapted)
        count = len(firsts)
        return Branches([[first] for first in firsts], fork(self._shallow, count), fork(self._adapted, count))

    @torch.no_grad()
    def step(self, branches: Branches, most: int) -> None:
        """Compute the states of the newest tokens, then draft one more where a branch goes on.

        Parameters
        ----------
        branches
            Not done yet.
        most
            Drafts after the first token of a branch, at most.
        """
        at = len(branches.rows)
        newest = [tokens[min(at, len(tokens) - 1)] for tokens in branches.tokens]  # what is whole runs along
        states = self._model.embed_and_run(self._tokens(newest)[:, None], branches.shallow)
        branches.rows.append(states[:, 0])
        if self._adapter is None or at >= most:
            branches.final = [True] * len(newest)
            return
        if all(branches.final):
            return
        behind = [] if len(newest) > 1 else [rows[None] for rows in self._behind]  # several have caught up
        features = self._adapter(torch.cat([*behind, states], 1), branches.adapted)[:, -1]
        self._behind = []
        logits = self._model.draft_head(features)
        following = self._sampler.choose(logits, [_length(branches.shallow)] * len(newest))
        sure = (self._sampler.confidence(logits) >= self._threshold).tolist()
        for branch, tokens in enumerate(branches.tokens):
            if not branches.final[branch]:
                tokens.append(following[branch])
                branches.final[branch] = at + 1 >= most or not sure[branch]

    def take(self, branches: Branches, branch: int) -> Proposal:
        """Make one branch the device's own, as far as its states go, and return it."""
        start = _length(branches.shallow) - len(branches.rows)
        tokens = branches.tokens[branch][: len(branches.rows)]
        rows = torch.stack([step[branch] for step in branches.rows[: len(tokens)]])
        if len(branches.tokens) > 1:
            self._shallow = keep_branch(branches.shallow, branch)
            self._adapted = keep_branch(branches.adapted, branch)
        seen = min(_length(self._adapted), start + len(tokens) - 1)  # never the newest: there must be one to guess from
        crop(self._adapted, seen)
        crop(self._shallow, start + len(tokens))
        self._remember(rows[max(seen - start, 0) :])
        return Proposal(tokens, rows)

    def hold(self, count: int) -> None:
        """Forget all but the first ``count`` tokens."""
        crop(self._shallow, count)
        crop(self._adapted, min(_length(self._adapted), count))
        if self._behind:
            self._behind = [torch.cat(self._behind)[: count - _length(self._adapted)]]

    @torch.no_grad()
    def catch_up(self) -> Tensor | None:
        """Let the adapter see what is new to it; return its features (1, d) of the newest token."""
        if self._adapter is None or not self._behind:
            return None
        features = self._adapter(torch.cat(self._behind)[None], self._adapted)[:, -1]
        self._behind = []
        return features

    def guess(self, count: int) -> list[int]:
        """Return the likeliest next tokens after what was read or taken last, the likeliest first."""
        features = self.catch_up()
        if features is None:
            raise ConfigError("without an adapter there are no guesses; allowed: guesses=0")
        scores = self._sampler.scores(self._model.draft_head(features), [len(self)])[0]
        found: list[int] = scores.topk(count).indices.tolist()
        return found

    def _remember(self, states: Tensor) -> None:
        if self._adapter:
            self._behind.append(states)

    def _tokens(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, device=self._model.device)


def _length(cache: DynamicCache) -> int:
    found: int = cache.get_seq_length()
    return found
