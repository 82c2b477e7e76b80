"""COMP on a machine: memory against a Taylor-scored run, a 7B-shaped model streamed, latency of what is left.

Three kinds of cases; weights are random in the shapes of known models, which is as good for memory and time:

* *memory*: peak resident memory of a whole pruning run, each in a process of its own, against LLM-Pruner's rule (whole
  model in float32, gradients of all weights); see :mod:`benchmarks.comp_machine_child`. The peer has its 10 sequences
  of 64 tokens, COMP 32 of 128, on the 7B shape 16.
* *stream*: a 7B-shaped checkpoint in bfloat16 made on the spot, pruned from folder to folder. It takes 28 GB of disk
  for a while, under TMPDIR where that is set.
* *latency*: decoding and prefill of pruned decoders, in turns with the dense one, by what is pruned: whole layers, or
  heads and channels, the same of every layer or each layer its own; see :mod:`benchmarks.comp_machine_latency`. On the
  CPU in float32 on one thread, on 8 of TinyLlama's layers with its whole vocabulary: 1.9 GB of weights, far beyond any
  cache.

``faithful`` is COMP without what goes beyond the paper's method, ``recommended`` its default settings. On a GPU the
same cases run on it, and 7B-shaped ones join in; memory is the device's there, beside the process's own::

    python -m benchmarks comp_machine --device cuda
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.comp_machine_child import in_fresh_process
from benchmarks.comp_machine_files import check_output, checkpoint, place_for_output
from benchmarks.comp_machine_latency import Setting, grains, measure_latency
from benchmarks.comp_shapes import SHAPES
from benchmarks.harness import Benchmark, Case, Column, Results, Target

DEVICE = os.environ.get("FL_EDGE_DEVICE", "cpu")
RATIO, SEQUENCES, STREAM_SEQUENCES, LENGTH, QUICK_SEQUENCES = 0.2, 32, 16, 128, 8
TAYLOR_SEQUENCES, TAYLOR_LENGTH = 10, 64
PEER, FAITHFUL, RECOMMENDED = "Taylor in float32", "COMP, faithful", "COMP, recommended"
BIG = "llama-2-7b"
MEMORY_SHAPES = ("tinyllama-1.1b",) if DEVICE == "cpu" else ("tinyllama-1.1b", BIG)
QUICK_LAYERS, QUICK_STREAMED = 3, 2  # of the shapes, and of the one that is streamed
LATENCY = {"tinyllama-1.1b": Setting("tinyllama-1.1b", 8)} | ({} if DEVICE == "cpu" else {BIG: Setting(BIG, 32)})
PHASES = ("decode", "prefill")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name() -> str:
    """Return what the device is called; without such a device, end in one line."""
    if DEVICE == "cpu":
        return DEVICE
    if not torch.cuda.is_available():
        raise SystemExit(f"--device {DEVICE}: torch sees no CUDA device here")
    return torch.cuda.get_device_name()


def memory_case(shape: str, who: str) -> str:
    """Return what the table calls a measurement of memory."""
    return f"memory: {shape}, {who}"


def stream_case(who: str) -> str:
    """Return what the table calls a streamed run."""
    return f"stream: {BIG}, {who}"


def latency_case(shape: str, grain: str, ratio: float) -> str:
    """Return what the table calls a measurement of latency."""
    words = {"layers": "layers", "even": "neurons, even", "uneven": "neurons, uneven"}
    return f"latency: {shape}, {words[grain]}, {ratio:.0%} off"


def measure_memory(shape: str, who: str, seed: int, quick: bool) -> dict[str, float]:
    """Return the peak of a pruning run; quick means few layers and less text."""
    folder = checkpoint(shape, QUICK_LAYERS if quick else SHAPES[shape]["num_hidden_layers"])
    if who == PEER:
        text = {"sequences": TAYLOR_SEQUENCES, "length": TAYLOR_LENGTH}
        return in_fresh_process(
            {"run": "taylor", "folder": str(folder), "ratio": RATIO, "seed": seed, "device": DEVICE, **text}, CORES
        )
    return run_comp(folder, who, seed, QUICK_SEQUENCES if quick else SEQUENCES)


def measure_stream(who: str, seed: int, quick: bool) -> dict[str, float]:
    """Return peak, seconds and bytes of a streamed run; quick means few layers and less text."""
    folder = checkpoint(BIG, QUICK_STREAMED if quick else SHAPES[BIG]["num_hidden_layers"])
    return run_comp(folder, who, seed, QUICK_SEQUENCES if quick else STREAM_SEQUENCES)


def run_comp(folder: Path, who: str, seed: int, sequences: int) -> dict[str, float]:
    """Prune a checkpoint by COMP in a fresh process, and look at what was written."""
    with place_for_output() as out:
        settings = {"folder": str(folder), "out": str(out), "faithful": who == FAITHFUL, "ratio": RATIO}
        text = {"sequences": sequences, "length": LENGTH, "seed": seed}
        found = in_fresh_process({"run": "comp", "device": DEVICE, **settings, **text}, CORES)
        return found | {"layers": check_output(out)}


# What is measured under which name.
MEASURES: dict[str, Callable[[int, bool], Mapping[str, Any]]] = {
    **{
        memory_case(shape, who): partial(measure_memory, shape, who)
        for shape in MEMORY_SHAPES
        for who in (PEER, FAITHFUL, RECOMMENDED)
    },
    **{stream_case(who): partial(measure_stream, who) for who in (FAITHFUL, RECOMMENDED)},
    **{
        latency_case(shape, grain, ratio): partial(
            lambda setting, grain, ratio, seed, quick: measure_latency(
                Setting(setting.shape, 4, decoded=16, decode_turns=2, prefill_turns=2) if quick else setting,
                grain,
                ratio,
                seed,
                DEVICE,
            ),
            setting,
            grain,
            ratio,
        )
        for shape, setting in LATENCY.items()
        for grain, ratio in grains()
    },
}


def measure(case: str, seed: int, quick: bool) -> Mapping[str, Any]:
    """Measure one case once."""
    return MEASURES[case](seed, quick)


def prepare(seeds: Sequence[int], quick: bool) -> None:  # noqa: ARG001
    """One thread in this process, on which latencies are steady, and exact products on a GPU."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False


