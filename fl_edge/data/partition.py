"""How the training set is spread over devices.

Sources: MergeSFL's released code (Dirichlet by class over shuffled samples; dominant label), the partitioners of Flower
Datasets (Dirichlet, pathological, IID). *Ours*: a draw that leaves a device with fewer than `min_samples` is repeated,
which on little data and many devices favours the less extreme draws.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fl_edge.data.config import DataConfig, PartitionConfig
from fl_edge.data.images import _LOADING, ImageSet, open_splits
from fl_edge.errors import DataError
from fl_edge.seeding import derive_seed, numpy_rng

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Ints = NDArray[np.int64]

_DRAWS = 25  # seeds tried before a partition is called impossible; each stands for 11 draws of Dirichlet


def device_indices(labels: NDArray[Any], num_devices: int, config: PartitionConfig, seed: int) -> list[Ints]:
    """Spread samples over devices; every sample goes to exactly one.

    Parameters
    ----------
    labels
        int (n,), one a sample.
    num_devices
        N, at least 1.
    config
        Kind of partition and its parameters.
    seed
        Of the experiment. The same seed gives the same partition in any process.

    Returns
    -------
    list of int64 arrays
        Indices of each device's samples, ascending.

    Raises
    ------
    DataError
        A device would hold fewer than ``config.min_samples`` samples, or a class would be left without a device.
    """
    labels = np.asarray(labels, dtype=np.int64)
    if num_devices < 1 or num_devices * config.min_samples > len(labels):
        raise DataError(
            f"{len(labels)} samples cannot give {num_devices} devices min_samples={config.min_samples} each; "
            "change the number of devices or min_samples"
        )
    if config.partition == "pathological":
        _check_classes(len(np.unique(labels)), num_devices, config)
    problem = "a class is wanted by more devices than it has samples"  # the one thing a pathological draw dies of
    for draw in range(_DRAWS if config.partition in ("dirichlet", "pathological") else 1):
        devices = _split(labels, num_devices, config, seed, draw, config.min_samples)
        if devices is None:
            continue
        problem = _problem(devices, labels, config)
        if not problem:
            return [np.sort(indices) for indices in devices]
    if config.partition == "dirichlet" and (devices := _split(labels, num_devices, config, seed, 0, 0)):
        problem = _problem(devices, labels, config)  # what the first draw would have looked like
    raise DataError(f"{problem}; change {_remedy(config)}")


def load_device(config: DataConfig, seed: int, device: int, num_devices: int) -> ImageSet:
    """Return the training samples of one device; cached by process.

    Only these are decoded, so that a device with a large data set on disk holds no more than its share in memory.

    Parameters
    ----------
    config, seed
        Data set, partition, experiment.
    device
        Index, 0 to ``num_devices - 1``.
    num_devices
        Devices that share the training set.

    Raises
    ------
    DataError
        What :func:`device_indices` and :func:`fl_edge.data.images.load_train` raise; a device that is not there.
    """
    if not 0 <= device < num_devices:
        raise DataError(
            f"device {device} has no data; with {num_devices} devices it must be at least 0 and below {num_devices}"
        )
    with _LOADING:
        return _device(DataConfig(**vars(config)), seed, device, num_devices)


@functools.lru_cache(maxsize=256)
def _device(config: DataConfig, seed: int, device: int, num_devices: int) -> ImageSet:
    train, _ = open_splits(config, seed)
    partition = _partition(config, seed, num_devices)
    if isinstance(partition, DataError):
        raise DataError(str(partition))
    return train.read(config, partition[device])


@functools.lru_cache(maxsize=4)
def _partition(config: DataConfig, seed: int, num_devices: int) -> list[Ints] | DataError:
    """Return the partition, or why there is none: one that cannot be takes seconds, and every device asks for it."""
    try:
        return device_indices(open_splits(config, seed)[0].labels, num_devices, config, seed)
    except DataError as error:
        return error


def _split(
    labels: Ints, num_devices: int, config: PartitionConfig, seed: int, draw: int, least: int
) -> list[Ints] | None:
    """Make one draw; None where it cannot be carried out. ``least`` is looked after by Dirichlet draws only."""
    if config.partition == "dominant":
        return _dominant(labels, num_devices, config, seed)
    import datasets  # noqa: PLC0415 - heavy

    # Flower's partitioners cut a class, or for IID the whole set, in its order; the released code shuffles before
    order = numpy_rng(seed, "data", "shuffle").permutation(len(labels))
    partitioner = _partitioner(num_devices, config, derive_seed(seed, "data", config.partition, draw), least)
    partitioner.dataset = datasets.Dataset.from_dict({"label": labels[order], "row": order}).with_format("numpy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about draws repeated and classes left out; _problem says it
        try:
            return [np.asarray(partitioner.load_partition(i)["row"][:], dtype=np.int64) for i in range(num_devices)]
        except ValueError:
            return None


def _partitioner(num_devices: int, config: PartitionConfig, seed: int, least: int) -> Partitioner:
    """Return Flower's partitioner. These send no telemetry; Flower's FederatedDataset and its plots would."""
    from flwr_datasets import partitioner  # noqa: PLC0415 - heavy

    if config.partition == "dirichlet":
        # without balancing: the plain draw of the released code
        return partitioner.DirichletPartitioner(
            num_devices, "label", config.alpha, min_partition_size=least, self_balancing=False, shuffle=False, seed=seed
        )
    if config.partition == "pathological":
        return partitioner.PathologicalPartitioner(
            num_devices, "label", config.classes_per_device, "first-deterministic", shuffle=False, seed=seed
        )
    return partitioner.IidPartitioner(num_devices)


def _dominant(labels: Ints, num_devices: int, config: PartitionConfig, seed: int) -> list[Ints]:
    """Give the share rho of class j to device j mod N and the rest evenly to the others (released code)."""
    devices: list[list[Ints]] = [[] for _ in range(num_devices)]
    for label in np.unique(labels).tolist():
        samples = numpy_rng(seed, "data", "dominant", label).permutation(np.flatnonzero(labels == label))
        # the others start behind the owner, so that the odd samples of all classes do not pile up on device 0
        owner, *others = np.roll(np.arange(num_devices), -label)
        kept = round(config.dominant_share * len(samples)) if others else len(samples)
        devices[owner].append(samples[:kept])
        for other, part in zip(others, np.array_split(samples[kept:], max(len(others), 1)), strict=bool(others)):
            devices[other].append(part)
    return [np.concatenate(parts) for parts in devices]


def _check_classes(classes: int, num_devices: int, config: PartitionConfig) -> None:
    if config.classes_per_device > classes:
        raise DataError(f"classes_per_device={config.classes_per_device} is not possible; there are {classes} classes")
    if num_devices * config.classes_per_device < classes:
        raise DataError(
            f"{num_devices} devices of {config.classes_per_device} classes cannot hold {classes} classes; "
            f"change {_remedy(config)}"
        )


def _problem(devices: list[Ints], labels: Ints, config: PartitionConfig) -> str:
    """Say what is wrong with a partition, or nothing."""
    sizes = [len(indices) for indices in devices]
    worst = int(np.argmin(sizes))
    if sizes[worst] < config.min_samples:
        return (
            f"device {worst} of {len(devices)} would hold {sizes[worst]} of {len(labels)} samples, fewer than "
            f"min_samples={config.min_samples}"
        )
    if sum(sizes) < len(labels):
        missing = sorted(set(labels.tolist()) - set(labels[np.concatenate(devices)].tolist()))
        return (
            f"no device of {len(devices)} would hold class {', '.join(map(str, missing))} with "
            f"classes_per_device={config.classes_per_device}"
        )
    return ""


def _remedy(config: PartitionConfig) -> str:
    parameter = {
        "dirichlet": f"alpha={config.alpha}, ",
        "pathological": f"classes_per_device={config.classes_per_device}, ",
        "dominant": f"dominant_share={config.dominant_share}, ",
    }.get(config.partition, "")
    return f"{parameter}the number of devices or min_samples"
