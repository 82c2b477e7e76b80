"""The ClientApp: every workload that a device can be asked for."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from flwr.app import Context

from fl_edge.clients.mergesfl import MergeSFLClient, Workload
from fl_edge.data.partition import load_device
from fl_edge.edge.costs import compute_seconds_per_sample, transfer_seconds_per_sample
from fl_edge.edge.profiles import device_profile
from fl_edge.errors import ConfigError
from fl_edge.link.resident import ClientApp
from fl_edge.models.images import build_model
from fl_edge.models.split import feature_bytes
from simulations.scenario import read_scenario

app = ClientApp()


def load(context: Context) -> Workload:
    """Return what this node trains on: its own part of the data, its own device profile."""
    node = context.node_config
    if "partition-id" not in node or "num-partitions" not in node:
        raise ConfigError(
            'partition-id and num-partitions must be set: --node-config "partition-id=0 num-partitions=4"'
        )
    index, count = int(node["partition-id"]), int(node["num-partitions"])
    name = str(node.get("device-id", f"device-{index}"))
    run_config = tuple(sorted(context.run_config.items()))
    return _workload(run_config, index, count, name, str(node.get("device-kind", "")))


@lru_cache(maxsize=256)
def _workload(run_config: tuple[tuple[str, Any], ...], index: int, count: int, name: str, kind: str) -> Workload:
    scenario = read_scenario(dict(run_config), on_device=True)
    edge, seed = scenario.edge, scenario.seed
    own = load_device(scenario.data, seed, index, count)
    shape = own.shape
    bottom = build_model(scenario.model, shape, len(own.classes), seed).bottom
    per_sample = feature_bytes(bottom, shape)

    def costs(server_round: int) -> tuple[float, float]:
        profile = device_profile(edge, seed, index, count, server_round, kind)
        return compute_seconds_per_sample(profile, edge), transfer_seconds_per_sample(profile, per_sample)

    return Workload(
        device=name,
        bottom=bottom,
        labels=own.labels,
        num_classes=len(own.classes),
        batch=lambda indices: own.batch(indices)[0],
        costs=costs if edge.clock == "virtual" else None,
        threads=scenario.threads,
    )


MergeSFLClient(load).register(app)
