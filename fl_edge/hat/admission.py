"""Whether the cloud may believe an upload; all of it is checked before any of it counts. *Ours*."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.hat.attention import Span
from fl_edge.hat.bytes import unpack_rows
from fl_edge.hat.messages import Upload


def is_prompt(upload: Upload) -> bool:
    """Return whether an upload is a chunk of a prompt, and not a verification."""
    return not (upload.last and upload.verify)


def checked_rows(upload: Upload, width: int, dtype: torch.dtype) -> Tensor:
    """Return an upload's rows (n, d), unpacked, on the CPU in another type.

    Raises
    ------
    ReplyError
        No rows, rows of another width, of integers that are not packed, or that are not finite in that type.
    """
    rows, name = unpack_rows(upload.rows), f"request {upload.request}"
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != width or not rows.is_floating_point():
        sent = f"rows of shape {tuple(rows.shape)} and type {str(rows.dtype).removeprefix('torch.')}"
        raise ReplyError(f"{name}: {sent}; floats of shape (n, {width}) with n at least 1 were due")
    rows = rows.to("cpu", dtype)
    if not bool(torch.isfinite(rows).all()):
        raise ReplyError(f"{name}: the rows are not all finite numbers")
    return rows


def check_place(upload: Upload, last: Span | None, waiting: Sequence[Upload], capacity: int) -> None:
    """See that an upload's rows can go where they say.

    Parameters
    ----------
    last
        Of the request's last upload; None: the cloud does not know the request.
    waiting
        Uploads of the request that are not answered.
    capacity
        Most rows of a request.

    Raises
    ------
    ReplyError
        A base that the cloud does not have, more rows than a request may have, parents that are no tree, kept rows that
        are no path of one, or an upload out of turn.
    """
    name, base, end = f"request {upload.request}", upload.base, upload.base + len(upload.rows)
    if last is None and base:
        reason = "it has ended, its lease has run out, or the cloud has been restarted"
        raise ReplyError(f"{name} goes on at row {base}, but is unknown: {reason}; begin anew at row 0")
    if end > capacity:
        raise ReplyError(f"{name} would have {end} rows with rows at {base}; a request may have {capacity}")
    if upload.parents is not None:
        _check_tree(upload)
    known = Span(0, 0, 0) if last is None else last
    if waiting and (base != known.end or not is_prompt(upload) or any(each.last for each in waiting)):
        raise ReplyError(
            f"{name}: the upload before this one is not answered yet; only a prompt's next chunk may follow"
        )
    _check_kept(upload, known)


def moved(upload: Upload) -> Sequence[int]:
    """Return which rows of the upload before a checked one are to be moved to follow each other; none: they do."""
    kept = upload.kept or ()
    return () if tuple(kept) == tuple(range(len(kept))) else kept


def _check_tree(upload: Upload) -> None:
    name, parents = f"request {upload.request}", upload.parents
    assert parents is not None
    if is_prompt(upload):
        raise ReplyError(f"{name}: a prompt is no draft tree; parents are for verifications")
    if len(parents) != len(upload.rows) or not all(-1 <= parent < row for row, parent in enumerate(parents)):
        raise ReplyError(
            f"{name}: the parents are no tree; each of {len(upload.rows)} rows needs an earlier one, or -1"
        )


def _check_kept(upload: Upload, known: Span) -> None:
    """See that what the cloud is to keep is a path: each kept row follows the kept one before it."""
    name, base = f"request {upload.request}", upload.base
    if upload.kept is None:
        if not 0 <= base <= known.end:
            raise ReplyError(f"{name} goes on at row {base}; the cloud has its rows 0 to {known.end}")
        kept: Sequence[int] = range(base - known.base)
    else:
        kept = upload.kept
        if base != known.base + len(kept):
            due = known.base + len(kept)
            raise ReplyError(
                f"{name} goes on at row {base}; with {len(kept)} kept rows behind {known.base} it is {due}"
            )
    parents = range(-1, known.count - 1) if known.parents is None else known.parents
    before = -1
    for row in kept:
        if not 0 <= row < known.count or parents[row] != before:
            shown = "the first ones" if upload.kept is None else str(list(kept))
            raise ReplyError(f"{name}: kept rows must be a path of the {known.count} rows sent before, not {shown}")
        before = row
