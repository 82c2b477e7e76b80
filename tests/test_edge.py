from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.config import check, resolve
from fl_edge.edge.config import EdgeConfig
from fl_edge.edge.costs import (
    VirtualClock,
    bottom_transfer_seconds,
    compute_seconds_per_sample,
    iteration_seconds,
    transfer_seconds_per_sample,
)
from fl_edge.edge.profiles import (
    DISTANCES_M,
    MODES,
    DeviceProfile,
    deal_distances,
    deal_kinds,
    device_profile,
    distance_level_bps,
    mode_speed,
)
from fl_edge.edge.traffic import Traffic, round_bytes, round_traffic
from fl_edge.errors import ConfigError

CONFIG = EdgeConfig()
RANGES = {"tx2": (0.01, 0.04), "nx": (0.06, 0.35), "agx": (0.10, 1.0)}


def test_the_papers_test_bed_is_dealt_exactly() -> None:
    assert Counter(deal_kinds(CONFIG, 1, 80)) == {"tx2": 30, "nx": 40, "agx": 10}
    assert Counter(deal_distances(1, 80)) == {2: 20, 8: 20, 14: 20, 20: 20}
    assert deal_kinds(CONFIG, 1, 80) != deal_kinds(CONFIG, 2, 80)


@given(
    seed=st.integers(0, 2**40),
    num_devices=st.integers(1, 200),
    mix=st.tuples(*[st.integers(0, 60)] * 3).filter(any),
)
def test_mix_holds_to_the_largest_remainder(seed: int, num_devices: int, mix: tuple[int, int, int]) -> None:
    kinds = Counter(deal_kinds(EdgeConfig(tx2=mix[0], nx=mix[1], agx=mix[2]), seed, num_devices))
    assert sum(kinds.values()) == num_devices
    for kind, share in zip(("tx2", "nx", "agx"), mix, strict=True):
        assert abs(kinds[kind] - num_devices * share / sum(mix)) < 1
    groups = Counter(deal_distances(seed, num_devices))
    assert max(groups.values()) - min(groups[metres] for metres in DISTANCES_M) <= 1


@settings(max_examples=60)
@given(seed=st.integers(0, 2**40), num_devices=st.integers(1, 100), server_round=st.integers(1, 500), data=st.data())
def test_profiles_stay_in_their_ranges(seed: int, num_devices: int, server_round: int, data: st.DataObject) -> None:
    device = data.draw(st.integers(0, num_devices - 1))
    profile = device_profile(CONFIG, seed, device, num_devices, server_round)
    low, high = RANGES[profile.kind]
    assert low <= profile.speed <= high
    assert 0 <= profile.mode < MODES[profile.kind]
    assert 1e6 <= profile.bandwidth_bps <= 30e6
    assert profile == device_profile(CONFIG, seed, device, num_devices, server_round)
    first = (server_round - 1) // 20 * 20 + 1
    assert device_profile(CONFIG, seed, device, num_devices, first).mode == profile.mode
    assert DeviceProfile(**json.loads(json.dumps(asdict(profile)))) == profile


def test_speeds_of_the_modes() -> None:
    speeds = {kind: [mode_speed(CONFIG, kind, mode) for mode in range(count)] for kind, count in MODES.items()}
    for kind, (low, high) in RANGES.items():
        assert (speeds[kind][0], speeds[kind][-1]) == (low, high)
        ratios = [b / a for a, b in zip(speeds[kind], speeds[kind][1:], strict=False)]
        assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert speeds["agx"][-1] / speeds["tx2"][0] == pytest.approx(100)
    drawn = [device_profile(CONFIG, 1, device, 80, 1).speed for device in range(80)]
    assert 25 <= max(drawn) / min(drawn) <= 100.001


def test_modes_are_drawn_anew_after_twenty_rounds() -> None:
    def modes(server_round: int) -> list[int]:
        return [device_profile(CONFIG, 1, device, 80, server_round).mode for device in range(80)]

    assert modes(1) == modes(20)
    assert modes(20) != modes(21)


def test_bandwidth_falls_with_distance_and_varies_by_round() -> None:
    assert [round(distance_level_bps(CONFIG, metres) / 1e6, 1) for metres in DISTANCES_M] == [19.6, 8.4, 3.6, 1.5]
    means: dict[int, list[float]] = {metres: [] for metres in DISTANCES_M}
    for device in range(40):
        drawn = [device_profile(CONFIG, 1, device, 40, server_round) for server_round in range(1, 11)]
        assert len({profile.bandwidth_bps for profile in drawn}) > 1
        assert len({profile.distance_m for profile in drawn}) == 1
        means[drawn[0].distance_m] += [profile.bandwidth_bps for profile in drawn]
    averages = [sum(values) / len(values) for values in means.values()]
    assert averages == sorted(averages, reverse=True)


