"""Figures of a model before and after pruning, measured on the device that keeps it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fl_edge.comp.memory import peak_bytes
from fl_edge.comp.outcome import Figures
from fl_edge.comp.output import parameters
from fl_edge.models.quiet import quiet
from fl_edge.pruning import load_pruned

_PROMPT, _TOKENS = 16, 12  # tokens before, and tokens whose times are measured
_BATCH_TOKENS = 2048


def measured(base: Path, pruned: Path, test: Tensor, device: torch.device) -> Figures:
    """Return what pruning changed; one whole model after the other is in memory.

    Parameters
    ----------
    base, pruned
        Folders of the models.
    test
        (s, n) int64.
    device
        Where the models compute.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - heavy

    peak = peak_bytes(device)["resident"]
    with quiet():
        before = _figures(AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True), test, device)
    after = _figures(load_pruned(pruned), test, device)
    parameters_, perplexity, latency_s, memory = zip(before, after, strict=True)
    return Figures(parameters_, perplexity, latency_s, memory, peak)


@torch.inference_mode()
def _figures(model: Any, test: Tensor, device: torch.device) -> tuple[float, float, float, float]:
    model = model.to(device).eval()
    memory = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return parameters(model), _perplexity(model, test, device), _latency(model, test, device), memory


def _perplexity(model: Any, test: Tensor, device: torch.device) -> float:
    total = 0.0
    for rows in torch.split(test, max(1, _BATCH_TOKENS // test.shape[1])):
        tokens = rows.to(device)
        logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        nll = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
        total += float(nll)
    return math.exp(min(total / (test.numel() - len(test)), 30.0))


def _latency(model: Any, test: Tensor, device: torch.device) -> float:
    """Return the median time of one token with a cache of those before it."""
    tokens = test[:1].to(device)
    past = model(tokens[:, :_PROMPT], use_cache=True).past_key_values
    took = []
    for _ in range(_TOKENS):
        started = time.perf_counter()
        past = model(tokens[:, -1:], past_key_values=past, use_cache=True).past_key_values
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - started)
    return median(took)
