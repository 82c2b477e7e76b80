"""One round of MergeSFL in numbers, for people (a line) and for programs (a record)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Lost:
    """A worker that did not finish its round."""

    device: str
    step: int  # iteration, from 0; tau for the last message
    why: str


@dataclass(frozen=True)
class RoundReport:
    """What happened in one round. Virtual seconds are the device profiles'; real seconds are this machine's."""

    server_round: int
    learning_rate: float
    train_loss: float  # mean over the merged batches
    train_accuracy: float
    test_accuracy: float | None
    test_loss: float | None
    kl: float  # of the merged label mix against the reference, as planned
    kl_reached: bool
    label_mix: list[float]
    reference: list[float]
    devices: list[str]
    batch_sizes: list[int]
    iteration_s: list[float]  # of each device: d_i (mu_i + beta_i), virtual or measured
    waiting_s: float  # mean over the cohort, of the whole round
    virtual_s: float | None  # since the first round; None where time is measured
    real_s: float  # of this round
    up_bytes: int  # of this round, devices to server
    down_bytes: int
    lost: list[Lost]
    aborted: int = 0  # iterations without an update of the top model

    def to_record(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RoundReport:
        """Undo :meth:`to_record`."""
        return cls(**{**record, "lost": [Lost(**lost) for lost in record["lost"]]})

    def scalars(self) -> dict[str, float | None]:
        """Return what TensorBoard follows over the rounds."""
        return {
            "accuracy/test": self.test_accuracy,
            "accuracy/merged_batches": self.train_accuracy,
            "loss/test": self.test_loss,
            "loss/merged_batches": self.train_loss,
            "control/kl": self.kl,
            "control/cohort": len(self.devices),
            "control/lost": len(self.lost),
            "control/learning_rate": self.learning_rate,
            "time/waiting_s": self.waiting_s,
            "time/virtual_s": self.virtual_s,
            "time/real_s_of_round": self.real_s,
            "traffic/up_bytes": self.up_bytes,
            "traffic/down_bytes": self.down_bytes,
        }

    def histograms(self) -> dict[str, Sequence[float]]:
        """Return what TensorBoard shows of the devices."""
        return {"devices/batch_size": self.batch_sizes, "devices/iteration_s": self.iteration_s}

    def line(self, rounds: int, left_s: float) -> str:
        """Return the round as one line of text; ``left_s`` is the time that the remaining rounds may take."""
        tested = "" if self.test_accuracy is None else f"acc {self.test_accuracy:.3f}  "
        tested += "" if self.test_loss is None else f"loss {self.test_loss:.3f}  "
        minutes, seconds = divmod(round(left_s), 60)
        clock = "" if self.virtual_s is None else f"virtual {self.virtual_s:8.1f} s  "
        gone = f"  lost {len(self.lost)}" if self.lost else ""
        return (
            f"round {self.server_round:>{len(str(rounds))}}/{rounds}  {tested}KL {self.kl:.4f}  "
            f"cohort {len(self.devices):>2}  batch {min(self.batch_sizes):>2}-{max(self.batch_sizes):<3}  "
            f"waiting {self.waiting_s:6.2f} s  {clock}{_megabytes(self.up_bytes + self.down_bytes)}"
            f"{gone}  left {minutes}:{seconds:02}"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:6.2f} MB"


def summarise(reports: Sequence[RoundReport]) -> dict[str, Any]:
    """Return the figures of a whole run: what result.json and the closing table hold."""
    last = reports[-1]
    tested = [report.test_accuracy for report in reports if report.test_accuracy is not None]
    return {
        "rounds": last.server_round,
        "test_accuracy": last.test_accuracy,
        "best_test_accuracy": max(tested, default=None),
        "test_loss": last.test_loss,
        "kl_above_target": sum(not report.kl_reached for report in reports),
        "kl_mean": fmean(report.kl for report in reports),
        "cohort_mean": fmean(len(report.devices) for report in reports),
        "batch_size_min": min(min(report.batch_sizes) for report in reports),
        "batch_size_max": max(max(report.batch_sizes) for report in reports),
        "waiting_s_mean": fmean(report.waiting_s for report in reports),
        "virtual_s": last.virtual_s,
        "real_s": sum(report.real_s for report in reports),
        "up_bytes": sum(report.up_bytes for report in reports),
        "down_bytes": sum(report.down_bytes for report in reports),
        "lost": sum(len(report.lost) for report in reports),
        "aborted": sum(report.aborted for report in reports),
    }
