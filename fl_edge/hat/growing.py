"""HAT+ (ours, not the paper's): one draft tree, which grows before it is sent and goes on growing while it is verified.

The adapter drafts the likeliest tokens first, a few side by side a step, as EAGLE-2 does (arXiv 2406.16858); how far is
a question of seconds (:mod:`fl_edge.hat.payoff`). While the cloud verifies a part of the tree, the rest grows: if the
answer leads into it, the next proposal is there already. HAT's own guesses are the case in which all drafts held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_edge.hat.caches import keep_rows
from fl_edge.hat.drafting import Adapted
from fl_edge.hat.payoff import RANKS, Choice, Payoff, choose
from fl_edge.hat.proposing import DevicePart, Proposal
from fl_edge.hat.sampling import Sampler
from fl_edge.hat.trees import depths

_MOST_ROWS = 128  # of a tree: a bound for what cannot be foreseen


@dataclass(frozen=True)
class _Node:
    """A token of the tree.

    Attributes
    ----------
    token
        Behind its parent.
    parent
        Row; -1: the last token before the tree.
    chance
        That it is accepted.
    rank, sure
        Of it among the adapter's drafts after its parent, and what the adapter said; None: it did not draft it here.
    """

    token: int
    parent: int
    chance: float = 1.0
    rank: int = 0
    sure: float | None = None


class GrowingTrees:
    """A :class:`~fl_edge.hat.proposing.Proposer`.

    Parameters
    ----------
    model, adapter
        The device's part.
    sampler
        That of the generation.
    payoff
        What is worth its time.
    width
        Tokens that a step runs side by side, and drafts after each, at most; 1: chains.
    clock
        Seconds.
    """

    def __init__(
        self,
        model: DevicePart,
        adapter: Adapted,
        sampler: Sampler,
        payoff: Payoff,
        width: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._adapter, self._sampler = model, adapter, sampler
        self._payoff, self._width, self._clock = payoff, width, clock
        self._shallow, self._adapted = model.new_cache(), adapter.new_cache()
        self._unseen: list[Tensor] = []  # states (n, d) that the adapter has not seen, in order
        self._base = 0  # tokens before the tree
        self._rows: list[_Node] = []  # those with a shallow state, in the order of the caches
        self._states: list[Tensor] = []  # theirs, (d,)
        self._leaves: list[_Node] = []  # those without
        self._sent: Sequence[int] = ()  # rows that are being verified

    def read(self, tokens: Tensor) -> Tensor:
        """Take in a piece of the text (n,) and return its shallow states (n, d)."""
        states = self._model.embed_and_run(tokens[None], self._shallow)[0]
        self._unseen.append(states)
        self._base += len(tokens)
        return states

    def restore(self, tokens: Sequence[int], parents: tuple[int, ...] | None) -> None:
        """Take in what another process has proposed."""
        line = parents or range(-1, len(tokens) - 1)
        self._run([_Node(token, parent) for token, parent in zip(tokens, line, strict=True)])
        self._sent = range(len(tokens))

    @torch.no_grad()
    def look_ahead(self, most: int, ready: Callable[[], bool]) -> int:
        """Let the tree grow where the answer is likely to lead."""
        started, steps = self._clock(), 0
        if most < 0:
            return 0
        self._see()
        while not ready() and (nodes := self._frontier(most + len(self._sent))):
            chances = [node.chance for node in nodes]
            if not self._payoff.goes_ahead(chances, max(len(self._sent), 1), self._clock() - started):
                break
            self._step(nodes)
            steps += 1
        return steps

    def take_in(self, rows: Tensor, held: Sequence[int], following: int) -> bool:  # noqa: ARG002 - the protocol's
        """Keep what holds, and what has grown behind it."""
        path = [self._sent[row] for row in held] if self._sent else []
        self._learn(path, following)
        end = path[-1] if path else -1
        behind = (row for row, node in enumerate(self._rows) if (node.parent, node.token) == (end, following))
        first = next(behind, None)
        self._keep(path, [] if first is None else self._below(first))
        if first is None:
            self._leaves = [_Node(following, -1)]
        return first is not None

    @torch.no_grad()
    def propose(self, newest: int, base: int, most: int) -> Proposal:
        """Let the tree grow as far as it pays, and return what is worth being sent."""
        assert self._base == base
        assert (self._rows or self._leaves)[0].token == newest
        while (choice := self._choice(most)) == "step":
            self._step(self._frontier(most))
        costs = self._payoff.costs
        if choice == "leaves":
            started, frontier = self._clock(), self._frontier(most)
            nodes = [node for node in frontier if not self._rows or costs is None or costs.pays(node.chance)]
            if nodes:  # a tree may have been whole before the cloud had spoken
                self._run(nodes)
                self._payoff.leaved(self._clock() - started)
        deep = depths([node.parent for node in self._rows])
        self._sent = sent = [
            row
            for row, node in enumerate(self._rows)
            if deep[row] <= most and (row == 0 or costs is None or costs.pays(node.chance))
        ]
        new = {row: place for place, row in enumerate(sent)} | {-1: -1}
        parents = tuple(new[self._rows[row].parent] for row in sent)
        tokens = tuple(self._rows[row].token for row in sent)
        chain = parents == tuple(range(-1, len(sent) - 1))
        return Proposal(tokens, torch.stack([self._states[row] for row in sent]), None if chain else parents)

    def _choice(self, most: int) -> Choice:
        """Return what to do next with the tree; as long as something was never measured, what measures it."""
        costs, begun = self._payoff.costs, bool(self._rows)
        if costs is not None and most:
            return choose(costs, [node.chance for node in self._frontier(most)], begun)
        if most and self._payoff.step_s is None:
            return "step"
        return "leaves" if not begun or self._payoff.leaves_s is None else "stop"

    def _frontier(self, most: int) -> list[_Node]:
        """Return the likeliest leaves that are not too deep, as many as are run side by side."""
        deep = depths([node.parent for node in self._rows])
        near = [node for node in self._leaves if node.parent < 0 or deep[node.parent] < most]
        room = _MOST_ROWS - len(self._rows)
        return sorted(near, key=lambda node: -node.chance)[: min(self._width, room)]

    def _step(self, nodes: Sequence[_Node]) -> None:
        started = self._clock()
        self._run(nodes)
        self._see()
        self._payoff.stepped(self._clock() - started)

    def _run(self, nodes: Sequence[_Node]) -> None:
        """Compute the shallow states of leaves, which become rows."""
        self._rows += nodes
        self._leaves = [node for node in self._leaves if node not in nodes]
        tokens = torch.tensor([[node.token for node in nodes]], device=self._model.device)
        states = self._model.embed_and_run(tokens, self._shallow, self._parents())[0]
        self._states += states
        self._unseen.append(states)

    def _see(self) -> None:
        """Let the adapter see what is new to it, and draft what may follow."""
        if not self._unseen:
            return
        unseen, seen = torch.cat(self._unseen)[None], self._adapted.get_seq_length()
        self._unseen = []
        behind, rows = max(0, self._base - seen), range(max(0, seen - self._base), len(self._rows))
        features = []
        if behind:
            features.append(self._adapter(unseen[:, :behind], self._adapted)[0, -1:])
        if rows:
            features = [self._adapter(unseen[:, behind:], self._adapted, self._parents())[0]]
        self._draft(torch.cat(features), rows or [-1])

    def _draft(self, features: Tensor, rows: Sequence[int]) -> None:
        """Add the likeliest tokens after rows, by the adapter's features (n, d) of them."""
        deep = depths([node.parent for node in self._rows])
        places = [self._base + (deep[row] + 1 if row >= 0 else 0) for row in rows]
        scores = self._sampler.scores(self._model.draft_head(features), places)
        sure, tokens = scores.softmax(-1).topk(min(self._width, RANKS, scores.shape[-1]))
        payoff = self._payoff
        for row, chances, found in zip(rows, sure.tolist(), tokens.tolist(), strict=True):
            before = self._rows[row].chance if row >= 0 else 1.0
            held = [payoff.acceptance.chance(*each) for each in enumerate(chances)]
            payoff.drafted(before, before * held[0])
            self._leaves += [
                _Node(token, row, before * chance, rank, each)
                for rank, (token, chance, each) in enumerate(zip(found, held, chances, strict=True))
            ]

    def _learn(self, path: Sequence[int], following: int) -> None:
        """Take in what became of the drafts after the tokens that hold."""
        right = dict(zip(path or [-1], [*(self._rows[row].token for row in path[1:]), following], strict=True))
        for node in (*self._rows, *self._leaves):
            if node.sure is not None and node.parent in right:
                self._payoff.acceptance.observe(node.rank, node.sure, node.token == right[node.parent])

    def _below(self, first: int) -> list[int]:
        """Return a row and all that follow it."""
        found = [first]
        for row in range(first + 1, len(self._rows)):
            if self._rows[row].parent in found:
                found.append(row)
        return found

    def _keep(self, path: Sequence[int], rows: Sequence[int]) -> None:
        """Make a path of the tree text, some of the rows behind it the tree, and forget the others."""
        kept, seen = [*path, *rows], self._adapted.get_seq_length() - self._base
        keep_rows(self._shallow, self._base, kept)
        if self._unseen:
            first = min(seen, 0)  # of those before the tree, as many as -first are unseen
            unseen = torch.cat(self._unseen)
            places = [*range(-first), *(row - max(seen, 0) - first for row in kept if row >= seen)]
            self._unseen = [unseen[places]] if places else []
        if seen > 0:
            keep_rows(self._adapted, self._base, [row for row in kept if row < seen])
        new = {row: place for place, row in enumerate(rows)}
        whole = self._rows[rows[0]].chance if rows else 1.0

        def moved(node: _Node) -> _Node:
            return replace(node, parent=new.get(node.parent, -1), chance=min(1.0, node.chance / whole))

        self._leaves = [moved(node) for node in self._leaves if node.parent in new]
        self._rows, self._states = [moved(self._rows[row]) for row in rows], [self._states[row] for row in rows]
        self._base, self._sent = self._base + len(path), ()

    def _parents(self) -> list[int] | None:
        """Return the rows' parents; None if each follows the one before it."""
        parents = [node.parent for node in self._rows]
        return None if parents == list(range(-1, len(parents) - 1)) else parents
