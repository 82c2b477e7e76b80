"""HAT+ (ours, not the paper's): rows of hidden states in bytes, a quarter of float32 and half of float16 on the link.

A row is scaled so that its largest number is 127, and rounded; the scale travels with it. Each row is packed for
itself, so chunks, batches and drafts change nothing. The text is then exact to the model that rounds its hidden states
at both cuts in this way, and not to the model as it is. Rounding also makes more of what float arithmetic leaves open:
a number that lies between two steps may fall to either side when a sum runs in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fl_edge.errors import ReplyError

SCALE_BYTES = 4  # float32, behind the row
_LARGEST = 127


def pack_rows(rows: Tensor) -> Tensor:
    """Return rows (n, d) of floats as (n, d + 4) int8, on the CPU."""
    rows = rows.to("cpu", torch.float32)
    scales = rows.abs().amax(1, keepdim=True) / _LARGEST
    steps = (rows / torch.where(scales > 0, scales, 1.0)).round_().clamp_(-_LARGEST, _LARGEST)
    return torch.cat((steps.to(torch.int8), scales.view(torch.int8)), 1)


def unpack_rows(rows: Tensor) -> Tensor:
    """Return the rows (n, d) float32 of :func:`pack_rows`; rows of floats come back as they are.

    Raises
    ------
    ReplyError
        Bytes that hold no row.
    """
    if rows.dtype != torch.int8:
        return rows
    if rows.ndim != 2 or rows.shape[1] <= SCALE_BYTES:
        raise ReplyError(f"packed rows of shape {tuple(rows.shape)} cannot be; (n, d + {SCALE_BYTES}) was due")
    steps, scales = rows[:, :-SCALE_BYTES], rows[:, -SCALE_BYTES:].contiguous().view(torch.float32)
    return steps * scales
