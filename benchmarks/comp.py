"""COMP against its peers: perplexity of pruned language models at equal size, without fine-tuning.

Two models, trained here to a plateau (a Llama, and a Qwen3 whose queries share keys), lose 10 to 50 % of their decoder
layers' parameters. Calibration, validation and test text come from different files, none of which the models were
trained on; a seed is another draw of calibration text. Every method gets the same 128 sequences of 128 tokens.

* *COMP* as it is recommended, as faithful as is known to the paper, and with one thing changed at a time.
* *Peers* (:mod:`benchmarks.comp_peers`): each in the variant that is best on the validation text with seed 0's
  calibration, at every ratio anew. LLM-Pruner also as its authors run it: layer by layer, ends protected, 10 x 64.
* *mask tuning*: the error of every tuned map on held-out text, with its mask and with ones.
* *many devices*: weights of the federated run, three devices with unequal texts, against one run on all texts.

Nothing here is timed but for orientation, so two measurements run side by side.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.comp_models import CALIBRATION, LENGTH, MODELS, QUICK_STEPS, STEPS, load, perplexity, texts
from benchmarks.comp_ours import federated_difference, held_out, pruned
from benchmarks.comp_peers import PEERS
from benchmarks.comp_peers_cut import prunable_weights
from benchmarks.harness import Benchmark, Case, Column, Results, Target
from fl_edge.comp.config import CompConfig, faithful
from fl_edge.data.once import content_key
from fl_edge.files import default_folder, write_whole

DEVICE = os.environ.get("FL_EDGE_DEVICE", "cpu")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
CLOSE = (0.2, 0.4)  # where targets are set, and one thing is changed at a time
RECOMMENDED, FAITHFUL, PUBLISHED = "COMP, recommended", "COMP, faithful", "LLM-Pruner as published"
OURS: Mapping[str, CompConfig] = {RECOMMENDED: CompConfig(), FAITHFUL: faithful(CompConfig())}
CHANGED: Mapping[str, CompConfig] = {
    "faithful, score A": replace(OURS[FAITHFUL], score="sensitivity"),
    "faithful, no tuning": replace(OURS[FAITHFUL], restore="none"),
    "faithful, c = 0.5": replace(OURS[FAITHFUL], layer_share=0.5),
    "faithful, ratios by importance": replace(OURS[FAITHFUL], allocation="importance"),
    "recommended, ratios by importance": replace(OURS[RECOMMENDED], allocation="importance"),
    "recommended, dense output wanted": replace(OURS[RECOMMENDED], target="dense"),
    "recommended, bias": replace(OURS[RECOMMENDED], bias=True),
    "recommended, layers go too": replace(OURS[RECOMMENDED], layer_share=0.5),
    "recommended, layers by loss": replace(OURS[RECOMMENDED], layer_share=0.5, layer_rule="loss"),
    "recommended, layers go too, repair": replace(OURS[RECOMMENDED], layer_share=0.5, repair=True),
}
_AHEAD = 3  # measurements that are under way beside the one that is waited for


def case_name(model: str, ratio: float, method: str) -> str:
    """Return what the table calls a measurement."""
    return f"{model} {ratio:.0%}: {method}"


def mask_case(model: str, ratio: float) -> str:
    """Return what the table calls the check of mask tuning."""
    return f"{model} {ratio:.0%}: mask tuning, held out"


METHODS = {
    case_name(model, ratio, method): (model, ratio, method)
    for model in MODELS
    for ratio in sorted(RATIOS, key=lambda ratio: ratio not in CLOSE)
    for method in (*OURS, *PEERS, PUBLISHED, *(CHANGED if ratio in CLOSE else ()))
}
MASKS = {mask_case(model, ratio): (model, ratio) for model in MODELS for ratio in CLOSE}
FEDERATED = {f"{model} 20%: many devices": model for model in MODELS}
NAMES = (*METHODS, *MASKS, *FEDERATED)
QUICK = f"{MODELS[0]} {CLOSE[0]:.0%}"  # what --quick measures
GUARDED = "ratios by importance"  # but for this, which the guard refuses on a model so little trained


def measure(case: str, seed: int, quick: bool) -> Mapping[str, Any]:
    """Return what a case gives; it and the next ones are computed in two other processes."""
    place = NAMES.index(case)
    for name in NAMES[place : place + 1 + _AHEAD]:
        if not quick or name.startswith(QUICK):
            _begin(name, seed, quick)
    return _begin(case, seed, quick).result()


@functools.cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


@functools.cache
def _begin(case: str, seed: int, quick: bool) -> Future[dict[str, float]]:
    return _pool().submit(_measure, case, seed, quick)


def _measure(case: str, seed: int, quick: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    steps = QUICK_STEPS if quick else STEPS
    if case in FEDERATED:
        return {"difference": federated_difference(FEDERATED[case], steps, seed, DEVICE)}
    if case in MASKS:
        return held_out(*MASKS[case], steps, seed, DEVICE, OURS[FAITHFUL])
    name, ratio, method = METHODS[case]
    model, text = load(name, steps, DEVICE), texts(name, steps)
    calibration = text.calibration(seed)
    begun = time.perf_counter()
    if method in OURS or method in CHANGED:
        found = pruned(name, steps, calibration, replace({**OURS, **CHANGED}[method], ratio=ratio), DEVICE)
    else:
        variant = next(iter(PEERS["LLM-Pruner"])) if method == PUBLISHED else best_variant(name, steps, method, ratio)
        peer = "LLM-Pruner" if method == PUBLISHED else method
        found = PEERS[peer][variant](model, calibration, ratio)
    took = time.perf_counter() - begun
    dense = _dense(name, steps)
    return {
        "perplexity": (value := perplexity(found, text.test)),
        "dense": dense,
        "gap": value - dense,
        "left": prunable_weights(found) / prunable_weights(model),
        "took_s": took,
    }


@functools.cache
def _dense(name: str, steps: int) -> float:
    return perplexity(load(name, steps, DEVICE), texts(name, steps).test)


def best_variant(name: str, steps: int, peer: str, ratio: float) -> str:
    """Return the variant of a peer that is best on validation text; found once and kept on disk."""
    own = [path.read_text() for path in sorted(Path(__file__).parent.glob("comp_*.py"))]
    file = default_folder() / "benchmarks" / f"{content_key(name, steps, peer, ratio, own)}.json"
    try:
        return str(json.loads(file.read_text())["best"])
    except (OSError, ValueError, KeyError):
        pass
    model, text = load(name, steps, DEVICE), texts(name, steps)
    calibration = text.calibration(0)
    found = {
        variant: perplexity(prune(model, calibration, ratio), text.validation) for variant, prune in PEERS[peer].items()
    }
    best = min(found, key=lambda variant: found[variant])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"best": best, "validation": found, "of": [name, steps, peer, ratio]}))
    return best


def targets(results: Results) -> list[Target]:
    """Return the lines of the table that was asked for, model by model."""
    lines: list[Target] = []
    asked = {record["case"] for record in results.raw}  # the quick run measures one model at one ratio
    for model in MODELS:
        for ratio in (each for each in CLOSE if case_name(model, each, RECOMMENDED) in asked):
            gaps = {
                method: results.center(case_name(model, ratio, method), "gap") for method in (*OURS, *PEERS, PUBLISHED)
            }
            peers = [gap for peer in PEERS if (gap := gaps[peer]) is not None]
            complete = min(peers) if len(peers) == len(PEERS) else None
            where = f"{model}, {ratio:.0%}: gap to dense of"
            for method, bound in ((FAITHFUL, 0.8), (RECOMMENDED, 0.4)):
                lines.append(
                    Target.at_most(f"{where} {method} / the best peer, tuned", _part(gaps[method], complete), bound)
                )
            for peer in (PUBLISHED, "LLM-Pruner") if ratio == CLOSE[0] else ():
                label = peer if peer == PUBLISHED else "LLM-Pruner's score, tuned"
                lines.append(
                    Target.at_most(f"{where} {RECOMMENDED} / {label}", _part(gaps[RECOMMENDED], gaps[peer]), 0.5)
                )
            lower = [a / b for a, b in _pairs(results, mask_case(model, ratio))]
            lines.append(
                Target.at_least(
                    f"{model}, {ratio:.0%}: maps whose held-out error mask tuning lowers", min(lower, default=None), 1.0
                )
            )
        if found := results.values(f"{model} 20%: many devices", "difference"):
            lines.append(Target.at_most(f"{model}: weights of many devices off one run's by", max(found), 1e-4))
    off = [
        abs(left / (1 - ratio) - 1)
        for case, (_, ratio, method) in METHODS.items()
        if method in (*OURS, *CHANGED)
        for left in results.values(case, "left")
    ]
    lines.append(Target.at_most("parameters left, off the target, worst of all runs", max(off, default=None), 0.01))
    return lines


def _part(ours: float | None, peer: float | None) -> float | None:
    return None if ours is None or not peer else ours / peer


def _pairs(results: Results, case: str) -> list[tuple[float, float]]:
    return list(zip(results.values(case, "lowered"), results.values(case, "tuned_maps"), strict=True))


def figure(results: Results, path: Path) -> None:
    """Draw perplexity against the ratio, one panel a model."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, model in zip(drawing.subplots(1, len(MODELS)), MODELS, strict=True):
        for number, method in enumerate((*OURS, *PEERS, PUBLISHED)):
            points = [(ratio, results.center(case_name(model, ratio, method), "perplexity")) for ratio in RATIOS]
            ratios, values = [[point[side] for point in points if point[1] is not None] for side in (0, 1)]
            line = {"lw": 2.5, "ls": "-"} if method in OURS else {"lw": 1.0, "ls": "--"}
            axes.plot(ratios, values, marker="o", color=f"C{number}", label=method, **line)
        dense = [value for ratio in RATIOS for value in results.values(case_name(model, ratio, RECOMMENDED), "dense")]
        if dense:
            axes.axhline(statistics.fmean(dense), color="black", linestyle=":", label="dense")
        axes.set(title=model, xlabel="part of the layers' parameters removed", ylabel="test perplexity", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=150)


