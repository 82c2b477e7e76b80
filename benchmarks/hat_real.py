"""TTFT and TBT in real seconds: devices and a cloud in two processes, over paced links, HAT against its baselines.

Everything runs: sessions with their threads, messages as bytes through pipes, the cloud's queue, batches and caches, on
a small Llama that was trained here; a device drafts what its adapter drafts. Three things are paced, the same for all
methods and with the constants of the virtual clock for the paper's 13B setting:

* links: a row counts 10240 bytes at 5 to 10 MB/s up and 10 to 15 down;
* what a device computes: held until a Jetson would have it;
* the cloud's batches: held until the pipeline of 4 stages would have them (:mod:`benchmarks.hat_real_held`).

Without the latter two the ratios cannot be the paper's: on two cores devices would wait for each other, and the small
model's share of a prompt is computed in no time. So the ratios of transfer and compute are the paper's as the virtual
clock has them, and what is real are the tokens, how many of them are accepted, queues, threads, and whatever this
machine takes beyond the held times; the latter is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from benchmarks.harness import Case, Column, Results, Target
from benchmarks.hat_models import LLAMA, middle_model
from benchmarks.hat_real_room import Rooms
from benchmarks.hat_real_setting import (
    BYTES,
    CAPACITY,
    DELAY,
    DEVICES,
    HAT_PLUS,
    HATS,
    MARGIN,
    MEDUSA,
    METHODS,
    NEW_TOKENS,
    QUICK_DEVICES,
    REQUESTS,
    SARATHI,
    SLOWER,
    U_SHAPE,
    load_parts,
    requests,
)
from fl_edge.hat.simulated_device import MODE_REQUESTS
from fl_edge.hat.simulated_report import CNN_DM


def ratios() -> dict[str, float]:
    """Return the ratios of the paper's 13B setting by the virtual clock's constants, which hold here, too."""
    shape, delay, bed, rate = CNN_DM.shape, CNN_DM.delay, CNN_DM.bed, CNN_DM.rate
    machines = [bed.draw(0, number, request) for number in range(bed.devices) for request in (0, MODE_REQUESTS)]
    prompt = round(fmean(CNN_DM.prompts.draw(0, 3000)))
    up, down = fmean(each.up for each in machines), fmean(each.down for each in machines)
    batch = CNN_DM.stages * delay(1)
    step = fmean(
        each.seconds(shape.input_weights) + each.seconds(shape.adapter_weights) + each.seconds(shape.head_weights)
        for each in machines
    )
    read = fmean(each.seconds(shape.input_weights, prompt) for each in machines)
    trip = 2 * machines[0].latency_s + shape.row_bytes / up + shape.row_bytes / down
    return {
        "tokens of a prompt": prompt,
        "upload of a prompt, s": prompt * shape.row_bytes / up,
        "upload : cloud, of a whole prompt": prompt * shape.row_bytes / up / (CNN_DM.stages * delay(prompt)),
        "upload : device, of a whole prompt": prompt * shape.row_bytes / up / read,
        "one row there and back : a batch of few rows": trip / batch,
        "draft step : a batch of few rows": step / batch,
        "share of a stage that whole prompts take": rate * delay(prompt),
    }


PREFIX = "real: "
TWICE = (HAT_PLUS, U_SHAPE)  # the others are grids, of which the best counts
NOT_QUICK = {*list(HATS)[1:], *list(SARATHI)[1:], *list(MEDUSA)[1:]}
CASES = tuple(
    Case(PREFIX + name, repetitions=2 if name in TWICE else 1, quick_repetitions=int(name not in NOT_QUICK))
    for name in METHODS
)
COLUMNS = {
    "ttft_ms": Column("TTFT", "real_ms", 0),
    "tbt_ms": Column("TBT", "real_ms", 1),
    "accept_length": Column("accept length", digits=2),
    "up_mb": Column("MB up a request", digits=2),
    "batch_rows": Column("rows a batch", digits=0),
    "device_over": Column("devices beyond held time", digits=3),
    "cloud_over": Column("cloud beyond held time", digits=3),
}


SETTINGS = {
    "ratios": {name: round(value, 3) for name, value in ratios().items()},
    "slower": SLOWER,
    "devices": DEVICES,
    "requests": REQUESTS,
    "new tokens": NEW_TOKENS,
    "methods": {name: asdict(method) for name, method in METHODS.items()},
}


def prepare(quick: bool) -> None:
    """Train what is not there yet, and start both processes."""
    load_parts(quick)
    _rooms(quick)


@functools.cache
def _rooms(quick: bool) -> Rooms:
    middle, parts = functools.partial(middle_model, LLAMA, quick), functools.partial(load_parts, quick)
    devices = QUICK_DEVICES if quick else DEVICES
    return Rooms(middle, parts, devices, CAPACITY, CNN_DM.shape, DELAY, CNN_DM.stages)


def measure(case: str, seed: int, quick: bool) -> Mapping[str, Any]:
    """Let a method answer all requests once."""
    method = METHODS[case.removeprefix(PREFIX)]
    asked, new_tokens = requests(seed, quick)
    done = _rooms(quick).run(method.drafts, method.config(new_tokens), method.limits, asked)
    records: Sequence[Mapping[str, Any]] = sorted(done["records"], key=lambda each: each["number"])
    skipped = int(MARGIN * len(records))
    counted = records[skipped : len(records) - skipped]
    rounds, cloud = sum(each["rounds"] - 1 for each in counted), done["cloud"]
    return {
        "ttft_ms": 1e3 * fmean(each["first_s"] for each in counted),
        "tbt_ms": 1e3 * fmean((each["total_s"] - each["first_s"]) / (each["tokens"] - 1) for each in counted),
        "accept_length": sum(each["tokens"] - 1 for each in counted) / rounds,
        "drafted": sum(each["drafted"] for each in counted) / rounds,
        "ahead": sum(each["ahead"] for each in counted) / rounds,
        "up_mb": fmean(each["paced_up"] for each in counted) / 1e6,
        "late_ms": 1e3 * max(each["late_s"] for each in records),
        "batch_rows": cloud["rows"] / cloud["batches"],
        "batch_prompts": cloud["rows"],
        "device_over": done["over_s"] / done["held_s"],
        "cloud_over": cloud["over_s"] / cloud["held_s"],
        "device_cpu_s": done["cpu_s"],
        "cloud_cpu_s": cloud["cpu_s"],
        "seconds": cloud["seconds"],
        "texts": " ".join(each["text"] for each in records),
    }


def targets(results: Results) -> list[Target]:
    """Return the lines on TTFT and TBT; HAT and baselines stand with the best of their grids, measure by measure."""
    lines = []
    baselines: Mapping[str, Collection[str]] = {U_SHAPE: [U_SHAPE], "U-Sarathi": SARATHI, "U-Medusa": MEDUSA}
    for key, name, bounds in (("ttft_ms", "TTFT", (52, 41, 54)), ("tbt_ms", "TBT", (74, 41, 77))):
        for (against, cases), bound in zip(baselines.items(), bounds, strict=True):
            value = _reduction(results, HATS, cases, key)
            lines.append(Target.at_least(f"real run, {name}: HAT below {against}, %", value, bound))
    for plus in (HAT_PLUS, BYTES):
        value = _reduction(results, [plus], HATS, "tbt_ms")
        lines.append(Target.at_least(f"real run, TBT: {plus} below HAT, %", value, 15))
    exact = [case.name for case in CASES if case.name != PREFIX + BYTES]  # its text is that of another model
    first, *others = [text for name in exact for text in results.values(name, "texts")] or [""]
    differing = [_differing(first, each) for each in others]
    lines.append(Target.at_most("real run: requests with other tokens", max(differing, default=None), 0))
    return lines


def _reduction(results: Results, ours: Collection[str], theirs: Collection[str], key: str) -> float | None:
    """Return by how much less the least of ours is than the least of theirs, in percent."""
    own, found = (
        [each for name in names if (each := results.center(PREFIX + name, key)) is not None] for names in (ours, theirs)
    )
    return 100 * (1 - min(own) / min(found)) if own and found else None


def _differing(one: str, other: str) -> int:
    return sum(mine != yours for mine, yours in zip(one.split(), other.split(), strict=True))
