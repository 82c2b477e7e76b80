"""One generation on the device: prompt in chunks, then rounds of drafting, verification and roll-back.

Source: HAT. Tokens stay on the device; the link carries hidden states. *Ours*: the device goes on from its guesses
after the prompt as after a draft, and stops doing so as soon as the answer is there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fl_edge.errors import ConfigError, ReplyError
from fl_edge.hat.drafting import Adapted, Branches, Drafter, Proposal, Shallow
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


def generate(
    model: Output,
    adapter: Adapted | None,
    sampler: Sampler,
    link: Link,
    pace: Pace,
    rules: Rules,
    request: int,
    prompt: Tensor,
) -> Iterator[Round]:
    """Generate the answer to a prompt, round by round.

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

    Raises
    ------
    ConfigError
        An empty prompt, or one that leaves no room for an answer.
    FlEdgeError
        What the link says.
    """
    drafter = Drafter(model, adapter, sampler, rules.threshold)
    room = min(rules.new_tokens, rules.context - len(prompt))
    if not len(prompt) or room < 1:
        allowed = f"1 to {rules.context - 1} tokens, and at least 1 new one"
        raise ConfigError(f"a prompt of {len(prompt)} tokens with {rules.new_tokens} new ones: allowed are {allowed}")
    try:
        _send_prompt(drafter, link, pace, request, prompt)
        proposal, made = Proposal([int(prompt[-1])], prompt.new_zeros(1, 0)), 0
        while True:
            count = len(proposal.tokens)
            most = min(pace.drafts(), room - made - count - 1)  # of a draft that begins after all of these
            branches = _look_ahead(drafter, link, pace, rules.guesses, most, count)
            start = len(prompt) + made
            chosen = sampler.choose(model.head(_receive(link, count)), range(start, start + count))
            held = accept(proposal.tokens, range(-1, count - 1), chosen)
            following = chosen[held[-1]]
            tokens = _until_stop([*proposal.tokens[1 : len(held)], following], rules.stops)
            made += len(tokens)
            over = made >= room or tokens[-1] in rules.stops
            branch = branches.follow(following) if branches and len(held) == count and not over else None
            yield Round(tokens, count - 1, len(tokens) - 1, ahead=branch is not None)
            if over:
                return
            base = len(prompt) + made - 1
            if branches is None or branch is None:
                drafter.hold(base)
                branches, branch = drafter.begin([following]), 0
                while not branches.done:
                    drafter.step(branches, min(pace.drafts(), room - made - 1))
            proposal = drafter.take(branches, branch)
            link.send(Upload(request, base, proposal.rows))
    finally:
        link.end(request)


def _send_prompt(drafter: Drafter, link: Link, pace: Pace, request: int, prompt: Tensor) -> None:
    """Send the prompt chunk by chunk: while one travels, the states of the next are computed."""
    base = 0
    while base < len(prompt):
        chunk = prompt[base : base + pace.chunk(len(prompt) - base)]
        last = base + len(chunk) == len(prompt)
        link.send(Upload(request, base, drafter.read(chunk), last=last, verify=False))
        base += len(chunk)


def _look_ahead(drafter: Drafter, link: Link, pace: Pace, guesses: int, most: int, rows: int) -> Branches | None:
    """Draft on from guesses of the next token, until the answer is due or there."""
    if not guesses or most < 0:
        drafter.catch_up()
        return None
    branches = drafter.begin(drafter.guess(guesses))
    for _ in range(pace.ahead(rows)):
        if branches.done or link.ready():
            break
        drafter.step(branches, most)
    return branches if branches.rows else None


def _receive(link: Link, count: int) -> Tensor:
    rows = link.receive().rows
    if len(rows) != count or not bool(torch.isfinite(rows).all()):
        raise ReplyError(f"the cloud answered {len(rows)} rows of hidden states; {count} finite ones were due")
    return rows


def _until_stop(tokens: list[int], stops: Collection[int]) -> list[int]:
    return next((tokens[: place + 1] for place, token in enumerate(tokens) if token in stops), tokens)
