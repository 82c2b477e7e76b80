"""Aggregating LoRA of unequal ranks: seconds and exactness against peft, and memory for 80 devices of a 7B shape.

The first job is a round of 9 devices with ranks 4, 8 and 16, four maps of 768 x 768, to rank 16. Devices start from
one global adapter and move away from it. Errors are relative Frobenius norms of a product, against float64 algebra on
the dense mean: for rules that truncate, its best approximation; for stacking the mean itself; masked_mean's is its
bias. All runners get tensors that are in memory; peft's time is that of one ``add_weighted_adapter``. Pruned means that
two thirds of the devices keep 30 % to 90 % of the rows, which peft cannot do.

The second job streams files (:mod:`benchmarks.aggregation_stream`), whose pages are in the cache. ``--quick`` streams
8 of the 64 maps and multiplies its seconds by 8. All run on one torch thread: waiting for a second one disturbs times.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.aggregation_peers import PeftPeer, best_of_rank, by_dense, by_qr, dense_mean
from benchmarks.aggregation_stream import QUICK, SEVEN_B, measure_stream
from benchmarks.harness import Benchmark, Case, Column, Results, Target
from fl_edge.fedspine.aggregation import Rule, aggregate
from fl_edge.fedspine.factors import Factors, Part, gather
from fl_edge.seeding import torch_rng

WIDTH, MAPS, RANKS, RANK = 768, ("query", "key", "value", "output"), (4, 8, 16) * 3, 16
RULES: tuple[Rule, ...] = get_args(Rule)
OURS, PRUNED, STREAM = "ours: {}", "ours, pruned: {}", "80 devices, 7B: {}"
SVD, THIN, CAT = "peft: svd", "peft: svd, thin", "peft: cat"
QR, DENSE = "QR and small SVD", "dense SVD, float64"


@dataclass(frozen=True, eq=False)
class Job:
    """One round: the old factors of each map and the devices' parts, whole and pruned."""

    previous: Mapping[str, Factors]
    whole: Mapping[str, Sequence[Part]]
    pruned: Mapping[str, Sequence[Part]]


@functools.cache
def draw(seed: int) -> Job:
    """Return a round in which each device has moved a tenth of a's length, and about as far as b is long."""
    rng = torch_rng(seed, "aggregation")
    previous: dict[str, Factors] = {}
    whole: dict[str, list[Part]] = {}
    pruned: dict[str, list[Part]] = {}
    for name in MAPS:
        b = torch.randn(WIDTH, RANK, generator=rng) * 0.01 / torch.arange(1, RANK + 1).sqrt()
        old = previous[name] = Factors(torch.randn(RANK, WIDTH, generator=rng) * WIDTH**-0.5, b)
        whole[name], pruned[name] = [], []
        for device, rank in enumerate(RANKS):
            start, weight = gather(old, rank), float(1 + device % 4)
            a = start.a + 0.1 * WIDTH**-0.5 * torch.randn(rank, WIDTH, generator=rng)
            part = Part(Factors(a, start.b + 0.005 * torch.randn(WIDTH, rank, generator=rng)), weight)
            share = 0.3 + 0.6 * float(torch.rand((), generator=rng))
            rows = torch.randperm(WIDTH, generator=rng)[: int(share * WIDTH)].sort().values
            held = Part(gather(part.factors, rank, rows), weight, rows)
            whole[name].append(part)
            pruned[name].append(held if device % 3 else part)
    return Job(previous, whole, pruned)


@functools.cache
def expected(seed: int, case: str) -> dict[str, Tensor]:
    """Return the products that a case should come to: dense, in float64."""
    job = draw(seed)
    maps = job.pruned if "pruned" in case else job.whole
    means = {name: dense_mean(parts, job.previous[name], "rank_partitioned" in case) for name, parts in maps.items()}
    if case in (OURS.format("stacking"), PRUNED.format("stacking"), CAT):
        return means
    return {name: best_of_rank(mean, RANK) for name, mean in means.items()}


@functools.cache
def peft_peer(seed: int) -> PeftPeer:
    """Return the round's adapters in a peft model."""
    return PeftPeer(draw(seed).whole)


def run(case: str, seed: int) -> tuple[float, Mapping[str, Factors]]:
    """Return the seconds of one aggregation of all four maps, and its result."""
    job = draw(seed)
    if case.startswith("peft"):
        kind = "cat" if case == CAT else "svd"
        options = {"svd_full_matrices": False} if case == THIN else {}
        return peft_peer(seed).combine(job.whole, RANK, kind, **options)
    maps = job.pruned if "pruned" in case else job.whole
    each: Callable[[str], Factors]
    if case == QR:
        each = lambda name: by_qr(maps[name], RANK)  # noqa: E731
    elif case == DENSE:
        each = lambda name: by_dense(maps[name], job.previous[name], RANK)  # noqa: E731
    else:
        rule, rng = next(rule for rule in RULES if case.endswith(rule)), torch_rng(seed, "directions")
        each = lambda name: aggregate(rule, maps[name], job.previous[name], RANK, rng)  # noqa: E731
    started = time.perf_counter()
    made = {name: each(name) for name in MAPS}
    return time.perf_counter() - started, made


