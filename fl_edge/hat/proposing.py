"""What a device asks the cloud to verify, and who makes it: a chain by the adapter, or a tree by Medusa's heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True, eq=False)
class Proposal:
    """What is sent to be verified: the newest token and the drafts after it.

    Attributes
    ----------
    tokens, rows
        n tokens and their shallow states (n, d).
    parents
        Of a draft tree, as in :class:`fl_edge.hat.messages.Upload`; None: a chain.
    """

    tokens: Sequence[int]
    rows: Tensor
    parents: tuple[int, ...] | None = None


class DevicePart(Protocol):
    """What generation needs of a device's part of the model: :class:`fl_edge.hat.split.DeviceModel`."""

    def embed_and_run(self, tokens: Tensor, cache: DynamicCache, parents: Sequence[int] | None = None) -> Tensor:
        """Return the states (b, n, d) after the input submodel of tokens (b, n), behind those in the cache."""

    def norm(self, rows: Tensor) -> Tensor:
        """Return the full model's last hidden states (n, d), normed, of the cloud's rows (n, d)."""

    def head(self, rows: Tensor) -> Tensor:
        """Return the full model's logits (n, v) of the cloud's rows (n, d)."""

    def draft_head(self, features: Tensor) -> Tensor:
        """Return logits (..., v) of features (..., d) that are normed already."""

    def new_cache(self) -> DynamicCache:
        """Return an empty cache."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""


class Proposer(Protocol):
    """Keeps a generation's text as caches of the device's part, and drafts what comes next.

    The newest token of the text has no shallow state before it is proposed.
    """

    def read(self, tokens: Tensor) -> Tensor:
        """Take in a piece of the text (n,) and return its shallow states (n, d)."""

    def restore(self, tokens: Sequence[int], parents: tuple[int, ...] | None) -> None:
        """Take in what another process has proposed, after all that was read."""

    def look_ahead(self, most: int, ready: Callable[[], bool]) -> int:
        """Draft on from guesses of the token after those proposed; return the steps made.

        It may run in another thread, but has to be over before :meth:`take_in`.

        Parameters
        ----------
        most
            Drafts after such a token, at most; below 0: there is no such token.
        ready
            Whether the cloud's answer is there: then there is nothing more to gain.
        """

    def take_in(self, rows: Tensor, held: Sequence[int], following: int) -> bool:
        """Take in the answer to what was proposed, or to the prompt's end.

        Parameters
        ----------
        rows
            (n, d) of the cloud, one for each token.
        held
            Which of them hold, ascending from 0.
        following
            The token that comes next.

        Returns
        -------
        bool
            Whether the next proposal has been made ahead.
        """

    def propose(self, newest: int, base: int, most: int) -> Proposal:
        """Return what is to be verified next.

        Parameters
        ----------
        newest
            Token of the text.
        base
            Tokens before it; all else is forgotten.
        most
            Drafts one after another, at most.
        """
