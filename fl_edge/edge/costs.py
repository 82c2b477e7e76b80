"""What work costs on an emulated device, and the clock that adds it up.

Source: MergeSFL (ICDE 2024). A worker spends ``mu_i`` seconds a sample on forward and backward of its bottom and
``beta_i`` seconds a sample on features up and gradients down; an iteration ends when the slowest worker is through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fl_edge.edge.config import EdgeConfig
from fl_edge.edge.profiles import DeviceProfile


def compute_seconds_per_sample(profile: DeviceProfile, config: EdgeConfig) -> float:
    """Return mu_i = mu_ref / speed (ours), in seconds a sample."""
    return config.reference_s_per_sample / profile.speed


def macs_per_second(profile: DeviceProfile, config: EdgeConfig) -> float:
    """Return how many multiply-adds a device does in a second: those of speed 1 times its speed (ours)."""
    return 1e9 * config.reference_gmacs * profile.speed


def transfer_seconds_per_sample(profile: DeviceProfile, feature_bytes: int) -> float:
    """Return beta_i = 2 * 8 c / bandwidth: c bytes of feature up and as many of gradient down, in seconds a sample."""
    return 2 * 8 * feature_bytes / profile.bandwidth_bps


def bandwidth_bps(transfer_s: float, feature_bytes: int) -> float:
    """Return the bandwidth, bits a second, behind a reported beta_i: :func:`transfer_seconds_per_sample` undone."""
    return 2 * 8 * feature_bytes / transfer_s


def measured_transfer_seconds(turnaround_s: float, handled_s: float) -> float:
    """Return what an exchange took beyond the device's own work, in seconds (ours).

    Parameters
    ----------
    turnaround_s
        Seconds from sending the message to the arrival of its reply, by the server's clock.
    handled_s
        Seconds that the device spent on the message, by its own clock. As clocks differ, it may be more than the
        turnaround; then nothing is left for the transfer.
    """
    return max(0.0, turnaround_s - handled_s)


def bottom_transfer_seconds(bottom_bytes: int, bandwidth_bps: float) -> float:
    """Return the seconds that a bottom of ``bottom_bytes`` takes down to a worker and up again, once a round (ours)."""
    return 2 * 8 * bottom_bytes / bandwidth_bps


def iteration_seconds(
    batch_sizes: Sequence[int],
    compute_s: Sequence[float],
    transfer_s: Sequence[float],
    config: EdgeConfig,
) -> float:
    """Return max_i d_i (mu_i + beta_i) + the top's time for sum(d) samples.

    Parameters
    ----------
    batch_sizes, compute_s, transfer_s
        d_i in samples, mu_i and beta_i in seconds a sample; one entry a worker, in the same order, at least one.
    config
        For the top's seconds a sample.
    """
    slowest = max(d * (mu + beta) for d, mu, beta in zip(batch_sizes, compute_s, transfer_s, strict=True))
    return slowest + config.top_s_per_sample * sum(batch_sizes)


@dataclass
class VirtualClock:
    """Virtual seconds since the run began. What runs in parallel is added by its slowest, by the caller."""

    now_s: float = 0.0

    def advance(self, seconds: float) -> float:
        """Go on by a duration of at least 0 s and return the new time.

        Raises
        ------
        ValueError
            A negative duration or one that is not a number: time does not run backwards.
        """
        if not seconds >= 0:
            raise ValueError(f"the clock cannot go on by {seconds} s")
        self.now_s += seconds
        return self.now_s