def measure(case: str, seed: int, quick: bool) -> Mapping[str, Any]:
    """Aggregate once; where that takes milliseconds, take the median of nine in a row."""
    if case.startswith(STREAM.format("")):
        return measure_stream(next(rule for rule in RULES if case.endswith(rule)), QUICK if quick else SEVEN_B)
    runs = [run(case, seed) for _ in range(1 if case in (SVD, THIN, DENSE) else 9)]
    due = expected(seed, case)
    errors = [relative(made, due[name]) for name, made in runs[-1][1].items()]
    seconds = sorted(seconds for seconds, _ in runs)[len(runs) // 2]
    return {"ms": 1000 * seconds, "error": max(errors), "log_error": math.log10(max(*errors, 1e-16))}


def relative(found: Factors, due: Tensor) -> float:
    """Return how far a product is from what it should be, relative to that."""
    product = found.b.double() @ found.a.double()
    return float(torch.linalg.norm(product - due) / torch.linalg.norm(due))


def prepare(seeds: Sequence[int], quick: bool) -> None:  # noqa: ARG001
    """Run what takes milliseconds once, so that no measurement pays for first calls."""
    torch.set_num_threads(1)
    for rule in RULES:
        run(OURS.format(rule), seeds[0])
    run(QR, seeds[0])


def targets(results: Results) -> list[Target]:
    """Return times by peft's, the largest errors, and memory."""
    ours = OURS.format("flexlora")
    lines = [
        Target.at_least(f"time of {peer} / ours: flexlora, medians", results.ratio(peer, ours, "ms"), 40)
        for peer in (SVD, THIN)
    ]
    for case in (ours, PRUNED.format("flexlora"), OURS.format("stacking"), OURS.format("rank_partitioned")):
        worst = max(results.values(case, "error"), default=None)
        lines.append(Target.at_most(f"{case}: error against the dense rule, worst seed", worst, 1e-6))
    for rule in RULES:
        worst = max(results.values(STREAM.format(rule), "adapters"), default=None)
        lines.append(Target.at_most(f"{STREAM.format(rule)}: peak memory in adapters, worst seed", worst, 3))
    return lines


def figure(results: Results, path: Path) -> None:
    """Draw the first job's times with their errors, and the second's with memory and what its bytes take to move."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(13, 4.5), layout="constrained")
    times, stream = drawing.subplots(1, 2, width_ratios=(1.6, 1))
    cases = [case.name for case in BENCHMARK.cases if case.name in results.summary and "7B" not in case.name]
    for row, case in enumerate(reversed(cases)):
        color = "tab:orange" if case.startswith("ours") else "tab:gray"
        values, middle = results.values(case, "ms"), results.center(case, "ms") or 0.0
        error = results.center(case, "error") or 0.0
        times.plot(values, [row] * len(values), "|", color=color, alpha=0.6, markersize=10)
        times.plot(middle, row, "o", color=color)
        times.annotate(
            f"{middle:,.0f} ms, error {error:.0e}" if middle >= 100 else f"{middle:.3g} ms, error {error:.0e}",
            (max(values), row),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    times.set_yticks(range(len(cases)), cases[::-1])
    times.set_xscale("log")
    times.set_xlim(right=40 * max(results.values(SVD, "ms"), default=1.0))
    times.set_xlabel("real ms, 9 devices, four maps of 768 x 768")
    rules = [rule for rule in RULES if STREAM.format(rule) in results.summary][::-1]
    for row, rule in enumerate(rules):
        case = STREAM.format(rule)
        seconds, memory = (results.center(case, key) or 0.0 for key in ("stream_s", "adapters"))
        stream.barh(row, seconds, color="tab:orange", height=0.5)
        stream.plot([results.center(case, "bytes_s")] * 2, [row - 0.3, row + 0.3], color="black")
        stream.annotate(
            f"{seconds:.3g} s, {memory:.2f} adapters",
            (seconds, row),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    stream.set_yticks(range(len(rules)), rules)
    stream.set_xscale("log")
    stream.set_xlim(left=0.05, right=100_000)
    stream.set_xlabel("real s, 80 devices, 7B (line: memory speed)")
    for axes in (times, stream):
        axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=150)


BENCHMARK = Benchmark(
    cases=(
        *(Case(OURS.format(rule), 7, 3) for rule in RULES),
        *(Case(PRUNED.format(rule), 7, 3) for rule in RULES if rule != "masked_mean"),
        Case(SVD, 3, 2, needs=("peft",)),
        Case(THIN, 3, 2, needs=("peft",)),
        Case(CAT, 7, 3, needs=("peft",)),
        Case(QR, 7, 3),
        Case(DENSE, 3, 1),
        *(Case(STREAM.format(rule)) for rule in RULES),
    ),
    columns={
        "ms": Column("four maps", "real_ms", 2),
        "log_error": Column("log10 error", digits=2),
        "stream_s": Column("7B", "real_s", 2),
        "bytes_s": Column("its bytes", "real_s", 2),
        "times_bytes": Column("times", digits=0),
        "adapters": Column("peak, adapters", digits=2),
        "error": Column("error", digits=9),
    },
    measure=measure,
    targets=targets,
    figure=figure,
    prepare=prepare,
    seeds=(0, 1, 2),
    quick_seeds=(0,),
    settings={
        "width": WIDTH,
        "maps": MAPS,
        "ranks": RANKS,
        "rank": RANK,
        "stream": vars(SEVEN_B),
        "torch_threads": 1,
    },
    packages=("peft", "safetensors"),
)
