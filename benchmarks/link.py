"""Resident clients: exchange times against Flower's grid and bare gRPC, memory, and a whole FedAvg run.

Real SuperLink, SuperNodes and `flwr run` on loopback, TLS on. An exchange is a message with one array to every node and
one back; ours and the bare loop (:mod:`benchmarks.link_bare`) take turns in blocks, so that a noisy machine slows both
down. Flower's grid and ours run one and the same app; two import lines make it resident. A case is one session; its
systems stand side by side in a row.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.harness import Benchmark, Case, Column, Results, Target
from benchmarks.harness_record import fingerprint
from benchmarks.link_figure import figure
from benchmarks.link_memory import measure_memory
from benchmarks.link_sessions import FEDAVG, PROBE, ROOT, Sessions, resident_copy

SMALL, MIDDLE, LARGE = "2 nodes, 1 KiB", "10 nodes, 128 KiB", "10 nodes, 1 MiB"
MODEL, MEMORY, WHOLE = "message to handler", "memory, 64 nodes, 1 MiB", "FedAvg, 4 nodes"
ROUNDS = 10  # of FedAvg


@dataclass(frozen=True)
class Size:
    """How much is measured: numbers of exchanges, or of rounds."""

    small: int
    middle: int
    large: int
    flower: int
    model: int
    flower_model: int
    memory: int
    fedavg: int


FULL = Size(small=2000, middle=2000, large=1000, flower=15, model=50, flower_model=6, memory=1000, fedavg=ROUNDS)
QUICK = Size(small=500, middle=500, large=200, flower=4, model=20, flower_model=3, memory=200, fedavg=2)
WARM_UP = 20
BLOCK = {SMALL: 50, MIDDLE: 50, LARGE: 20}
BYTES = {SMALL: 2**10, MIDDLE: 2**17, LARGE: 2**20}
MEMORY_NODES, MEMORY_PROCESSES = 64, 4
FLAT_MIB = 5.0
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)

_sessions = Sessions()


def measure(case: str, seed: int, quick: bool) -> Mapping[str, Any]:  # noqa: ARG001 - nothing is drawn
    """Run one session."""
    size = QUICK if quick else FULL
    if case == MEMORY:
        _sessions.close()
        return read_memory(measure_memory(MEMORY_NODES, 2**20, size.memory, MEMORY_PROCESSES))
    if case == MODEL:
        return measure_model(size)
    if case == WHOLE:
        return measure_fedavg(size.fedavg)
    nodes = 2 if case == SMALL else 10
    exchanges = {SMALL: size.small, MIDDLE: size.middle, LARGE: size.large}[case]
    same: dict[str, Any] = {"probe": "echo", "bytes": BYTES[case]}
    outcome = _sessions.probe(
        nodes, resident=True, exchanges=exchanges, warm_up=WARM_UP, block=BLOCK[case], bare=True, **same
    )
    values = {**spread(outcome["grid_ms"], "ours"), **spread(outcome["bare_ms"], "bare")}
    values["first_ms"] = outcome["warm_up_ms"][0]
    values["bytes_ratio"] = sum(outcome["bare_ms"]) / sum(outcome["grid_ms"])  # equal bytes in both
    if case == SMALL:
        values |= spread(_sessions.probe(nodes, resident=False, exchanges=size.flower, **same)["grid_ms"], "flower")
    return values


def spread(times_ms: Sequence[float], name: str) -> dict[str, Any]:
    """Return median and 99th percentile, and some others from 0 to 100 for the picture."""
    curve = [min(times_ms), *statistics.quantiles(times_ms, n=100, method="inclusive"), max(times_ms)]
    return {
        f"{name}_ms": curve[50],
        f"{name}_p99_ms": curve[99],
        f"{name}_exchanges": len(times_ms),
        f"{name}_percentiles_ms": {str(share): round(curve[share], 4) for share in PERCENTILES},
    }


def measure_model(size: Size) -> dict[str, Any]:
    """Let two clients with torch and a model of 20 M parameters be called round after round, on both grids."""
    import torch
    from safetensors.torch import save_file

    _sessions.deployment(2)
    weights = _sessions.folder / "weights.safetensors"
    shapes = {"weight": (2000, 2000), "bias": (2000,)}
    save_file({f"{i}.{name}": torch.randn(shape) for i in range(5) for name, shape in shapes.items()}, weights)
    values: dict[str, Any] = {}
    for name, resident, rounds in (("ours", True, size.model), ("flower", False, size.flower_model)):
        pause_s = 0.1 if resident else 0.0  # a client that has just been idle, as between two rounds of training
        same = {"probe": "model", "weights": str(weights), "exchanges": rounds, "pause_s": pause_s}
        outcome = _sessions.probe(2, resident=resident, **same)
        values |= read_model(outcome["rounds"], name)
    return values


def read_model(rounds: Sequence[Sequence[Mapping[str, float]]], name: str) -> dict[str, Any]:
    """Sum up the clients' stamps from the second round on: the slower client's times from message to handler.

    For Flower's grid, whose parts are all there, also what they are: until the process starts, until the handler is
    entered, for torch, and for the model.
    """
    first, *later = [max(clients, key=lambda stamps: stamps["ready_at"]) for clients in rounds]
    if any(stamps["parameters"] < 20e6 for stamps in later):
        raise ValueError("the model has fewer than 20 million parameters")
    times_ms = [1000 * (stamps["ready_at"] - stamps["sent_at"]) for stamps in later]
    values: dict[str, Any] = {
        f"{name}_ms": statistics.median(times_ms),
        f"{name}_p99_ms": max(times_ms),
        f"{name}_second_ms": times_ms[0],
        f"{name}_first_ms": 1000 * (first["ready_at"] - first["sent_at"]),
        f"{name}_processes": len({stamps["process"] for clients in rounds for stamps in clients}),
    }
    steps = ("sent_at", "started_at", "entered_at", "imported_at", "ready_at")
    if later[0]["started_at"] > later[0]["sent_at"]:  # a process for each message
        for part, (start, end) in zip(("wait", "start", "torch", "model"), pairwise(steps), strict=True):
            values[f"{name}_{part}_ms"] = statistics.median(1000 * (stamps[end] - stamps[start]) for stamps in later)
    return values


def read_memory(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Return the curve, and how much more there is in the last 100 exchanges than in the 51st to the 150th.

    More that is resident but not allocated is what the C library keeps for later; more that is allocated is a leak.
    """
    curve = outcome["curve"]
    end = curve[-1][0]

    def mean(column: int, after: int, until: int) -> float:
        return statistics.fmean(line[column] for line in curve if after < line[0] <= until)

    return {
        "rss_mib": mean(1, end - 100, end),
        "growth_mib": mean(1, end - 100, end) - mean(1, 50, 150),
        "held_growth_mib": mean(2, end - 100, end) - mean(2, 50, 150),
        "curve": [[number, *(round(mib, 2) for mib in both)] for number, *both in curve],
        "ours_ms": statistics.median(outcome["times_ms"]),
    }


