"""Random crops and flips of a whole batch at once.

Source: LDAM-DRW's trainer (specification, section 4): crops of the padded image, horizontal flips. *Ours*: images are
padded with zeros after normalisation, that is with the mean colour.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def augment(images: Tensor, crop_padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Return images (b, c, h, w), each cut from its own place and half of them mirrored.

    Parameters
    ----------
    images
        (b, c, h, w), normalised, on any device.
    crop_padding
        Pixels on every side; 0 for no crops.
    flip
        Whether half of the images, at random, are mirrored left to right.
    generator
        On the CPU, so that every device sees the same draws.
    """
    if not crop_padding and not flip:
        return images
    count, _, height, width = images.shape
    spread = 2 * crop_padding + 1
    corners = torch.randint(spread, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < (0.5 if flip else 0.0)
    rows = corners[0, :, None] + torch.arange(height)
    columns = corners[1, :, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = functional.pad(images, (crop_padding,) * 4)
    rows, columns = rows.to(images.device), columns.to(images.device)
    places = torch.arange(count, device=images.device)[:, None, None]
    return padded.movedim(1, 3)[places, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
