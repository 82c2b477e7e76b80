"""What requests came to: counts, bytes and seconds, and nothing of their text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fl_edge.errors import ReplyError

_LARGEST = 1e15


@dataclass
class Account:
    """What one request came to; nothing of its text.

    Attributes
    ----------
    prompt, tokens
        Tokens of the prompt, and new ones.
    rounds, drafted, accepted, ahead
        Answers of the cloud that brought tokens, drafts that were verified, those that held, and drafts that were there
        already when the answer came.
    up_bytes, down_bytes
        Of hidden states.
    first_s, total_s
        Seconds from the start to the first token, and to the last.
    """

    prompt: int
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    ahead: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    first_s: float = 0.0
    total_s: float = 0.0

    @property
    def accept_length(self) -> float:
        """Tokens of a round, without the one that the prompt brings; 0 where there was none."""
        return (self.tokens - 1) / (self.rounds - 1) if self.rounds > 1 else 0.0

    @property
    def between_s(self) -> float:
        """TBT, mean seconds between tokens; 0 for a single one."""
        return (self.total_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0

    def line(self, device: str) -> str:
        """Say it in one line."""
        return f"{device:12}  {self.figures()}"

    def figures(self) -> str:
        """Say it in one line, without whose it is."""
        return (
            f"{self.prompt:5d} + {self.tokens} tokens  TTFT {1e3 * self.first_s:.0f} ms  "
            f"TBT {1e3 * self.between_s:.1f} ms  accept length {self.accept_length:.2f}  "
            f"{self.up_bytes / 1e6:.2f} MB up, {self.down_bytes / 1e6:.2f} MB down"
        )

    def to_record(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def to_text(self) -> str:
        """Return it as JSON."""
        return json.dumps(self.to_record())

    @classmethod
    def from_text(cls, text: Any) -> Account:
        """Undo :meth:`to_text`.

        Raises
        ------
        ReplyError
            Anything but finite numbers from 0 on.
        """
        try:
            account = cls(**json.loads(text))
        except (TypeError, ValueError, RecursionError):
            raise ReplyError("the account of a request cannot be read") from None
        for each in fields(cls):
            value = getattr(account, each.name)
            if type(value) not in (int, float) or not (math.isfinite(value) and 0 <= value < _LARGEST):
                raise ReplyError(f"{each.name}={value!r} of a request's account must be a number from 0 on")
        return account


@dataclass
class HatReport:
    """All requests of a run.

    Attributes
    ----------
    accounts
        Of each device's requests, in their order.
    refused
        Device -> why a request of it was not answered, one line each.
    lost
        Device -> why it did not come to its end.
    """

    accounts: dict[str, list[Account]] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return totals, and means over all requests."""
        done = [account for accounts in self.accounts.values() for account in accounts]
        count, rounds = len(done), sum(max(0, each.rounds - 1) for each in done)
        spaced = [each.between_s for each in done if each.tokens > 1]
        return {
            "requests": count,
            "tokens": sum(each.tokens for each in done),
            "ttft_s": sum(each.first_s for each in done) / count if count else 0.0,
            "tbt_s": sum(spaced) / len(spaced) if spaced else 0.0,
            "accept_length": sum(max(0, each.tokens - 1) for each in done) / rounds if rounds else 0.0,
            "ahead": sum(each.ahead for each in done) / rounds if rounds else 0.0,
            "up_bytes": sum(each.up_bytes for each in done),
            "down_bytes": sum(each.down_bytes for each in done),
            "refused": sum(map(len, self.refused.values())),
            "lost": len(self.lost),
        }
