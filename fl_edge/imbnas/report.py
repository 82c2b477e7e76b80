"""A federated search in numbers, for people (lines, a table) and for programs (records)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fl_edge.imbnas.config import TailConfig
from fl_edge.imbnas.search import History, Scored, winner
from fl_edge.imbnas.space import Architecture
from fl_edge.imbnas.tally import Tally, group_accuracies

FOUND, UNADAPTED, FIXED = "found together", "no adaptation (P0)", "small ResNet"  # who is compared


@dataclass(frozen=True)
class ImbNasRound:
    """One round of training, or one generation of a search.

    Attributes
    ----------
    server_round
        From 1, over all phases.
    phase
        ``head``, ``search``, ``search P0`` or ``training``.
    number, of
        Of this round in its phase, from 1, and how many there are at most.
    devices
        That took part.
    absent
        Device -> why it does not count.
    candidates
        Scored in this generation.
    best, score
        The best architecture so far and its score on the validation images of all devices.
    loss
        Mean over devices by images, and over networks.
    accuracy
        Class-mean accuracy of what was found together on the server's test set.
    up_bytes, down_bytes
        Of tensors.
    real_s
        Seconds.
    """

    server_round: int
    phase: str
    number: int
    of: int
    devices: int
    absent: Mapping[str, str] = field(default_factory=dict)
    candidates: int = 0
    best: str = ""
    score: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    up_bytes: int = 0
    down_bytes: int = 0
    real_s: float = 0.0

    def line(self, rounds: int, left_s: float) -> str:
        """Say it in one line, with how many rounds there are in all, and the seconds that are left of its phase."""
        minutes, seconds = divmod(round(left_s), 60)
        said = f"best {self.score:.3f}  {self.best}  " if self.score is not None else ""
        said += f"loss {self.loss:.3f}  " if self.loss is not None else ""
        said += f"balanced accuracy {self.accuracy:.3f}  " if self.accuracy is not None else ""
        gone = f"  without {len(self.absent)}" if self.absent else ""
        place = f"{self.server_round:>{len(str(rounds))}}/{rounds}"
        return (
            f"{place}  {self.phase} {self.number}/{self.of}  {said}{self.devices} devices{gone}  "
            f"{(self.up_bytes + self.down_bytes) / 1e6:.2f} MB  left of it {minutes}:{seconds:02}"
        )

    def scalars(self) -> dict[str, float | None]:
        """Return what is followed over the rounds."""
        values = {"score": self.score, "loss": self.loss, "accuracy": self.accuracy}
        return {f"{self.phase.replace(' ', '_')}/{name}": value for name, value in values.items()}

    def histograms(self) -> dict[str, Sequence[float]]:
        """Return nothing: no value a device is kept."""
        return {}

    def to_record(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {**dataclasses.asdict(self), "absent": dict(self.absent)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ImbNasRound:
        """Undo :meth:`to_record`."""
        return cls(**record)


class PhaseLines:
    """Writes one line a round, with the time that is left of its phase as the phase's rounds so far suggest."""

    def __init__(self, rounds: int, write: Callable[[str], None]) -> None:
        self.rounds, self._write = rounds, write
        self._phase, self._real_s = "", list[float]()

    def __call__(self, report: ImbNasRound) -> None:
        """Write the line of a round."""
        if report.phase != self._phase:
            self._phase, self._real_s = report.phase, []
        self._real_s.append(report.real_s)
        self._write(report.line(self.rounds, fmean(self._real_s) * (report.of - report.number)))


@dataclass(eq=False)
class ImbNasReport:
    """What came of a federated search.

    Attributes
    ----------
    classes
        Names.
    counts
        n_c of the training images of all devices, int64 (C,).
    histories
        Search -> what it scored: ``search``, and ``search P0`` where it was made.
    names
        Architecture -> what it looks like.
    contenders
        Who was trained in the end.
    confusions
        Contender -> its confusion matrix on the server's test set, int64 (C, C).
    costs
        Contender -> multiply-adds of one image.
    lost
        Device -> why it took no part in the search from then on.
    """

    classes: Sequence[str]
    counts: Tensor
    histories: dict[str, History] = field(default_factory=dict)
    names: dict[Architecture, str] = field(default_factory=dict)
    contenders: dict[str, Architecture] = field(default_factory=dict)
    confusions: dict[str, Tensor] = field(default_factory=dict)
    costs: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    up_bytes: int = 0
    down_bytes: int = 0

    @property
    def winner(self) -> Scored:
        """The architecture that was found, with its score."""
        return winner(self.histories["search"])

    def row(self, contender: str, tail: TailConfig) -> dict[str, float]:
        """Return what a contender gets right on the test set: ``balanced``, ``accuracy``, and by class group."""
        tally = Tally.from_confusion(self.confusions[contender])
        groups = group_accuracies(tally, self.counts, tail)
        return {"balanced": tally.balanced, "accuracy": tally.accuracy, **groups}

    def pairs(self) -> list[tuple[Architecture, float, float]]:
        """Return the architectures that both searches scored: without adaptation, and with it."""
        before = {entry.architecture: entry.score for entry in self.histories.get("search P0", ())}
        after = self.histories["search"]
        return [(e.architecture, before[e.architecture], e.score) for e in after if e.architecture in before]

    def summary(self, tail: TailConfig) -> dict[str, Any]:
        """Return the figures of a whole run: what result.json holds."""
        contenders = {
            name: {
                "architecture": list(architecture),
                "blocks": self.names[architecture],
                "multiply_adds": self.costs[name],
                **(self.row(name, tail) if name in self.confusions else {}),
            }
            for name, architecture in self.contenders.items()
        }
        return {
            "counts": self.counts.tolist(),
            "winner": list(self.winner.architecture),
            "score": self.winner.score,
            "scored": {name: len(history) for name, history in self.histories.items()},
            "contenders": contenders,
            "confusion": {name: matrix.tolist() for name, matrix in self.confusions.items()},
            "lost": dict(self.lost),
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
        }


def write_history(history: Sequence[Scored]) -> list[list[Any]]:
    """Return a history as plain values."""
    return [[list(entry.architecture), entry.score, entry.generation] for entry in history]


def read_history(record: Sequence[Sequence[Any]]) -> list[Scored]:
    """Undo :func:`write_history`."""
    return [Scored(tuple(architecture), float(score), int(number)) for architecture, score, number in record]


def total_counts(parts: Sequence[Sequence[int]], classes: int) -> Tensor:
    """Return the sum of images by class over devices, int64 (C,)."""
    return torch.tensor([list(part) for part in parts] or [[0] * classes], dtype=torch.int64).sum(0)