def test_a_fixed_bandwidth() -> None:
    config = EdgeConfig(bandwidth_low_mbps=5, bandwidth_high_mbps=5)
    assert {device_profile(config, 1, d, 8, r).bandwidth_bps for d in range(8) for r in (1, 2)} == {5e6}


def test_kind_and_mode_can_be_given() -> None:
    profile = device_profile(CONFIG, 1, 0, 4, 1, kind="agx", mode=7)
    assert (profile.kind, profile.mode, profile.speed) == ("agx", 7, 1.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device": 4}, "device 4 is not on the test bed; with 4 devices it must be at least 0 and below 4"),
        ({"device": -1}, "device -1 is not on the test bed"),
        ({"kind": "nano"}, "device kind nano is not known; it must be one of tx2, nx, agx"),
        ({"kind": "tx2", "mode": 4}, "mode 4 is not there on a tx2; it must be at least 0 and below 4"),
    ],
)
def test_devices_that_are_not_there(changes: dict[str, object], says: str) -> None:
    arguments = {"device": 0, "num_devices": 4, "server_round": 1} | changes
    with pytest.raises(ConfigError, match=says):
        device_profile(CONFIG, 1, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"tx2": 0, "nx": 0, "agx": 0}, "at least one kind"),
        ({"nx_slowest": 0.5}, "nx_slowest=0.5 is above nx_fastest=0.35"),
        ({"bandwidth_low_mbps": 31}, "bandwidth_low_mbps=31.0 is above bandwidth_high_mbps=30.0"),
        ({"clock": "atomic"}, "clock=atomic is not allowed; it must be one of virtual, real"),
    ],
)
def test_contradictions_end_in_resolve(overrides: dict[str, object], says: str) -> None:
    check(CONFIG)
    with pytest.raises(ConfigError, match=says):
        resolve(EdgeConfig, None, overrides)


def test_costs() -> None:
    profile = DeviceProfile("tx2", 0, 0.01, 1e6, 20)
    assert compute_seconds_per_sample(profile, CONFIG) == pytest.approx(0.1)
    # the spec's scale check for AlexNet: 262 ms at 1 Mb/s, 8.7 ms at 30 Mb/s
    assert transfer_seconds_per_sample(profile, 16_384) == pytest.approx(0.262, abs=5e-4)
    fast = DeviceProfile("agx", 7, 1.0, 30e6, 2)
    assert transfer_seconds_per_sample(fast, 16_384) == pytest.approx(8.7e-3, abs=5e-5)
    assert bottom_transfer_seconds(1_000_000, 8e6) == pytest.approx(2.0)


def test_an_iteration_lasts_as_long_as_its_slowest_worker() -> None:
    config = EdgeConfig(top_s_per_sample=0.5)
    assert iteration_seconds([2, 3], [1.0, 0.5], [0.5, 0.25], config) == pytest.approx(3.0 + 2.5)


def test_the_clock_goes_forward_and_survives() -> None:
    clock = VirtualClock()
    clock.advance(1.5)
    assert clock.advance(0.25) == 1.75
    assert VirtualClock(**json.loads(json.dumps(asdict(clock)))) == clock
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="cannot go on by"):
            clock.advance(wrong)


@given(
    parameters=st.integers(0, 10**8),
    tau=st.integers(1, 100),
    batch_sizes=st.lists(st.integers(1, 128), min_size=1, max_size=20),
    c=st.integers(1, 10**5),
)
def test_bytes_of_a_round(parameters: int, tau: int, batch_sizes: list[int], c: int) -> None:
    expected = sum(2 * parameters * 4 + tau * d * (2 * c + 2) for d in batch_sizes)
    assert round_bytes(parameters, tau, batch_sizes, c) == expected
    traffic = round_traffic(parameters, tau, batch_sizes, c)
    assert traffic.up_bytes - traffic.down_bytes == 2 * tau * sum(batch_sizes)
    assert traffic.total_bytes == expected


def test_traffic_adds_up_and_survives() -> None:
    traffic = Traffic()
    traffic.add(up_bytes=3, down_bytes=4)
    traffic.add(up_bytes=1)
    assert (traffic.up_bytes, traffic.down_bytes, traffic.total_bytes) == (4, 4, 8)
    assert Traffic(**json.loads(json.dumps(asdict(traffic)))) == traffic
