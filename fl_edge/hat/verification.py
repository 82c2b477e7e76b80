"""Which drafts hold: those that the full model would have chosen itself. Source: HAT; draft trees are *ours*."""

from __future__ import annotations

from collections.abc import Sequence


def accept(tokens: Sequence[int], parents: Sequence[int], targets: Sequence[int]) -> list[int]:
    """Return the rows of a verification that hold, from the newest token on.

    Parameters
    ----------
    tokens
        What each row stands for: the newest token of the text first, then drafts.
    parents
        The row that each row follows, smaller than its own; -1 for the first.
    targets
        What the full model chooses after each row.

    Returns
    -------
    list
        Ascending row numbers; the first row always holds. The text goes on with ``targets`` of them: all but the last
        are drafts that were accepted, and the last is the full model's own.
    """
    held = [0]
    for row in range(1, len(tokens)):
        if parents[row] == held[-1] and tokens[row] == targets[held[-1]]:
            held.append(row)
    return held
