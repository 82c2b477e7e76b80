"""Settings of the emulated edge: which devices there are, how fast they compute, how fast they talk.

Source: MergeSFL (ICDE 2024), section on the test bed: 80 NVIDIA Jetsons, four WiFi distances, modes re-drawn every 20
rounds. *Ours* marks numbers that the paper does not print.
"""

from __future__ import annotations

from dataclasses import dataclass

from fl_edge.config import setting


@dataclass
class EdgeConfig:
    """Emulated devices and network. Speeds are relative: 1 is the fastest mode of the fastest kind."""

    clock: str = setting(
        "virtual", "costs come from the profiles, or are measured on the device", choices=("virtual", "real")
    )

    tx2: int = setting(30, "parts of Jetson TX2 in the mix", low=0)
    nx: int = setting(40, "parts of Jetson Xavier NX in the mix", low=0)
    agx: int = setting(10, "parts of Jetson AGX Xavier in the mix", low=0)
    mode_rounds: int = setting(20, "rounds until every device draws its power mode anew", low=1)

    tx2_slowest: float = setting(0.01, "relative speed of a TX2 in its slowest mode (ours)", low=1e-6)
    tx2_fastest: float = setting(0.04, "relative speed of a TX2 in its fastest mode (ours)", low=1e-6)
    nx_slowest: float = setting(0.06, "relative speed of an NX in its slowest mode (ours)", low=1e-6)
    nx_fastest: float = setting(0.35, "relative speed of an NX in its fastest mode (ours)", low=1e-6)
    agx_slowest: float = setting(0.10, "relative speed of an AGX in its slowest mode (ours)", low=1e-6)
    agx_fastest: float = setting(1.0, "relative speed of an AGX in its fastest mode (ours)", low=1e-6)

    bandwidth_low_mbps: float = setting(1.0, "no link is ever slower, Mb/s", low=1e-3)
    bandwidth_high_mbps: float = setting(30.0, "no link is ever faster, Mb/s", low=1e-3)
    bandwidth_spread: float = setting(
        0.4, "standard deviation of ln(bandwidth) around the level of the device's distance (ours)", low=0.0
    )

    reference_s_per_sample: float = setting(
        1e-3, "mu_ref: seconds for forward and backward of the bottom on one sample at speed 1 (ours)", low=0.0
    )
    top_s_per_sample: float = setting(
        1e-5, "seconds for forward and backward of the top on one sample, on the server (ours)", low=0.0
    )
    reference_gmacs: float = setting(
        200.0, "billions of multiply-adds a second at speed 1, for work that is counted in them (ours)", low=1e-6
    )
    count_bottom_transfer: bool = setting(True, "the clock counts the bottoms' way down and up, once a round (ours)")

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        if self.tx2 + self.nx + self.agx == 0:
            return "tx2, nx and agx are all 0; at least one kind of device must be there"
        for kind in ("tx2", "nx", "agx"):
            slowest, fastest = getattr(self, f"{kind}_slowest"), getattr(self, f"{kind}_fastest")
            if slowest > fastest:
                return f"{kind}_slowest={slowest} is above {kind}_fastest={fastest}"
        if self.bandwidth_low_mbps > self.bandwidth_high_mbps:
            return (
                f"bandwidth_low_mbps={self.bandwidth_low_mbps} is above bandwidth_high_mbps={self.bandwidth_high_mbps}"
            )
        return None
