"""One generation on the device: prompt in chunks, then rounds of drafting, verification and roll-back.

Source: HAT. Tokens stay on the device; the link carries hidden states. *Ours*: the device goes on from its guesses
after the prompt as after a draft, and stops doing so as soon as the answer is there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fl_edge.errors import ConfigError, ReplyError
from fl_edge.hat.messages import Answer, Upload
from fl_edge.hat.pace import Pace
from fl_edge.hat.proposing import DevicePart, Proposer
from fl_edge.hat.sampling import Sampler
from fl_edge.hat.trees import depths
from fl_edge.hat.verification import accept


class Link(Protocol):
    """The way to the cloud and back, for one generation at a time."""

    def send(self, upload: Upload) -> None:
        """Hand over an upload; does not wait until it has left."""

    def ready(self) -> bool:
        """Return whether an answer is there, so that :meth:`receive` would not wait."""

    def receive(self) -> Answer:
        """Return the answer to the last upload that asked for rows."""

    def end(self, request: int) -> None:
        """Let the cloud forget a request."""


@dataclass(frozen=True)
class Rules:
    """When a generation ends.

    Attributes
    ----------
    new_tokens
        Tokens of the answer, at most.
    context
        Tokens of prompt and answer that the model can hold.
    stops
        Tokens that end it; one that was reached is the last.
    """

    new_tokens: int
    context: int
    stops: Collection[int] = ()


@dataclass(frozen=True)
class Round:
    """What one answer of the cloud brought.

    Attributes
    ----------
    tokens
        New ones, one at least.
    drafted, accepted
        Drafts that were verified, and those that held; of the prompt's end 0.
    ahead
        Whether the next draft was there already, made from a guess.
    """

    tokens: Sequence[int]
    drafted: int
    accepted: int
    ahead: bool


class Generation:
    """One request on the device: its text, its drafts, and what it sends next.

    Parameters
    ----------
    model
        The device's part.
    proposer
        New, for this request.
    sampler
        That of the proposer.
    pace
        Of the prompt's chunks.
    rules
        When it ends.
    request
        The device's own number for it.
    prompt
        (n,) int64.

    Attributes
    ----------
    text
        New tokens so far.
    sent
        Tokens of the prompt that were sent.
    pending
        Tokens that are being verified: the newest, of which the cloud has just got the state, and drafts after it.
    parents
        Theirs, if they are a tree.
    over
        Whether the text is whole.

    Raises
    ------
    ConfigError
        An empty prompt, or one that leaves no room for an answer.
    """

    def __init__(
        self,
        model: DevicePart,
        proposer: Proposer,
        sampler: Sampler,
        pace: Pace,
        rules: Rules,
        request: int,
        prompt: Tensor,
    ) -> None:
        self._room = min(rules.new_tokens, rules.context - len(prompt))
        if not len(prompt) or self._room < 1:
            allowed = f"1 to {rules.context - 1} tokens, and at least 1 new one"
            asked = f"a prompt of {len(prompt)} tokens with {rules.new_tokens} new ones"
            raise ConfigError(f"{asked}: allowed are {allowed}")
        self._model, self._proposer, self._sampler, self._pace, self._rules = model, proposer, sampler, pace, rules
        self._held: Sequence[int] = (0,)
        self.request, self.prompt = request, prompt
        self.text, self.sent, self.over = list[int](), 0, False
        self.pending: Sequence[int] = (int(prompt[-1]),)
        self.parents: tuple[int, ...] | None = None

    def next_chunk(self) -> Upload:
        """Return the next chunk of the prompt; of the last, :attr:`sent` is the length of the prompt."""
        base = self.sent
        chunk = self.prompt[base : base + self._pace.chunk(len(self.prompt) - base)]
        self.sent += len(chunk)
        rows = self._proposer.read(chunk)
        return Upload(self.request, base, rows, last=self.sent == len(self.prompt), verify=False)

    def look_ahead(self, ready: Callable[[], bool]) -> int:
        """Draft on from guesses of the next token, until the answer is due, or there; return the steps made.

        It may run in another thread, but has to be over before :meth:`take_in`.
        """
        return self._proposer.look_ahead(self._most(len(self.pending)), ready)

    def take_in(self, rows: Tensor) -> Round:
        """Take in the cloud's answer.

        Parameters
        ----------
        rows
            (n, d) for the n tokens that were pending; of the prompt's end (1, d).

        Raises
        ------
        ReplyError
            Rows of another number, or that are not finite.
        """
        pending, count = self.pending, len(self.pending)
        if len(rows) != count or not bool(torch.isfinite(rows).all()):
            raise ReplyError(f"the cloud answered {len(rows)} rows of hidden states; {count} finite ones were due")
        rows = rows.to(self._model.device, self._model.dtype)
        parents = self.parents or range(-1, count - 1)
        start = len(self.prompt) + len(self.text)
        chosen = self._sampler.choose(self._model.head(rows), [start + depth for depth in depths(parents)])
        self._held = held = accept(pending, parents, chosen)
        following = chosen[held[-1]]
        tokens = _until_stop([*(pending[row] for row in held[1:]), following], self._rules.stops)
        self.text += tokens
        self.over = len(self.text) >= self._room or tokens[-1] in self._rules.stops
        ahead = not self.over and self._proposer.take_in(rows, held, following)
        return Round(tokens, count - 1, len(tokens) - 1, ahead)

    def propose(self) -> Upload:
        """Return what is to be verified next: the draft that was made ahead, or one that is made now."""
        base, kept = len(self.prompt) + len(self.text) - 1, tuple(self._held) if self.parents else None
        proposal = self._proposer.propose(self.text[-1], base, self._most(0))
        self.pending, self.parents = proposal.tokens, proposal.parents
        return Upload(self.request, base, proposal.rows, parents=proposal.parents, kept=kept)

    def restore(
        self, text: Sequence[int], sent: int, pending: Sequence[int], parents: Sequence[int] | None = None
    ) -> None:
        """Go on where another process was, from what it had in the attributes of these names."""
        self.text, self.sent, self.pending = list(text), sent, tuple(pending)
        self.parents = None if parents is None else tuple(parents)
        self._proposer.read(self.prompt.new_tensor([*self.prompt.tolist()[:sent], *text[:-1]]))
        if text:
            self._proposer.restore(self.pending, self.parents)

    def _most(self, more: int) -> int:
        """Return how many drafts may follow each other after so many more tokens and another: all but the last."""
        return self._room - len(self.text) - more - 1


def generate(generation: Generation, link: Link) -> Iterator[Round]:
    """Run a generation over a link, round by round; however it ends, the cloud forgets the request.

    Raises
    ------
    FlEdgeError
        What the link says, or an answer that cannot be.
    """
    try:
        while generation.sent < len(generation.prompt):
            link.send(generation.next_chunk())  # while it travels, the states of the next are computed
        while True:
            generation.look_ahead(link.ready)
            yield generation.take_in(link.receive().rows)
            if generation.over:
                return
            link.send(generation.propose())
    finally:
        link.end(generation.request)


def _until_stop(tokens: list[int], stops: Collection[int]) -> list[int]:
    return next((tokens[: place + 1] for place, token in enumerate(tokens) if token in stops), tokens)