def targets(results: Results) -> list[Target]:
    """Return the lines on memory, the streamed run and latency; memory is the process's, on a GPU the device's too."""
    lines = []
    kinds = {"peak_mb": "resident memory"} | ({} if DEVICE == "cpu" else {"device_mb": "device memory"})
    for shape in MEMORY_SHAPES:
        for who in (FAITHFUL, RECOMMENDED):
            for key, kind in kinds.items():
                ratio = results.ratio(memory_case(shape, who), memory_case(shape, PEER), key)
                lines.append(Target.at_most(f"{shape}: peak {kind} in all, {who} / {PEER}", ratio, 0.2))
    for who in (FAITHFUL, RECOMMENDED):
        for key, kind in kinds.items():
            peak = results.center(stream_case(who), key)
            gb = None if peak is None else peak / 1e3
            lines.append(Target.at_most(f"{BIG}, {who}, streamed: peak {kind}, GB", gb, 3.0))
        off = results.center(stream_case(who), "off")
        lines.append(Target.at_most(f"{BIG}, {who}, streamed: parameters beside the target, of it", off, 0.01))
    for shape in LATENCY:
        for grain, ratio in grains():
            case = latency_case(shape, grain, ratio)
            for phase in PHASES:
                found = results.values(case, f"{phase}_excess")
                value = statistics.median(found) if found else None
                lines.append(Target.at_most(f"{case}: {phase}, time ratio / multiply-add ratio", value, 1.1))
    return lines


def figure(results: Results, path: Path) -> None:
    """Draw peaks of memory, and times against multiply-adds."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, 4.5), layout="constrained")
    memory, times = drawing.subplots(1, 2)
    cases = [case for case in MEASURES if not case.startswith("latency")]
    colors = ["tab:gray" if PEER in case else "tab:orange" for case in cases]
    memory.barh(cases, [(results.center(case, "peak_mb") or 0) / 1e3 for case in cases], color=colors)
    memory.axvline(3, color="black", linestyle=":")
    memory.set_xlabel("peak resident memory, GB\n(line: 3 GB)")
    latencies = [case for case in MEASURES if case.startswith("latency")]
    for row, case in enumerate(latencies):
        for phase, color, shift in zip(PHASES, ("tab:orange", "tab:blue"), (-0.15, 0.15), strict=True):
            dense, pruned = results.values(case, f"{phase}_dense_ms"), results.values(case, f"{phase}_ms")
            found = [after / before for before, after in zip(dense, pruned, strict=True)]
            label = phase if row == 0 else None
            times.plot(found, [row + shift] * len(found), "o", color=color, alpha=0.5, label=label)
            left = results.values(case, f"{phase}_macs")
            times.plot(left, [row + shift] * len(left), "|", color="black", markersize=10)
    times.set_yticks(range(len(latencies)), [case.partition(": ")[2] for case in latencies])
    times.set(xlim=(0, 1.2), xlabel="time of pruned / dense\n(bar: multiply-adds)")
    times.legend(fontsize=8, loc="lower left")
    for axes in (memory, times):
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()
    drawing.savefig(path, dpi=150)


BENCHMARK = Benchmark(
    cases=tuple(Case(case, repetitions=2 if case.startswith("latency") else 1) for case in MEASURES),
    columns={
        "peak_mb": Column("peak MB", digits=0),
        "above_mb": Column("above imports MB", digits=0),
        **({} if DEVICE == "cpu" else {"device_mb": Column("device MB", digits=0)}),
        "seconds": Column("run", "real_s", 1),
        "read_gb": Column("GB read", digits=2),
        "written_gb": Column("GB written", digits=2),
        "off": Column("beside the target", digits=5),
        "layers": Column("layers", digits=0),
        "decode_dense_ms": Column("decode, dense", "real_ms", 1),
        "decode_ms": Column("decode, pruned", "real_ms", 1),
        "decode_excess": Column("decode: times / multiply-adds"),
        "prefill_dense_ms": Column("prefill, dense", "real_ms", 0),
        "prefill_ms": Column("prefill, pruned", "real_ms", 0),
        "prefill_excess": Column("prefill: times / multiply-adds"),
    },
    measure=measure,
    targets=targets,
    figure=figure,
    prepare=prepare,
    settings={
        "device": device_name(),
        "ratio": RATIO,
        "calibration": {
            "COMP": [SEQUENCES, LENGTH],
            "COMP, streamed": [STREAM_SEQUENCES, LENGTH],
            "Taylor": [TAYLOR_SEQUENCES, TAYLOR_LENGTH],
        },
        "latency": {name: vars(setting) for name, setting in LATENCY.items()},
        "threads": {"memory and stream": CORES, "latency": 1},
        "weights": "random",
    },
    packages=("transformers",),
)
