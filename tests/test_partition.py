from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.data.config import DataConfig
from fl_edge.data.images import load_train
from fl_edge.data.partition import device_indices, load_device
from fl_edge.errors import DataError
from fl_edge.seeding import numpy_rng

DIGITS = load_train(DataConfig(), 1).labels.numpy()


def shares(num_devices: int, config: DataConfig, labels: np.ndarray = DIGITS) -> np.ndarray:
    """Samples by device and class."""
    devices = device_indices(labels, num_devices, config, 1)
    return np.array([np.bincount(labels[indices], minlength=10) for indices in devices])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    num_devices=st.integers(1, 12),
    classes=st.integers(2, 6),
    samples=st.integers(60, 200),
    partition=st.sampled_from(["dirichlet", "pathological", "iid", "dominant"]),
    alpha=st.sampled_from([0.1, 0.5, 10.0]),
    rho=st.floats(0, 1),
    least=st.integers(1, 4),
)
def test_partitions_are_complete_disjoint_and_repeatable(
    seed: int, num_devices: int, classes: int, samples: int, partition: str, alpha: float, rho: float, least: int
) -> None:
    labels = numpy_rng(seed, "labels").integers(classes, size=samples)
    config = DataConfig(partition=partition, alpha=alpha, dominant_share=rho, min_samples=least)
    try:
        devices = device_indices(labels, num_devices, config, seed)
    except DataError as error:
        if partition == "iid" or "\n" in str(error):
            raise
        return
    assert len(devices) == num_devices
    assert all(indices.dtype == np.int64 and len(indices) >= least for indices in devices)
    assert sorted(np.concatenate(devices).tolist()) == list(range(samples))
    again = device_indices(labels, num_devices, config, seed)
    assert all(np.array_equal(one, two) for one, two in zip(devices, again, strict=True))


def test_another_process_makes_the_same_partition() -> None:
    code = (
        "from fl_edge.data.config import DataConfig; from fl_edge.data.partition import load_device; "
        "print([load_device(DataConfig(), 5, d, 6).label_counts().tolist() for d in range(6)])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == str([load_device(DataConfig(), 5, d, 6).label_counts().tolist() for d in range(6)])


@pytest.mark.parametrize("num_devices", [10, 20, 40, 80])
def test_digits_can_be_spread_at_alpha_01(num_devices: int) -> None:
    for seed in range(3):
        sizes = [len(indices) for indices in device_indices(DIGITS, num_devices, DataConfig(), seed)]
        assert sum(sizes) == 1437
        assert min(sizes) >= 1


def test_dirichlet_is_the_plain_draw_of_each_class() -> None:
    # E of sum_i p_i^2 for Dirichlet(alpha 1_N) is (alpha + 1) / (N alpha + 1)
    labels = np.arange(20_000) % 100
    devices = device_indices(labels, 10, DataConfig(alpha=0.5), 3)
    counts = np.array([np.bincount(labels[indices], minlength=100) for indices in devices]) / 200
    assert np.mean((counts**2).sum(0)) == pytest.approx(1.5 / 6, rel=0.1)


def test_samples_of_a_class_are_shuffled_before_the_cut() -> None:
    labels = np.zeros(100, np.int64)
    for partition in ("dirichlet", "pathological", "iid", "dominant"):
        first = device_indices(labels, 2, DataConfig(partition=partition, classes_per_device=1, alpha=5.0), 1)[0]
        assert np.any(np.diff(first) > 1)


def test_pathological_devices_hold_so_many_classes() -> None:
    counts = shares(20, DataConfig(partition="pathological", classes_per_device=2))
    assert ((counts > 0).sum(1) == 2).all()


def test_iid_devices_are_of_one_size() -> None:
    sizes = shares(7, DataConfig(partition="iid")).sum(1)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("rho", [0.2, 0.4, 0.6, 0.8])
def test_dominant_share_goes_to_device_j_mod_n(rho: float) -> None:
    labels = np.repeat(np.arange(10), 100)
    counts = shares(4, DataConfig(partition="dominant", dominant_share=rho), labels)
    for label in range(10):
        owner = label % 4
        assert counts[owner, label] == 100 * rho
        rest = np.delete(counts[:, label], owner)
        assert rest.max() - rest.min() <= 1


@pytest.mark.parametrize(
    ("num_devices", "config", "says"),
    [
        (20, DataConfig(partition="dominant", dominant_share=1.0), "device 10 of 20 would hold 0 of 1437 samples"),
        (40, DataConfig(min_samples=10), "of 40 would hold .* fewer than min_samples=10; change alpha=0.1, the number"),
        (1438, DataConfig(), "1437 samples cannot give 1438 devices min_samples=1 each"),
        (0, DataConfig(), "cannot give 0 devices"),
        (3, DataConfig(partition="pathological"), "3 devices of 2 classes cannot hold 10 classes"),
        (5, DataConfig(partition="pathological"), "no device of 5 would hold class .* classes_per_device=2"),
        (3, DataConfig(partition="pathological", classes_per_device=11), "there are 10 classes"),
        (1000, DataConfig(partition="pathological"), "wanted by more devices than it has samples"),
    ],
)
def test_impossible_partitions_say_what_to_change(
    num_devices: int, config: DataConfig, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_edge.data.partition._DRAWS", 2)  # each costs the tenth of a second
    with pytest.raises(DataError, match=says) as caught:
        device_indices(DIGITS, num_devices, config, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", [-1, 4])
def test_a_device_outside_the_federation_has_no_data(device: int) -> None:
    with pytest.raises(DataError, match=f"device {device} has no data; with 4 devices"):
        load_device(DataConfig(), 1, device, 4)


def test_partitioners_send_no_telemetry() -> None:
    from flwr_datasets.common import telemetry

    for partition in ("dirichlet", "pathological", "iid"):
        device_indices(DIGITS, 10, DataConfig(partition=partition), 4)
    assert telemetry.state["executor"] is None  # the sender is made with the first event
