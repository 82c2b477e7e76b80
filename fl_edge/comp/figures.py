"""Figures of a model before and after pruning, measured on the device that keeps it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fl_edge.comp.measures import Measures, measure
from fl_edge.comp.memory import peak_bytes
from fl_edge.comp.outcome import Figures


def measured(base: Path, pruned: Path, test: Tensor, device: torch.device) -> Figures:
    """Return what pruning changed; one model after the other is in memory, if it fits into half of what is free.

    Parameters
    ----------
    base, pruned
        Folders of the models.
    test
        (s, n) int64.
    device
        Where the models compute.

    Raises
    ------
    DataError
        A damaged folder.
    """
    peak = peak_bytes(device)["resident"]  # of the pruning: whole models come after it
    before, after = (measure(folder, test, device) for folder in (base, pruned))
    return Figures(
        parameters=(before.parameters, after.parameters),
        perplexity=(before.perplexity or 0.0, after.perplexity or 0.0),
        latency_s=(_latency(before), _latency(after)),
        memory_bytes=(before.memory_bytes, after.memory_bytes),
        peak_bytes=peak,
    )


def _latency(measures: Measures) -> float:
    return (measures.decode_ms or 0.0) / 1e3
