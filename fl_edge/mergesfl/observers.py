"""What happens with each round's report: a line on the terminal, a record and a checkpoint, TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor

from fl_edge.checkpoints import save_checkpoint
from fl_edge.errors import RunFolderError
from fl_edge.mergesfl.report import RoundReport
from fl_edge.runs import RunFolder


class Lines:
    """Writes one line a round, with the time that is left as the rounds so far suggest."""

    def __init__(self, rounds: int, write: Callable[[str], None]) -> None:
        self.rounds = rounds
        self._write = write
        self._real_s: list[float] = []

    def __call__(self, report: RoundReport) -> None:
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

    def __call__(self, report: RoundReport) -> None:
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

    def __call__(self, report: RoundReport) -> None:
        """Write the events of a round."""
        scalars = {
            "accuracy/test": report.test_accuracy,
            "accuracy/merged_batches": report.train_accuracy,
            "loss/test": report.test_loss,
            "loss/merged_batches": report.train_loss,
            "control/kl": report.kl,
            "control/cohort": len(report.devices),
            "control/lost": len(report.lost),
            "control/learning_rate": report.learning_rate,
            "time/waiting_s": report.waiting_s,
            "time/virtual_s": report.virtual_s,
            "time/real_s_of_round": report.real_s,
            "traffic/up_bytes": report.up_bytes,
            "traffic/down_bytes": report.down_bytes,
        }
        try:
            for name, value in scalars.items():
                if value is not None:
                    self._writer.add_scalar(name, value, report.server_round)
            self._writer.add_histogram("devices/batch_size", np.array(report.batch_sizes), report.server_round)
            self._writer.add_histogram("devices/iteration_s", np.array(report.iteration_s), report.server_round)
            self._writer.flush()
        except OSError as error:
            raise RunFolderError(f"cannot write TensorBoard events in {self._path}: {error.strerror}") from None
