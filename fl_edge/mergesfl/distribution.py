"""Label distribution of the merged batch, and how far it is from the reference (MergeSFL, eqs. 11-12)."""

from __future__ import annotations

import numpy as np

from fl_edge.mergesfl.workers import Floats, Ints

EPS = 1e-12  # inside the logarithm: a class without samples costs nothing and raises nothing


def reference_mix(labels: Floats) -> Floats:
    """Return Phi_0, the unweighted mean of all label distributions, (C,)."""
    return np.asarray(labels.mean(axis=0))


def label_mix(labels: Floats, batch_sizes: Ints | Floats) -> Floats:
    """Return Phi = sum_i d_i V_i / sum_i d_i of a cohort (eq. 11).

    Parameters
    ----------
    labels
        V of the cohort, (m, C).
    batch_sizes
        d, (m,), or many alternatives at once, (..., m).

    Returns
    -------
    (C,), or (..., C).
    """
    return np.asarray(batch_sizes @ labels / batch_sizes.sum(axis=-1, keepdims=True))


def kl_divergence(mix: Floats, reference: Floats) -> Floats:
    """Return KL(Phi || Phi_0) = sum_j phi_j log(phi_j / phi_0j) in nats, over the last axis (eq. 12)."""
    return np.asarray(np.einsum("...j,...j->...", mix, np.log((mix + EPS) / (reference + EPS))))


def kl_gradient(labels: Floats, batch_sizes: Ints | Floats, reference: Floats) -> Floats:
    """Return dKL / dd_i = sum_j (V_ij - phi_j) log(phi_j / phi_0j) / sum_k d_k, (m,) (section 4.5)."""
    mix = batch_sizes @ labels / batch_sizes.sum()
    return np.asarray((labels - mix) @ np.log((mix + EPS) / (reference + EPS)) / batch_sizes.sum())
