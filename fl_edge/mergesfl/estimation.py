"""How fast a worker is, estimated from what it reports (MergeSFL, eqs. 5-6)."""

from __future__ import annotations

from fl_edge.edge.costs import measured_transfer_seconds


def smooth(previous: float | None, observed: float, a: float) -> float:
    """Return the new estimate of mu_i or beta_i, in seconds a sample (eqs. 5-6).

    Parameters
    ----------
    previous
        The estimate of the round before, or nothing: then the observation is the estimate.
    observed
        What the worker measured.
    a
        Weight of the past, in [0, 1].
    """
    return observed if previous is None else a * previous + (1.0 - a) * observed


def measured_transfer_s(turnaround_s: float, handled_s: float, batch_size: int) -> float:
    """Return beta_i of one exchange as it was measured, in seconds a sample.

    What is no work of the worker's counts as transfer: gradient down, features up, and all that lies between. The
    formula is ours.

    Parameters
    ----------
    turnaround_s, handled_s
        See :func:`fl_edge.edge.costs.measured_transfer_seconds`.
    batch_size
        Samples in the exchange, at least 1.
    """
    return measured_transfer_seconds(turnaround_s, handled_s) / batch_size
