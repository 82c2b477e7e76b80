"""Bytes that go over the air, counted as MergeSFL's released code counts them.

Up and down are seen from the device: features, labels and bottoms go up, gradients and bottoms come down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PARAMETER_BYTES = 4  # float32
LABEL_BYTES = 2  # as the released code counts a label


@dataclass
class Traffic:
    """Bytes so far.

    Attributes
    ----------
    up_bytes, down_bytes
        From the devices to the server, and back.
    """

    up_bytes: int = 0
    down_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Both directions."""
        return self.up_bytes + self.down_bytes

    def add(self, up_bytes: int = 0, down_bytes: int = 0) -> None:
        """Count further bytes."""
        self.up_bytes += up_bytes
        self.down_bytes += down_bytes


def round_traffic(bottom_parameters: int, tau: int, batch_sizes: Sequence[int], feature_bytes: int) -> Traffic:
    """Return one round's bytes by direction.

    Parameters
    ----------
    bottom_parameters
        |w_b|, weights of the bottom.
    tau
        Iterations a round.
    batch_sizes
        d_i of every worker in the cohort, samples an iteration.
    feature_bytes
        c, bytes of one sample's feature; its gradient has as many.
    """
    bottoms = len(batch_sizes) * bottom_parameters * PARAMETER_BYTES
    samples = tau * sum(batch_sizes)
    return Traffic(
        up_bytes=bottoms + samples * (feature_bytes + LABEL_BYTES), down_bytes=bottoms + samples * feature_bytes
    )


def round_bytes(bottom_parameters: int, tau: int, batch_sizes: Sequence[int], feature_bytes: int) -> int:
    """Return one round's bytes, sum_i [2 |w_b| 4 + tau d_i (2 c + 2)]; see :func:`round_traffic`."""
    return round_traffic(bottom_parameters, tau, batch_sizes, feature_bytes).total_bytes
