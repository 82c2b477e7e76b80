"""Time of pruned decoders against the dense one, with the multiply-adds that are left beside it.

Decoding is one sequence, token after token with a key/value cache, after a short prompt; prefill is one sequence at
once. Dense and pruned model take turns. Multiply-adds are those of the linear maps, the vocabulary's head at every
token included, and of attention over the positions that a token sees: the cache while decoding, on average half of the
sequence in prefill.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from benchmarks.comp_peers_cut import even_counts
from benchmarks.comp_shapes import SCALE, SHAPES
from fl_edge.comp.allocation import layer_ratios
from fl_edge.pruning import LayerPlan, PruningPlan, count_costs, full_plan, prune, unit_params
from fl_edge.pruning.configuration import empty
from fl_edge.seeding import numpy_rng, torch_rng

SPREAD = 0.5  # of the logarithms of the drawn layers' importance


@dataclass(frozen=True)
class Setting:
    """What is timed: a shape with so many layers, and how many tokens and turns."""

    shape: str
    layers: int
    prompt: int = 32
    decoded: int = 32
    prefill: int = 512
    decode_turns: int = 4
    prefill_turns: int = 3


@functools.cache
def skeleton(shape: str, layers: int) -> Any:
    """Return a model of a shape without memory."""
    settings = dict(SHAPES[shape]) | {"num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.tie_word_embeddings = False
    architecture: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return empty(architecture, config)


def build(shape: str, layers: int, plan: PruningPlan | None, device: str, dtype: torch.dtype) -> Any:
    """Return a model of random weights that keeps what a plan says, by default everything."""
    skeleton.cache_clear()  # a plan slices it
    model = skeleton(shape, layers)
    if plan is not None:
        prune(model, plan)
    generator = torch_rng(0, "pool")
    pool = (torch.randn(2**20 - 3, generator=generator) * SCALE).to(device, dtype)  # numbers say nothing about times
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            filled = torch.empty(parameter.shape, device=device, dtype=dtype)
            flat = filled.view(-1)
            for start in range(0, len(flat), len(pool)):
                flat[start : start + len(pool)] = pool[: len(flat) - start]
            setattr(module, name, nn.Parameter(filled, requires_grad=False))
    skeleton.cache_clear()
    return model.to(device).eval()


def plan_of(setting: Setting, grain: str, ratio: float, seed: int) -> PruningPlan:
    """Return a plan: ``layers``, whole ones; ``even``, the same of each; ``uneven``, each its own ratio as by COMP."""
    model = skeleton(setting.shape, setting.layers)
    full, rng = full_plan(model), numpy_rng(seed, "plan", grain)
    if grain == "layers":
        gone = {int(layer) for layer in rng.permutation(setting.layers)[: round(ratio * setting.layers)]}
        layers = [LayerPlan((), ()) if layer in gone else each for layer, each in enumerate(full.layers)]
    else:
        counts = even_counts(model, ratio, "nearest")
        counts = [counts[0]] * setting.layers if grain == "even" else _uneven_counts(model, ratio, rng)
        layers = [_draw(each, gone, rng) for each, gone in zip(full.layers, counts, strict=True)]
    return PruningPlan(full.model_type, full.heads, full.channels, tuple(layers))


def _uneven_counts(model: nn.Module, ratio: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return what each layer loses by COMP's rule of ratios, for importance that is drawn; heads first, as it does."""
    full, units = full_plan(model), unit_params(model)
    sizes = [h * full.heads[0] + c * full.channels[0] for h, c in units]
    importance = np.exp(SPREAD * rng.standard_normal(len(sizes))).tolist()
    counts, owed = [], 0.0
    ratios = layer_ratios(importance, sizes, ratio * sum(sizes), 1.0, 0.8)
    for own, size, (head, channel) in zip(ratios, sizes, units, strict=True):
        heads = min(round(own * full.heads[0]), full.heads[0] - 1)
        owed += own * size - heads * head
        channels = max(0, min(round(owed / channel), full.channels[0] - 1))
        owed -= channels * channel
        counts.append((heads, channels))
    return counts


def _draw(layer: LayerPlan, gone: tuple[int, int], rng: np.random.Generator) -> LayerPlan:
    heads, channels = (
        tuple(sorted(int(unit) for unit in rng.permutation(len(units))[count:]))
        for units, count in zip((layer.heads, layer.channels), gone, strict=True)
    )
    return LayerPlan(heads, channels)


@torch.inference_mode()
def decode(model: Any, prompt: Tensor, count: int) -> float:
    """Return the seconds a token of ``count`` tokens decoded one by one after a prompt (1, n)."""
    given = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token, cache = given.logits[:, -1:].argmax(-1), given.cache
    started = _now(model)
    for _ in range(count):
        given = model(input_ids=token, cache=cache, use_cache=True)
        token = given.logits[:, -1:].argmax(-1)
    return (_now(model) - started) / count


@torch.inference_mode()
def prefill(model: Any, ids: Tensor) -> float:
    """Return the seconds of a forward pass over a sequence (1, n), logits of every token included."""
    started = _now(model)
    model(input_ids=ids, use_cache=True)
    return _now(model) - started


def macs(plan: PruningPlan, setting: Setting, phase: str) -> float:
    """Return the multiply-adds a token of a phase on average."""
    found = count_costs(skeleton(setting.shape, setting.layers), plan)
    seen = setting.prompt + (setting.decoded + 1) / 2 if phase == "decode" else (setting.prefill + 1) / 2
    return found.block_macs + seen * found.attention_macs + found.outside_macs


def measure_latency(setting: Setting, grain: str, ratio: float, seed: int, device: str) -> dict[str, float]:
    """Return median times of both phases, dense and pruned, and each ratio of times over that of multiply-adds."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    whole = full_plan(skeleton(setting.shape, setting.layers))
    plan = plan_of(setting, grain, ratio, seed)
    models = [build(setting.shape, setting.layers, each, device, dtype) for each in (None, plan)]
    words = SHAPES[setting.shape]["vocab_size"]
    ids = torch.randint(words, (1, setting.prefill), generator=torch_rng(seed, "prompt")).to(device)
    runs: dict[str, tuple[Callable[[Any], float], int]] = {
        "decode": (lambda model: decode(model, ids[:, : setting.prompt], setting.decoded), setting.decode_turns),
        "prefill": (lambda model: prefill(model, ids), setting.prefill_turns),
    }
    found: dict[str, float] = {}
    for phase, (run, turns) in runs.items():
        took = [[run(model) for model in models] for _ in range(turns + 1)][1:]  # the first turn loads kernels
        dense, pruned = (statistics.median(each) for each in zip(*took, strict=True))
        left = macs(plan, setting, phase) / macs(whole, setting, phase)
        found |= {f"{phase}_dense_ms": 1e3 * dense, f"{phase}_ms": 1e3 * pruned, f"{phase}_macs": left}
        found[f"{phase}_excess"] = pruned / dense / left
    return found


def _now(model: Any) -> float:
    if model.device.type != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def grains(ratios: Sequence[float] = (0.2, 0.4)) -> list[tuple[str, float]]:
    """Return what is timed: (grain, ratio)."""
    return [("layers", 0.25), ("layers", 0.5), *((grain, ratio) for ratio in ratios for grain in ("even", "uneven"))]
