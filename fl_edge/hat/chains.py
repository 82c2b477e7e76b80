"""Chains of drafts by the adapter, begun from guesses while the cloud verifies: HAT's own way to propose.

*Ours*: the device goes on from its guesses after the prompt as after a draft, and stops doing so as soon as the answer
is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fl_edge.hat.drafting import Adapted, Branches, Drafter
from fl_edge.hat.pace import Pace
from fl_edge.hat.proposing import DevicePart, Proposal
from fl_edge.hat.sampling import Sampler


class Chains:
    """HAT's :class:`~fl_edge.hat.proposing.Proposer`: one draft in a row, begun from guesses while the device waits.

    Parameters
    ----------
    model, adapter
        Without an adapter nothing is drafted, and guesses do not count.
    sampler
        That of the generation.
    pace
        When a draft ends, and how far it may go ahead.
    guesses
        k; 0: nothing is drafted while the device waits.
    """

    def __init__(
        self, model: DevicePart, adapter: Adapted | None, sampler: Sampler, pace: Pace, guesses: int = 0
    ) -> None:
        self._drafter = Drafter(model, adapter, sampler, pace)
        self._pace, self._guesses = pace, guesses if adapter else 0
        self._count = 1  # of tokens that are being verified
        self._branches: Branches | None = None  # that begin with guesses of the token after those
        self._branch: int | None = None  # the guess that came true

    def read(self, tokens: Tensor) -> Tensor:
        """Take in a piece of the text (n,) and return its shallow states (n, d)."""
        return self._drafter.read(tokens)

    def restore(self, tokens: Sequence[int], parents: tuple[int, ...] | None) -> None:  # noqa: ARG002 - a chain
        """Take in what another process has proposed."""
        self._drafter.read(torch.tensor(tokens, device=self._drafter.device))
        self._count = len(tokens)

    def look_ahead(self, most: int, ready: Callable[[], bool]) -> int:
        """Draft on from the likeliest next tokens."""
        if not self._guesses or most < 0:
            self._drafter.catch_up()
            return 0
        self._branches = branches = self._drafter.begin(self._drafter.guess(self._guesses), most)
        for _ in range(self._pace.ahead(self._count)):
            if branches.done or ready():
                break
            self._drafter.step(branches)
        return len(branches.rows)

    def take_in(self, rows: Tensor, held: Sequence[int], following: int) -> bool:
        """Keep the branch that the answer leads to, if all drafts held and it was guessed."""
        self._branch = None
        if self._branches and self._branches.rows and len(held) == len(rows):
            self._branch = self._branches.follow(following)
        return self._branch is not None

    def propose(self, newest: int, base: int, most: int) -> Proposal:
        """Return the draft that was made ahead, or one that is made now."""
        branches, branch = self._branches, self._branch
        if branches is None or branch is None:
            self._drafter.hold(base)
            branches, branch = self._drafter.begin([newest], most), 0
            while not branches.done:
                self._drafter.step(branches)
        proposal = self._drafter.take(branches, branch)
        self._branches, self._count = None, len(proposal.tokens)
        return proposal