def prepare(seeds: Sequence[int], quick: bool) -> None:  # noqa: ARG001
    """Train the models, where that has not been done on this machine."""
    for name in MODELS[: 1 if quick else None]:
        load(name, QUICK_STEPS if quick else STEPS, DEVICE)


BENCHMARK = Benchmark(
    cases=tuple(
        Case(
            name,
            quick_repetitions=int(name.startswith(QUICK) and not name.endswith(GUARDED)),
            needs=("torch_pruning",) if name.endswith("Torch-Pruning") else (),
        )
        for name in NAMES
    ),
    columns={
        "perplexity": Column("test perplexity"),
        "gap": Column("gap to dense"),
        "left": Column("parameters left", digits=4),
        "lowered": Column("maps lowered", digits=0),
        "tuned_maps": Column("of maps", digits=0),
        "worst": Column("worst tuned / untuned"),
        "difference": Column("relative difference", digits=8),
        "took_s": Column("took", "real_s", 1),
    },
    measure=measure,
    targets=targets,
    figure=figure,
    prepare=prepare,
    seeds=(0, 1, 2),
    settings={
        "device": DEVICE,
        "ratios": list(RATIOS),
        "sequences": CALIBRATION,
        "length": LENGTH,
        "steps": STEPS,
        "torch_threads": 1,
    },
    packages=("transformers", "torch-pruning"),
)
