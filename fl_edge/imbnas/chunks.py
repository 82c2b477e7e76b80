"""Evaluation in batches of one size, so that what comes out for an image depends on that image alone (ours).

A library may choose another way to compute a convolution or a product for another size of the batch, and rounds then
differ in the last bit. Ten devices with ten images each and one process with a hundred must find the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SIZE = 64  # images; what one batch takes of a CPU's cache, and what a device with few images computes in vain


def chunks(images: Tensor) -> list[tuple[Tensor, int]]:
    """Return batches (64, ...) of images (n, ...), the last filled up with zeros, and how much of each is images."""
    parts = list(torch.split(images, SIZE)) if len(images) else []
    return [(_filled(part), len(part)) for part in parts]


def in_chunks(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return what a function makes of images (n, ...), joined along the first axis.

    Parameters
    ----------
    function
        Takes (64, ...), returns a row for every image that does not depend on the others. For no images it is asked
        about zeros, for the shape.
    """
    found = [function(part)[:count] for part, count in chunks(images)]
    return torch.cat(found) if found else function(_filled(images))[:0]


def _filled(part: Tensor) -> Tensor:
    missing = SIZE - len(part)
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