def measure_fedavg(rounds: int) -> dict[str, Any]:
    """Run stock FedAvg from submission to end, as it is and resident; both must end with the same model."""
    deployment = _sessions.deployment(4)
    values: dict[str, Any] = {"rounds": rounds}
    models = {}
    for name in ("ours", "flower"):
        app = resident_copy(FEDAVG, _sessions.folder / "fedavg") if name == "ours" else FEDAVG
        model = _sessions.folder / f"{name}.safetensors"
        config = {"num-server-rounds": rounds, "nodes": 4, "model-path": str(model)}
        values[f"{name}_ms"] = 1000 * _sessions.run(deployment, app, config)
        models[name] = model.read_bytes()
    if models["ours"] != models["flower"]:
        raise RuntimeError("FedAvg ends with another model when its clients are resident")
    return values


def targets(results: Results) -> list[Target]:
    """Return the lines of the issue's table, all from this run."""

    def value(case: str, key: str) -> float | None:
        found = results.values(case, key)
        return statistics.median(found) if found else None

    def ratio(case: str, above: str, below: str) -> float | None:
        over, under = value(case, above), value(case, below)
        return None if over is None or not under else over / under

    return [
        Target.at_least(
            f"{SMALL}: median exchange, Flower's grid / ResidentGrid", ratio(SMALL, "flower_ms", "ours_ms"), 2000
        ),
        Target.at_most(f"{MIDDLE}: median exchange, ms", value(MIDDLE, "ours_ms"), 15),
        Target.at_most(f"{MIDDLE}: 99th percentile, ms", value(MIDDLE, "ours_p99_ms"), 40),
        Target.at_most(
            f"{MIDDLE}: median exchange, ResidentGrid / bare gRPC", ratio(MIDDLE, "ours_ms", "bare_ms"), 1.6
        ),
        Target.at_least(f"{LARGE}: all bytes over time, ResidentGrid / bare gRPC", value(LARGE, "bytes_ratio"), 0.7),
        Target.at_most(
            f"{MODEL}, torch and a model of 20 M parameters: from the second round on, slower of 2 clients, median ms",
            value(MODEL, "ours_ms"),
            20,
        ),
        Target.at_most(
            f"{MEMORY}, clients are threads of {MEMORY_PROCESSES} processes: "
            "resident MiB in the last 100 exchanges beyond those in exchanges 51 to 150",
            value(MEMORY, "growth_mib"),
            FLAT_MIB,
        ),
        Target.at_least(
            f"{WHOLE}, {value(WHOLE, 'rounds') or 0:.0f} rounds: whole run, Flower's grid / ResidentGrid",
            ratio(WHOLE, "flower_ms", "ours_ms"),
            10,
        ),
    ]


BENCHMARK = Benchmark(
    cases=tuple(Case(name) for name in (SMALL, MODEL, MIDDLE, LARGE, MEMORY, WHOLE)),
    columns={
        "ours_ms": Column("ResidentGrid", "real_ms", 2),
        "ours_p99_ms": Column("its 99 %", "real_ms", 2),
        "bare_ms": Column("bare gRPC", "real_ms", 2),
        "flower_ms": Column("Flower's grid", "real_ms", 0),
        "growth_mib": Column("more MiB", digits=1),
        "held_growth_mib": Column("allocated", digits=1),
    },
    measure=measure,
    targets=targets,
    figure=figure,
    settings={
        "full": vars(FULL),
        "quick": vars(QUICK),
        "warm_up": WARM_UP,
        "tls": True,
        "apps": fingerprint({}, [*PROBE.rglob("*.py"), *FEDAVG.rglob("*.py"), *(ROOT / "simulations").glob("*.py")]),
    },
    packages=("grpcio", "msgpack", "psutil"),
)
