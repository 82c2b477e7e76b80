"""Image columns of a Hugging Face data set, decoded row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_edge.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_GRAY_MODES = ("1", "L", "LA", "I", "I;16")


@dataclass(frozen=True, eq=False)
class Table:
    """One split, images still encoded: a device decodes no more than its own.

    Attributes
    ----------
    rows
        The Hugging Face data set.
    image_column
        Where its images are.
    labels
        int64 (n,), place of each row's label in the data set's list of classes.
    mode
        Mode of PIL that images are converted to, RGB or L.
    """

    rows: Dataset
    image_column: str
    labels: NDArray[np.int64]
    mode: str

    def images(self, indices: Sequence[int] | NDArray[np.int64], size: int) -> Tensor:
        """Decode some rows: uint8 (len(indices), channels, height, width); ``size`` 0 leaves them as they are.

        Raises
        ------
        DataError
            Images of different sizes with ``size`` 0, a missing or broken image.
        """
        arrays: list[NDArray[np.uint8]] = []
        for index in indices:
            pixels = self._decode(int(index), size)
            if arrays and pixels.shape != arrays[0].shape:
                raise DataError(
                    f"images differ in size, {_times(arrays[0])} and {_times(pixels)} pixels; set image_size"
                )
            arrays.append(pixels)
        stacked = torch.from_numpy(np.stack(arrays))
        return stacked.unsqueeze(1) if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous()

    def _decode(self, index: int, size: int) -> NDArray[np.uint8]:
        try:
            image = _eight_bits(self.rows[index][self.image_column]).convert(self.mode)
        except Exception as error:  # PIL raises several unrelated classes; a missing image is None
            raise DataError(
                f"row {index} holds no readable image in {self.image_column}: {first_line(error)}"
            ) from None
        return np.array(image.resize((size, size)) if size else image, dtype=np.uint8)


def first_mode(rows: Dataset, column: str) -> str:
    """Return L where the first image is gray, else RGB."""
    try:
        return "L" if rows[0][column].mode in _GRAY_MODES else "RGB"
    except Exception as error:  # PIL raises several unrelated classes; a missing image is None
        raise DataError(f"row 0 holds no readable image in {column}: {first_line(error)}") from None


def _eight_bits(image: Any) -> Any:
    """Scale an image of 16 bits to 8; PIL alone would cut everything above 255 off."""
    if not image.mode.startswith("I"):
        return image
    from PIL import Image  # noqa: PLC0415 - heavy

    return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))


def _times(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def first_line(error: BaseException) -> str:
    """Return what an error says, without the lines that explain it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
