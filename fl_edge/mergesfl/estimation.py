"""How fast a worker is, estimated from what it reports (MergeSFL, eqs. 5-6)."""

from __future__ import annotations


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
