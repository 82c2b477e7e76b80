"""Where a run of COMP stands, kept in its output folder, so that a killed one goes on instead of beginning anew."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fl_edge.errors import DataError, RunFolderError
from fl_edge.models.shards import INDEX
from fl_edge.models.skeleton import CONFIG
from fl_edge.pruning.pieces import write_pieces
from fl_edge.pruning.saving import line_of, writing

STATE = ".comp.safetensors"


def run_key(model: Path, config: Any, *content: Tensor | str) -> str:
    """Return 32 hexadecimal digits that are equal where a run would do the same again.

    Parameters
    ----------
    model
        Folder of the unpruned model. Its files count by name, size and time of change, so that nothing large is read.
    config
        Settings, a dataclass.
    content
        Whatever else the result depends on, such as the calibration tokens.

    Raises
    ------
    DataError
        A folder that cannot be read.
    """
    try:
        files = [(file.name, file.stat()) for file in sorted(model.glob("*.safetensors"))]
        small = [file.read_bytes() for file in (model / CONFIG, model / INDEX) if file.is_file()]
    except OSError as error:
        raise DataError(f"cannot read the model in {model}: {line_of(error)}") from None
    about = [(name, found.st_size, found.st_mtime_ns) for name, found in files]
    digest = hashlib.blake2b(json.dumps([dataclasses.asdict(config), about]).encode(), digest_size=16)
    for part in (*small, *content):
        raw = part.encode() if isinstance(part, str) else part
        raw = raw.cpu().contiguous().numpy().tobytes() if isinstance(raw, Tensor) else raw
        digest.update(hashlib.blake2b(raw).digest())
    return digest.hexdigest()


def keep_state(folder: Path, key: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write where a run stands, whole or not at all; what was kept before is replaced.

    Raises
    ------
    RunFolderError
        The disk is full or read-only; what was kept before is still there.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    metadata = {"key": key, "record": json.dumps(record)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_pieces(folder / STATE, layout, lambda name: [tensors[name]], metadata)


def kept_state(folder: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return record and tensors as they were kept, or None where nothing is.

    Raises
    ------
    RunFolderError
        What is kept is of another run, or damaged.
    """
    if not (folder / STATE).exists():
        return None
    try:
        with safe_open(folder / STATE, "pt") as stored:
            metadata = stored.metadata()
            found, record = metadata["key"], json.loads(metadata["record"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()} if found == key else {}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{folder / STATE} is damaged: {line_of(error)}; remove {folder} to begin anew") from None
    if found != key:
        raise RunFolderError(
            f"{folder} holds a run that was interrupted, with other settings, model or text; give these again to go "
            "on, remove the folder to begin anew, or choose another"
        )
    return record, tensors


def drop_state(folder: Path) -> None:
    """Remove what was kept."""
    with writing(folder):
        (folder / STATE).unlink(missing_ok=True)


class Clock:
    """Seconds and bytes read of a run, earlier processes included."""

    def __init__(self) -> None:
        self._start, self._seconds, self._bytes = time.monotonic(), 0.0, 0

    def go_on(self, record: Mapping[str, Any]) -> None:
        """Add what a record made from :meth:`spent` says."""
        self._seconds, self._bytes = record["seconds"], record["bytes_read"]

    def spent(self, read: int) -> dict[str, Any]:
        """Return what the run has taken; ``read`` are the bytes of this process."""
        return {"seconds": self._seconds + time.monotonic() - self._start, "bytes_read": self._bytes + read}
