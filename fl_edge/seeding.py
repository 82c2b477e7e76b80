"""Random draws that depend on (seed, round, client) and on nothing else.

A draw made from a running generator changes with the order of execution; one made from its own coordinates is the same
in any runtime, on any process, and after a resume. Every draw in fl_edge goes through these three functions.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *path: int | str) -> int:
    """Return the 63-bit seed of one place in the run.

    Parameters
    ----------
    seed
        The experiment's seed.
    path
        What the draw is for, for example ``("batches", round, device)``. Different paths give independent streams.
    """
    text = "\x1f".join([str(int(seed)), *(str(part) for part in path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def numpy_rng(seed: int, *path: int | str) -> np.random.Generator:
    """Return a fresh numpy generator for one place in the run (see :func:`derive_seed`)."""
    return np.random.default_rng(derive_seed(seed, *path))


def torch_rng(seed: int, *path: int | str) -> torch.Generator:
    """Return a fresh torch generator on the CPU for one place in the run (see :func:`derive_seed`)."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))
