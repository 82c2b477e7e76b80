"""What became of a device's model: its plan and folder, and figures before and after."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fl_edge.comp.messages import read_plan_record
from fl_edge.errors import DataError, ReplyError
from fl_edge.pruning import PruningPlan

_LARGEST = 1e15  # of a figure


@dataclass(frozen=True)
class Figures:
    """Of a model before and after.

    Attributes
    ----------
    parameters
        Of the whole model, tied ones once.
    perplexity
        On the device's test text; 0 where the model could not be measured in the device's memory.
    latency_s
        Seconds that a token takes, batch 1; 0 likewise.
    memory_bytes
        Of the weights, as they are in memory.
    peak_bytes
        Largest resident memory of the device's process while it pruned; where it serves several devices, of all.
    """

    parameters: tuple[float, float]
    perplexity: tuple[float, float]
    latency_s: tuple[float, float]
    memory_bytes: tuple[float, float]
    peak_bytes: float


@dataclass(frozen=True)
class Outcome:
    """A device's answer when its model is pruned.

    Attributes
    ----------
    plan
        What the model keeps.
    folder
        Where it is, on the device.
    seconds, bytes_read
        That pruning took, and that were read of the unpruned model's files.
    """

    plan: PruningPlan
    folder: str
    seconds: float
    bytes_read: float
    figures: Figures

    def to_config(self) -> dict[str, Any]:
        """Return plain values that a ConfigRecord takes."""
        flat = {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.figures).items()
        }
        plan = json.dumps(self.plan.to_record())
        return {"plan": plan, "folder": self.folder, "seconds": self.seconds, "bytes_read": self.bytes_read, **flat}

    @classmethod
    def checked(cls, config: Mapping[str, Any], full: PruningPlan) -> Outcome:
        """Return a device's outcome, or say in one line why it cannot be used.

        Parameters
        ----------
        full
            Of the unpruned model.

        Raises
        ------
        ReplyError
            A plan of another model, or a figure that is missing, not finite or below 0.
        """
        plan = read_plan_record(config)
        if not full.covers(plan):
            raise ReplyError("its plan is of another model")
        pairs = {name: _pair(config, name) for name in ("parameters", "perplexity", "latency_s", "memory_bytes")}
        seconds, read, peak = (_number(config.get(name), name) for name in ("seconds", "bytes_read", "peak_bytes"))
        return cls(plan, str(config.get("folder", "")), seconds, read, Figures(**pairs, peak_bytes=peak))


def base_digest(folder: Path) -> str:
    """Return a hash of a model's weights and configuration, equal where the files are.

    Raises
    ------
    DataError
        The folder cannot be read.
    """
    try:
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
        stats = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        return _digest(folder, stats)
    except OSError as error:
        raise DataError(f"cannot read the model in {folder}: {error.strerror}") from None


@lru_cache(maxsize=8)
def _digest(folder: Path, stats: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, *_ in stats:
        with (folder / name).open("rb") as stream:
            digest.update(name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _pair(config: Mapping[str, Any], name: str) -> tuple[float, float]:
    value = config.get(name)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ReplyError(f"{name} is {value}; two numbers, before and after, are due")
    return _number(value[0], name), _number(value[1], name)


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value < _LARGEST:
        raise ReplyError(f"{name} is {value}; a number of at least 0 and below {_LARGEST:g} is due")
    return float(value)
