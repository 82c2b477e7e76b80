"""What happens with each round's report: a line on the terminal, a record and a checkpoint, TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from torch import Tensor

from fl_edge.checkpoints import save_checkpoint
from fl_edge.errors import RunFolderError
from fl_edge.runs import RunFolder


class Report(Protocol):
    """One round of any system, in numbers."""

    @property
    def server_round(self) -> int:
        """Counted from 1."""

    @property
    def real_s(self) -> float:
        """Seconds that the round took on this machine."""

    def to_record(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""

    def line(self, rounds: int, left_s: float) -> str:
        """Return the round as one line of text; ``left_s`` is the time that the remaining rounds may take."""

    def scalars(self) -> Mapping[str, float | None]:
        """Return what is followed over the rounds, by name; None is left out."""

    def histograms(self) -> Mapping[str, Sequence[float]]:
        """Return what has one value a device, by name."""


class Lines:
    """Writes one line a round, with the time that is left as the rounds so far suggest."""

    def __init__(self, rounds: int, write: Callable[[str], None]) -> None:
        self.rounds = rounds
        self._write = write
        self._real_s: list[float] = []

    def __call__(self, report: Report) -> None:
        """Write the line of a round."""
        self._real_s.append(report.real_s)
        usual_s = fmean(self._real_s[1:] or self._real_s)  # the first round waits for processes to start
        self._write(report.line(self.rounds, usual_s * (self.rounds - report.server_round)))


class Recorder:
    """Keeps rounds.jsonl and the checkpoints of a run folder.

    Parameters
    ----------
    snapshot
        Returns (weights, record): all that the next round depends on.
    """

    def __init__(self, folder: RunFolder, snapshot: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        self.folder = folder
        self._snapshot = snapshot

    def __call__(self, report: Report) -> None:
        """Record a round. The record comes first: a checkpoint never knows a round that rounds.jsonl does not."""
        self.folder.add_round(report.to_record())
        save_checkpoint(self.folder.checkpoints, report.server_round, *self._snapshot())


class TensorBoard:
    """Writes scalars of every round and histograms over its devices.

    Parameters
    ----------
    path
        Folder of the event files.
    first_round
        Events of this round and later, left by a run that was killed, are hidden.
    """

    def __init__(self, path: Path, first_round: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - takes seconds to import

        try:
            self._writer = SummaryWriter(str(path), purge_step=first_round)
        except OSError as error:
            raise RunFolderError(f"cannot write TensorBoard events in {path}: {error.strerror}") from None
        self._path = path

    def __enter__(self) -> Self:
        """Return the observer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close the event file."""
        try:
            self._writer.close()
        except OSError:  # a disk that is full now was reported by the round that met it
            return

    def __call__(self, report: Report) -> None:
        """Write the events of a round."""
        try:
            for name, value in report.scalars().items():
                if value is not None:
                    self._writer.add_scalar(name, value, report.server_round)
            for name, values in report.histograms().items():
                self._writer.add_histogram(name, np.array(values), report.server_round)
            self._writer.flush()
        except OSError as error:
            raise RunFolderError(f"cannot write TensorBoard events in {self._path}: {error.strerror}") from None
