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

from fl_edge.hat.caches import crop, fork, keep_branch
from fl_edge.hat.pace import Pace
from fl_edge.hat.proposing import DevicePart, Proposal
from fl_edge.hat.sampling import Sampler


class Adapted(Protocol):
    """What drafting needs of an adapter: :class:`fl_edge.hat.adapter.Adapter`."""

    def __call__(self, states: Tensor, cache: DynamicCache, parents: Sequence[int] | None = None) -> Tensor:
        """Return features (b, n, d) of shallow states (b, n, d), behind those in the cache."""

    def new_cache(self) -> DynamicCache:
        """Return an empty cache."""


@dataclass(eq=False)
class Branches:
    """Drafts that grow side by side from k first tokens; ``k = 1`` is plain drafting.

    Attributes
    ----------
    tokens
        Of each branch; the newest may still lack its shallow state.
    rows
        Shallow states so far, (k, d) a step.
    sure
        How sure the adapter was of each draft of a branch, its first token not among them.
    most
        Drafts after the first token of a branch, at most.
    final
        Whether the newest token of a branch is its last.
    shallow, adapted
        Caches with k rows.
    """

    tokens: list[list[int]]
    shallow: DynamicCache
    adapted: DynamicCache
    most: int
    final: list[bool]
    sure: list[list[float]] = field(init=False)
    rows: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sure = [[] for _ in self.tokens]

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
    pace
        When a draft ends.
    """

    def __init__(self, model: DevicePart, adapter: Adapted | None, sampler: Sampler, pace: Pace) -> None:
        self._model, self._adapter, self._sampler, self._pace = model, adapter, sampler, pace
        self._shallow = model.new_cache()
        self._adapted = adapter.new_cache() if adapter else model.new_cache()
        self._behind: list[Tensor] = []  # states (n, d) that the adapter has not seen yet, in order

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device

    def __len__(self) -> int:
        """Return how many tokens have their shallow state."""
        return _length(self._shallow)

    def read(self, tokens: Tensor) -> Tensor:
        """Take in a piece of the prompt (n,) and return its shallow states (n, d)."""
        states = self._model.embed_and_run(tokens[None], self._shallow)[0]
        self._remember(states)
        return states

    def begin(self, firsts: Sequence[int], most: int) -> Branches:
        """Start drafts with the given first tokens, which follow all that was read or held.

        Parameters
        ----------
        firsts
            One of each branch.
        most
            Drafts after the first token of a branch, at most.
        """
        count, shallow, adapted = len(firsts), self._shallow, self._adapted
        if count > 1:
            shallow, adapted = fork(shallow, count), fork(adapted, count)
        goes_on = self._adapter is not None and most > 0 and self._pace.goes_on(())
        return Branches([[first] for first in firsts], shallow, adapted, most, [not goes_on] * count)

    @torch.no_grad()
    def step(self, branches: Branches) -> None:
        """Compute the states of the newest tokens, not all done; then draft one more where a branch goes on."""
        at = len(branches.rows)
        newest = [tokens[min(at, len(tokens) - 1)] for tokens in branches.tokens]  # what is whole runs along
        states = self._model.embed_and_run(self._tokens(newest)[:, None], branches.shallow)
        branches.rows.append(states[:, 0])
        if self._adapter is None or all(branches.final):
            return
        behind = [] if len(newest) > 1 else [rows[None] for rows in self._behind]  # several have caught up
        features = self._adapter(torch.cat([*behind, states], 1), branches.adapted)[:, -1]
        self._behind = []
        logits = self._model.draft_head(features)
        following = self._sampler.choose(logits, [_length(branches.shallow)] * len(newest))
        confidence = self._sampler.confidence(logits).tolist()
        for branch, tokens in enumerate(branches.tokens):
            if not branches.final[branch]:
                tokens.append(following[branch])
                sure = branches.sure[branch]
                sure.append(confidence[branch])
                branches.final[branch] = len(sure) >= branches.most or not self._pace.goes_on(sure)

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
        assert features is not None, "only an adapter guesses"
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
