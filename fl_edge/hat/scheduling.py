"""Which of the waiting rows go into the cloud's next batch.

That verifications of many devices and prompt chunks share a batch is HAT's. The order is *ours*, after Sarathi-Serve:
verifications first, then prefills under way, then new ones, under one budget of tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much a batch takes.

    HAT has a budget only, since its devices choose how long prompt chunks are. Without limits a batch takes all that
    waits, whole prompts among it: the U-shaped baseline. U-Sarathi has a budget and a chunk length.

    Attributes
    ----------
    tokens
        Rows of a batch; 0: no limit. It has to be more than all devices together verify at once, or prompts would wait
        for ever. A verification of more rows has a batch alone.
    chunk
        Rows of one prompt in a batch; 0: no limit.
    """

    tokens: int = 0
    chunk: int = 0


@dataclass(frozen=True)
class Waiting:
    """An upload that waits.

    Attributes
    ----------
    request
        Whose it is.
    rows
        How many of its rows are still to be run.
    verify
        It must be run as a whole.
    started
        Of a prompt: rows of the request have been run before.
    """

    request: Hashable
    rows: int
    verify: bool
    started: bool = False


def next_batch(waiting: Sequence[Waiting], limits: Limits) -> list[tuple[int, int]]:
    """Choose what the next batch runs.

    First come, first served within each class. A verification that does not fit lets later ones pass, and is the first
    of the next batch; a prompt is cut to what is left.

    Parameters
    ----------
    waiting
        By arrival.

    Returns
    -------
    list of (int, int)
        Index and rows of what is run, at most one upload of each request, its first. Empty only if nothing waits.
    """
    firsts = list({each.request: index for index, each in reversed(list(enumerate(waiting)))}.values())
    order = sorted(firsts, key=lambda index: (not waiting[index].verify, not waiting[index].started, index))
    left = limits.tokens or sum(each.rows for each in waiting)
    chosen: list[tuple[int, int]] = []
    for index in order:
        each = waiting[index]
        rows = each.rows if each.verify else min(each.rows, limits.chunk or each.rows, left)
        if 0 < rows <= left or not chosen:
            chosen.append((index, rows))
            left = max(0, left - rows)
    return chosen
