"""What a device and the cloud tell each other: hidden states and where they belong. Never a token.

That only hidden states travel is HAT's. The fields are *ours*: the head is on the device, so the cloud cannot know
which drafts were accepted, and every upload says how much of what the cloud has cached still holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Upload:
    """Hidden states after the input submodel, for the middle submodel to go on from.

    Attributes
    ----------
    request
        The device's own number for this generation.
    base
        Rows of the request that come before these and still hold; the cloud forgets all others.
    rows
        (n, d) of floats, or packed (:mod:`fl_edge.hat.bytes`): then the answer's are, too.
    last
        False for all chunks of a prompt but the last: nothing is answered but that they are done.
    verify
        All n rows are wanted back; else, at the end of a prompt, the last.
    parents
        Of a draft tree: for each row the number of the row that it follows, smaller than its own, or -1 for the one
        before ``base``. None: each row follows the one before it.
    kept
        After a draft tree: which rows of the previous upload hold, ascending; ``base`` counts them. None: the first.
    """

    request: int
    base: int
    rows: Tensor
    last: bool = True
    verify: bool = True
    parents: tuple[int, ...] | None = None
    kept: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """Hidden states after the middle submodel, before the final norm.

    Attributes
    ----------
    request
        As in the upload.
    rows
        (n, d) of a verification, (1, d) of the end of a prompt, (0, d) of an inner chunk.
    wait_s
        Seconds from the arrival of the upload to the start of the batch that its last row was in.
    batch_tokens, batch_s
        Rows of that batch, of all devices, and seconds that it took.
    """

    request: int
    rows: Tensor
    wait_s: float = 0.0
    batch_tokens: int = 0
    batch_s: float = 0.0
