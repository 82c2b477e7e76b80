"""What the importance of units costs on top of a LoRA training step: the same step with and without it, in turns."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.pruning_models import SHAPES, TINY, build
from fl_edge.fedspine.factors import Factors, fresh_rows
from fl_edge.fedspine.importance import Smoothing, unit_scores
from fl_edge.fedspine.lora import attach, map_shapes
from fl_edge.pruning import members
from fl_edge.seeding import torch_rng

RANK = 8


def measure_importance(name: str, seed: int, quick: bool, device: str) -> dict[str, Any]:
    """Return median seconds of a step with and without importance, and by how much the first takes longer."""
    shape = SHAPES.get(name, TINY)
    model = build(name, device).train()
    generator = torch_rng(seed, "factors")
    adapter = {
        path: Factors(fresh_rows(RANK, d_in, generator), 0.01 * torch.randn(d_out, RANK, generator=generator))
        for path, (d_out, d_in) in map_shapes(model, members(model)).items()
    }
    maps = attach(model, members(model), adapter, scale=2.0, dropout=0.0)
    trained = [factor for each in maps for factor in (each.a, each.b)]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    layers = 1 + max(each.member.layer for each in maps)
    smoothing = Smoothing(0.9)
    ids = torch.randint(5, model.config.vocab_size, (shape.batch, shape.length), device=device)
    took: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(6 if quick else 20):
        for with_importance in (False, True):
            started = _now(device)
            optimiser.zero_grad(set_to_none=True)
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            output[0].float().square().mean().backward()
            if with_importance:
                smoothing.add(unit_scores(maps, layers, normalise=True))
            optimiser.step()
            if turn:  # the first ones load kernels
                took[with_importance].append(_now(device) - started)
    plain_s, scored_s = statistics.median(took[False]), statistics.median(took[True])
    # neighbours in time are compared, so that a machine that slows down for a while slows both
    extra = statistics.median(scored / plain - 1 for plain, scored in zip(took[False], took[True], strict=True))
    return {"plain_s": plain_s, "scored_s": scored_s, "extra": extra}


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()
