"""Who a device is on the emulated test bed: its kind, its power mode, its place in the room.

Source: MergeSFL (ICDE 2024): 80 Jetsons (30 TX2, 40 NX, 10 AGX), modes re-drawn every 20 rounds, four groups at 2, 8,
14 and 20 m from the access point, 1 to 30 Mb/s. *Ours*: the speeds of the single modes and the law of the bandwidth,
see :func:`mode_speed` and :func:`distance_level_bps`.

Every draw depends on (seed, device, round) only, so a profile is the same in any process and after a resume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fl_edge.edge.config import EdgeConfig
from fl_edge.errors import ConfigError
from fl_edge.seeding import numpy_rng

MODES = {"tx2": 4, "nx": 8, "agx": 8}  # power modes of each kind of Jetson
DISTANCES_M = (2, 8, 14, 20)  # of the four WiFi groups


@dataclass(frozen=True)
class DeviceProfile:
    """What one device can do in one round.

    Attributes
    ----------
    kind
        A key of :data:`MODES`.
    mode
        Power mode, 0 (slowest) to ``MODES[kind] - 1`` (fastest).
    speed
        Relative to the fastest mode of the fastest kind.
    bandwidth_bps
        Bits a second, in either direction.
    distance_m
        Metres to the access point.
    """

    kind: str
    mode: int
    speed: float
    bandwidth_bps: float
    distance_m: int


def deal_kinds(config: EdgeConfig, seed: int, num_devices: int) -> list[str]:
    """Return the kind of every device: the mix exactly (largest remainder), in a seeded order."""
    shares = {kind: getattr(config, kind) for kind in MODES}
    total = sum(shares.values())
    counts = {kind: num_devices * share // total for kind, share in shares.items()}
    # integers, so that no rounding decides a tie; sorted() is stable, a tie falls to the kind declared first
    by_remainder = sorted(shares, key=lambda kind: -(num_devices * shares[kind] % total))
    for kind in by_remainder[: num_devices - sum(counts.values())]:
        counts[kind] += 1
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    return [kinds[place] for place in numpy_rng(seed, "edge", "kinds").permutation(num_devices)]


def deal_distances(seed: int, num_devices: int) -> list[int]:
    """Return every device's distance in metres: four groups of equal size (to within one), in a seeded order."""
    places = numpy_rng(seed, "edge", "distances").permutation(num_devices)
    return [DISTANCES_M[place * len(DISTANCES_M) // num_devices] for place in places]


def mode_speed(config: EdgeConfig, kind: str, mode: int) -> float:
    """Return the relative speed of a power mode: equal ratios from the kind's slowest to its fastest (ours)."""
    slowest, fastest = getattr(config, f"{kind}_slowest"), getattr(config, f"{kind}_fastest")
    step = mode / (MODES[kind] - 1)
    # this form gives both ends exactly
    return float(slowest ** (1 - step) * fastest**step)


def distance_level_bps(config: EdgeConfig, distance_m: int) -> float:
    """Return the level around which bandwidth varies at a distance, in bits a second.

    Ours: ln(bandwidth) from the highest to the lowest value is cut into four equal parts, one for each distance; the
    level is the middle of the part. With 1 to 30 Mb/s that is 19.6, 8.4, 3.6 and 1.5 Mb/s at 2, 8, 14 and 20 m.
    """
    place = (DISTANCES_M.index(distance_m) + 0.5) / len(DISTANCES_M)
    return float(1e6 * config.bandwidth_high_mbps ** (1 - place) * config.bandwidth_low_mbps**place)


def draw_bandwidth_bps(config: EdgeConfig, seed: int, device: int, distance_m: int, server_round: int) -> float:
    """Return one round's bandwidth: log-normal around the level, kept inside the bounds of the config (ours)."""
    noise = numpy_rng(seed, "edge", "bandwidth", device, server_round).standard_normal()
    drawn = distance_level_bps(config, distance_m) * math.exp(config.bandwidth_spread * noise)
    return float(min(max(drawn, 1e6 * config.bandwidth_low_mbps), 1e6 * config.bandwidth_high_mbps))


def device_profile(
    config: EdgeConfig,
    seed: int,
    device: int,
    num_devices: int,
    server_round: int,
    kind: str = "",
    mode: int | None = None,
) -> DeviceProfile:
    """Return what a device can do in one round.

    Parameters
    ----------
    config, seed
        Test bed and experiment.
    device
        Index, 0 to ``num_devices - 1``.
    num_devices
        Devices on the test bed; the mix and the groups are dealt over them.
    server_round
        Counted from 1. The mode is drawn uniformly in rounds 1, 1 + mode_rounds, 1 + 2 mode_rounds, ...
    kind
        Given by the device itself (a SuperNode's node-config); empty: dealt from the mix.
    mode
        Pinned power mode; None: drawn.

    Raises
    ------
    ConfigError
        Device, kind or mode that is not there.
    """
    if not 0 <= device < num_devices:
        raise ConfigError(
            f"device {device} is not on the test bed; with {num_devices} devices it must be at least 0 "
            f"and below {num_devices}"
        )
    if kind and kind not in MODES:
        raise ConfigError(f"device kind {kind} is not known; it must be one of {', '.join(MODES)}")
    kind = kind or deal_kinds(config, seed, num_devices)[device]
    if mode is None:
        block = (server_round - 1) // config.mode_rounds
        mode = int(numpy_rng(seed, "edge", "mode", device, block).integers(MODES[kind]))
    elif not 0 <= mode < MODES[kind]:
        raise ConfigError(f"mode {mode} is not there on a {kind}; it must be at least 0 and below {MODES[kind]}")
    distance = deal_distances(seed, num_devices)[device]
    bandwidth = draw_bandwidth_bps(config, seed, device, distance, server_round)
    return DeviceProfile(kind, mode, mode_speed(config, kind, mode), bandwidth, distance)
