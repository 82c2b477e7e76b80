"""Aggregation of many devices' adapters that lie in files: seconds, bytes and memory of a fresh process.

Adapters of a 7B model's shape (32 layers, q and v, 4096 wide) are written once by :func:`written`, and read map by map
as they are needed. The global adapter is in memory; each map's old factors go as its new ones come, except those of
stacking: as large as 40 adapters, they are written to files map by map. One torch thread.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fl_edge.fedspine.aggregation import Rule, aggregate
from fl_edge.fedspine.factors import Factors, Part
from fl_edge.seeding import torch_rng

ROOT = Path(__file__).resolve().parent.parent
_COPY_BYTES, _COPIES = 2**28, 7


@dataclass(frozen=True)
class Shape:
    """What is aggregated; ranks go round over the devices, the largest is the global adapter's.

    With fewer ``streamed`` than ``maps``, the whole global adapter is in memory, but only some of its maps are
    aggregated, and the seconds scaled up.
    """

    devices: int = 80
    maps: int = 64
    streamed: int = 64
    width: int = 4096
    ranks: Sequence[int] = (4, 8, 12, 16, 24, 32)

    @property
    def adapter_bytes(self) -> int:
        """Size of one adapter of the largest rank in float32."""
        return 4 * self.maps * 2 * self.width * max(self.ranks)

    @property
    def moved_bytes(self) -> int:
        """What has to be moved at least: every device's adapter and the old global one in, the new one out."""
        ranks = sum(self.ranks[device % len(self.ranks)] for device in range(self.devices))
        return 4 * self.maps * 2 * self.width * (ranks + 2 * max(self.ranks))


SEVEN_B, QUICK = Shape(), Shape(streamed=8)
_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


@functools.cache
def written(shape: Shape) -> Path:
    """Write the devices' adapters into a temporary folder, once a process."""
    _folders.append(tempfile.TemporaryDirectory(prefix="fl_edge-aggregation-"))
    folder = Path(_folders[-1].name)
    for device in range(shape.devices):
        save_file(
            {f"{name}.{side}": tensor for name in range(shape.streamed) for side, tensor in _draw(shape, device, name)},
            folder / f"{device}.safetensors",
        )
    return folder


def _draw(shape: Shape, device: int, name: int) -> Iterator[tuple[str, torch.Tensor]]:
    rank = shape.ranks[device % len(shape.ranks)]
    rng = torch_rng(0, "aggregation", name, device)
    yield "a", torch.randn(rank, shape.width, generator=rng) * shape.width**-0.5
    yield "b", torch.randn(shape.width, rank, generator=rng) * 0.01


def measure_stream(rule: Rule, shape: Shape = SEVEN_B) -> dict[str, Any]:
    """Aggregate all maps in a fresh process; return seconds, memory in adapters, and the time its bytes take."""
    folder = written(shape)
    settings = json.dumps([rule, str(folder), vars(shape)])
    command = [sys.executable, "-m", "benchmarks.aggregation_stream", settings]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    bytes_s = shape.moved_bytes / found["copied_per_s"]
    return {
        "stream_s": found["seconds"],
        "bytes_s": bytes_s,
        "times_bytes": found["seconds"] / bytes_s,
        "adapters": found["peak_bytes"] / shape.adapter_bytes,
        "peak_mib": found["peak_bytes"] / 2**20,
        "gib": shape.moved_bytes / 2**30,
        "gib_per_s": found["copied_per_s"] / 2**30,
    }


class _Peak(threading.Thread):
    """Looks at this process's anonymous resident memory every 2 ms; files that are mapped do not count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.ended = 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Return this process's resident memory that no file backs (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def copied_per_s() -> float:
    """Return the bytes a second that a copy loop reads and writes, its median."""
    source = torch.ones(_COPY_BYTES // 4)
    target, rates = torch.empty_like(source), []
    for _ in range(_COPIES):
        started = time.perf_counter()
        target.copy_(source)
        rates.append(2 * _COPY_BYTES / (time.perf_counter() - started))
    return sorted(rates[1:])[len(rates[1:]) // 2]  # the first one pays for the pages


def run_stream(rule: Rule, folder: Path, shape: Shape) -> dict[str, float]:
    """Aggregate all maps, in this process."""
    rank, rng = max(shape.ranks), torch_rng(0, "aggregation", "directions")
    small = Factors(torch.ones(1, 8), torch.ones(8, 1))
    aggregate(rule, [Part(small, 1.0)], small, 1, rng)  # no first calls in what follows
    files: list[Any] = [safe_open(folder / f"{device}.safetensors", "pt") for device in range(shape.devices)]
    before, peak = anonymous_bytes(), _Peak()
    peak.start()
    state = {
        name: Factors(torch.randn(rank, shape.width), torch.randn(shape.width, rank)) for name in range(shape.maps)
    }
    started = time.perf_counter()
    for name in range(shape.streamed):
        parts = (Part(Factors(file.get_tensor(f"{name}.a"), file.get_tensor(f"{name}.b")), 1.0) for file in files)
        new = aggregate(rule, parts, state[name], rank, rng)
        if rule == "stacking":
            save_file({"a": new.a, "b": new.b}, folder / f"{name}.stacked")
        else:
            state[name] = new
        del new
    seconds = (time.perf_counter() - started) * shape.maps / shape.streamed
    peak.ended.set()
    peak.join()
    return {"seconds": seconds, "peak_bytes": peak.bytes - before, "copied_per_s": copied_per_s()}


def main(arguments: Sequence[str]) -> None:
    """Run one rule and print what was measured as JSON."""
    torch.set_num_threads(1)
    rule, folder, shape = json.loads(arguments[0])
    print(json.dumps(run_stream(rule, Path(folder), Shape(**shape))))


if __name__ == "__main__":
    main(sys.argv[1:])
