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
from fl_edge.hat.drafting import Adapted, Branches, Drafter, Shallow
from fl_edge.hat.messages import Answer, Upload
from fl_edge.hat.sampling import Sampler
from fl_edge.hat.verification import accept


class Output(Shallow, Protocol):
    """What a generation needs of a device's part of the model: :class:`fl_edge.hat.split.DeviceModel`."""

    def head(self, rows: Tensor) -> Tensor:
        """Return the full model's logits (n, v) of the cloud's rows (n, d)."""


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


class Pace(Protocol):
    """How much at a time; decides on delays alone, so never on the text."""

    def chunk(self, left: int) -> int:
        """Return how many of the prompt's tokens that are left travel at once, at least 1."""

    def drafts(self) -> int:
        """Return how many tokens are drafted at most before they are verified."""

    def ahead(self, rows: int) -> int:
        """Return how many steps fit before the answer to so many rows comes."""


@dataclass(frozen=True)
class FixedPace:
    """Always the same.

    Attributes
    ----------
    chunk_tokens
        0: the whole prompt at once.
    most_drafts, most_ahead
        As in :class:`Pace`.
    """

    chunk_tokens: int = 0
    most_drafts: int = 6
    most_ahead: int = 6

    def chunk(self, left: int) -> int:
        """Return how many of the prompt's tokens that are left travel at once."""
        return self.chunk_tokens or left

    def drafts(self) -> int:
        """Return how many tokens are drafted at most."""
        return self.most_drafts

    def ahead(self, rows: int) -> int:  # noqa: ARG002 - the protocol's
        """Return how many steps fit before an answer."""
        return self.most_ahead


@dataclass(frozen=True)
class Rules:
    """When drafts and the whole generation end, and what is done while the cloud verifies.

    Attributes
    ----------
    new_tokens
        Tokens of the answer, at most.
    context
        Tokens of prompt and answer that the model can hold.
    stops
        Tokens that end it; one that was reached is the last.
    threshold
        eta: a draft ends with the first token of which the adapter is less sure.
    guesses
        k; 0: nothing is drafted while the device waits.
    """

    new_tokens: int
    context: int
    stops: Collection[int] = ()
    threshold: float = 0.6
    guesses: int = 0


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
    adapter
        Without one nothing is drafted.
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
    over
        Whether the text is whole.

    Raises
    ------
    ConfigError
        An empty prompt, one that leaves no room for an answer, or guesses without an adapter.
    """

    def __init__(
        self,
        model: Output,
        adapter: Adapted | None,
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
        if rules.guesses and adapter is None:
            raise ConfigError("without an adapter there are no guesses; allowed: guesses=0")
        self._model, self._sampler, self._pace, self._rules = model, sampler, pace, rules
        self._drafter = Drafter(model, adapter, sampler, rules.threshold)
        self._branches: Branches | None = None  # that begin with guesses of the token after those pending
        self._branch: int | None = None  # the guess that came true
        self.request, self.prompt = request, prompt
        self.text, self.sent, self.over = list[int](), 0, False
        self.pending: Sequence[int] = (int(prompt[-1]),)

    def next_chunk(self) -> Upload:
        """Return the next chunk of the prompt; of the last, :attr:`sent` is the length of the prompt."""
        base = self.sent
        chunk = self.prompt[base : base + self._pace.chunk(len(self.prompt) - base)]
        self.sent += len(chunk)
        rows = self._drafter.read(chunk)
        return Upload(self.request, base, rows, last=self.sent == len(self.prompt), verify=False)

    def look_ahead(self, ready: Callable[[], bool]) -> int:
        """Draft on from guesses of the next token, until the answer is due, or there; return the steps made.

        It may run in another thread, but has to be over before :meth:`take_in`.
        """
        most = self._most(len(self.pending))  # of a draft that begins after all that is pending
        if not self._rules.guesses or most < 0:
            self._drafter.catch_up()
            return 0
        self._branches = branches = self._drafter.begin(self._drafter.guess(self._rules.guesses))
        for _ in range(self._pace.ahead(len(self.pending))):
            if branches.done or ready():
                break
            self._drafter.step(branches, most)
        return len(branches.rows)

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
        start = len(self.prompt) + len(self.text)
        chosen = self._sampler.choose(self._model.head(rows), range(start, start + count))
        held = accept(pending, range(-1, count - 1), chosen)
        following = chosen[held[-1]]
        tokens = _until_stop([*pending[1 : len(held)], following], self._rules.stops)
        self.text += tokens
        self.over = len(self.text) >= self._room or tokens[-1] in self._rules.stops
        self._branch = None
        if self._branches and self._branches.rows and len(held) == count and not self.over:
            self._branch = self._branches.follow(following)
        return Round(tokens, count - 1, len(tokens) - 1, ahead=self._branch is not None)

    def propose(self) -> Upload:
        """Return what is to be verified next: the draft that was made ahead, or one that is made now."""
        base, branches, branch = len(self.prompt) + len(self.text) - 1, self._branches, self._branch
        if branches is None or branch is None:
            self._drafter.hold(base)
            branches, branch = self._drafter.begin(self.text[-1:]), 0
            while not branches.done:
                self._drafter.step(branches, self._most(0))
        proposal = self._drafter.take(branches, branch)
        self.pending, self._branches = proposal.tokens, None
        return Upload(self.request, base, proposal.rows)

    def restore(self, text: Sequence[int], sent: int, pending: Sequence[int]) -> None:
        """Go on where another process was, from what it had in the attributes of these names."""
        self.text, self.sent, self.pending = list(text), sent, tuple(pending)
        whole = [*self.prompt.tolist()[:sent], *text[:-1], *(pending if text else ())]
        self._drafter.read(self.prompt.new_tensor(whole))

    def _most(self, more: int) -> int:
        """Return how many drafts may be made after so many more tokens and another: all but the last of the text."""
        return min(self._pace.drafts(), self._room - len(self.text) - more - 1)


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
