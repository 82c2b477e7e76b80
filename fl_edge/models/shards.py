"""The safetensors files of one checkpoint, read tensor by tensor and never kept mapped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fl_edge.errors import DataError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLED = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and as what."""

    file: Path
    shape: tuple[int, ...]
    format: str  # the name in the file's header, for example BF16

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's type.

        Raises
        ------
        DataError
            Anything but plain floating-point numbers.
        """
        if self.format not in _FLOATS:
            raise DataError(f"{self.file} holds {self.format} tensors; weights must be one of {', '.join(_FLOATS)}")
        return _FLOATS[self.format]


class Shards:
    """The weights of a folder: one ``model.safetensors``, or the shards that the index names.

    Opening checks every shard's header and length, and reads no tensor. A file is mapped only while one tensor is
    copied out of it, so what a process holds is what it was given, plus at most one tensor for a moment.

    Attributes
    ----------
    tensors
        Name -> where it lies.
    bytes_read
        Bytes of tensors read so far, as they are in the files.

    Raises
    ------
    DataError
        No safetensors (pickled weights are never read), a shard that is missing, cut short or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: Mapping[str, Stored] = {
            name: stored for file in _files(folder) for name, stored in _header(file).items()
        }
        self.bytes_read = 0

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the numbers have."""
        sizes = Counter[torch.dtype]()
        for stored in self.tensors.values():
            if stored.format in _FLOATS:
                sizes[stored.dtype] += torch.Size(stored.shape).numel()
        return sizes.most_common(1)[0][0] if sizes else torch.float32

    def read(self, name: str, device: torch.device, dtype: torch.dtype, rows: Tensor | slice | None = None) -> Tensor:
        """Return a copy of a tensor, or of the given rows of it.

        Parameters
        ----------
        name
            One of :attr:`tensors`.
        device, dtype
            What the copy shall be.
        rows
            (r,) int64, or a range; nothing else of the tensor is read then.

        Raises
        ------
        DataError
            The file has been lost or changed since it was opened.
        """
        stored = self.tensors[name]
        try:
            with safe_open(stored.file, "pt") as file:
                if rows is None:
                    found = file.get_tensor(name)
                else:
                    table = file.get_slice(name)
                    ranges = [rows] if isinstance(rows, slice) else [slice(row, row + 1) for row in rows.tolist()]
                    found = torch.cat([table[each] for each in ranges])
                self.bytes_read += found.nbytes
                copied: Tensor = found.to(device, dtype, copy=True)
                return copied
        except (SafetensorError, OSError) as error:
            raise DataError(f"cannot read {name} from {stored.file}: {_line(error)}") from None


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not index.exists():
        if any(file for pattern in _PICKLED for file in folder.glob(pattern)):
            raise DataError(f"{folder} holds pickled weights, which are never read; save the model as safetensors")
        raise DataError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX}")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is damaged: {_line(error)}") from None
    for name in names:
        if name in outside or not (folder / name).is_file():
            raise DataError(f"{index} names {name}, which is not in the folder")
    return [folder / name for name in names]


def _header(file: Path) -> dict[str, Stored]:
    """Return what a shard holds; safetensors itself compares its header with the file's length."""
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
            return {name: Stored(file, tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{file} is damaged or cut short: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
