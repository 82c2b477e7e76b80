"""What the control module knows about the workers at the beginning of a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_edge.errors import ReplyError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Histograms travel as float32 now and then; anything further from 1 is not a distribution.
_SUM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Workers:
    """State of N workers as a structure of arrays; row i is the same worker everywhere.

    Parameters
    ----------
    labels
        V, float64 (N, C): label distribution of each worker, rows sum to 1.
    samples
        n, int64 (N,): local samples, at least 1.
    compute_s
        mu, float64 (N,): estimated seconds a sample, bottom model forward and backward.
    transfer_s
        beta, float64 (N,): estimated seconds a sample, feature up and gradient down.
    participation
        K, int64 (N,): rounds the worker has completed.

    Raises
    ------
    ReplyError
        A value that no worker can have; the message names the first worker concerned.
    """

    labels: Floats
    samples: Ints
    compute_s: Floats
    transfer_s: Floats
    participation: Ints

    def __post_init__(self) -> None:
        for name, kind in (
            ("labels", np.float64),
            ("samples", np.int64),
            ("compute_s", np.float64),
            ("transfer_s", np.float64),
            ("participation", np.int64),
        ):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        if self.labels.ndim != 2 or 0 in self.labels.shape:
            raise ReplyError(f"labels has shape {self.labels.shape}; it must be (workers, classes), at least 1 of each")
        for name in ("samples", "compute_s", "transfer_s", "participation"):
            if getattr(self, name).shape != (len(self),):
                raise ReplyError(f"{name} has shape {getattr(self, name).shape}; it must be ({len(self)},)")
        sums = self.labels.sum(axis=1)
        smallest = self.labels.min(axis=1)
        _refuse(smallest < 0, smallest, "a label share of {}; it must be at least 0")
        # negated comparisons: NaN fails them
        _refuse(~(np.abs(sums - 1) <= _SUM_TOLERANCE), sums, "label shares that sum to {}; the sum must be 1")
        _refuse(self.samples < 1, self.samples, "{} samples; it must have at least 1")
        mu, beta = self.compute_s, self.transfer_s
        _refuse(~((mu > 0) & np.isfinite(mu)), mu, "compute_s={}; it must be a positive number of seconds")
        _refuse(~((beta >= 0) & np.isfinite(beta)), beta, "transfer_s={}; it must be a number of seconds, at least 0")
        _refuse(self.participation < 0, self.participation, "participation={}; it must be at least 0")

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    @property
    def cost_s(self) -> Floats:
        """Seconds that one sample takes on each worker, mu + beta, (N,)."""
        return self.compute_s + self.transfer_s


def _refuse(wrong: Bools, values: NDArray[Any], message: str) -> None:
    """Raise for the first worker that is marked wrong."""
    if wrong.any():
        worker = int(np.argmax(wrong))
        raise ReplyError(f"worker {worker} has " + message.format(values[worker]))
