"""A test set for data that come without one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_edge.data.config import SourceConfig
from fl_edge.errors import DataError
from fl_edge.seeding import derive_seed

Ints = NDArray[np.int64]


def hold_out(labels: Ints, config: SourceConfig, seed: int) -> tuple[Ints, Ints]:
    """Return rows to train on and to test on, both ascending; the test set has as much of every class as the whole.

    Parameters
    ----------
    labels
        int64 (n,), one a sample.
    config
        ``test_fraction`` says how much is tested on.
    seed
        Of the experiment.

    Raises
    ------
    DataError
        A class that is too small to be cut.
    """
    from sklearn.model_selection import train_test_split  # noqa: PLC0415 - heavy

    state = derive_seed(seed, "data", "split") % 2**32  # scikit-learn takes 32 bits
    try:
        train, test = train_test_split(
            np.arange(len(labels)), test_size=config.test_fraction, stratify=labels, random_state=state
        )
    except ValueError as error:
        raise DataError(
            f"test_fraction={config.test_fraction} of {len(labels)} samples cannot be cut off class by class: {error}"
        ) from None
    return np.sort(train), np.sort(test)
