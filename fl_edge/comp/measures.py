"""What a causal language model costs and is worth: size, perplexity, latency, memory of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.survey import chunks, loss
from fl_edge.errors import DataError
from fl_edge.models.quiet import quiet
from fl_edge.models.shards import Shards
from fl_edge.pruning import load_pruned
from fl_edge.pruning.saving import PLAN

PREFILL = 512  # tokens
_DECODED = 16
_REPEATS, _SECONDS = 5, 0.5  # at least, of what is timed


@dataclass(frozen=True)
class Measures:
    """Figures of a model; None for what was left out.

    Attributes
    ----------
    parameters
        Tied ones once.
    disk_bytes
        Of the files of weights.
    memory_bytes
        Of the weights in memory.
    perplexity
        On the test text; None without one.
    decode_ms, prefill_ms
        Milliseconds a token that follows another, batch 1, and for ``prefill`` tokens at once; the best of
        several, since others may compute on the machine meanwhile.
    prefill
        512, or what the model takes.
    """

    parameters: int
    disk_bytes: int
    memory_bytes: int
    perplexity: float | None
    decode_ms: float | None
    prefill_ms: float | None
    prefill: int


def load(folder: Path, device: torch.device) -> Any:
    """Return the model of a folder, pruned or not, in evaluation mode on a device.

    Raises
    ------
    DataError
        A damaged folder.
    """
    if (folder / PLAN).exists():
        return load_pruned(folder).to(device)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - heavy

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    return model.eval().to(device)


def measure(folder: Path, tokens: Tensor | None, device: torch.device) -> Measures:
    """Measure the model in a folder, pruned or not.

    A model larger than half of the free memory is not loaded: its perplexity is streamed where its layers are alike,
    and what needs the whole model is left out.

    Parameters
    ----------
    tokens
        (s, n) int64, the test text.

    Raises
    ------
    DataError
        A damaged folder.
    """
    shards = Shards(folder)
    sizes = {name: math.prod(stored.shape) for name, stored in shards.tensors.items()}
    held = sum(size * shards.tensors[name].dtype.itemsize for name, size in sizes.items())
    disk = sum(file.stat().st_size for file in {stored.file for stored in shards.tensors.values()})
    if held <= free_bytes(device) / 2:
        return measure_model(load(folder, device), tokens, disk)
    return Measures(sum(sizes.values()), disk, held, _streamed(folder, tokens, device), None, None, PREFILL)


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)


@torch.no_grad()
def measure_model(model: Any, tokens: Tensor | None, disk_bytes: int) -> Measures:
    """Measure a loaded model; otherwise as :func:`measure`."""
    weights = {id(parameter): parameter for parameter in model.parameters()}.values()
    longest = getattr(model.config, "max_position_embeddings", None) or PREFILL + _DECODED
    prefill = max(1, min(PREFILL, longest - _DECODED))
    prompt = torch.arange(prefill, device=model.device)[None] % model.config.vocab_size
    return Measures(
        parameters=sum(each.numel() for each in weights),
        disk_bytes=disk_bytes,
        memory_bytes=sum(each.nbytes for each in weights),
        perplexity=None if tokens is None else perplexity(model, tokens),
        decode_ms=_decode_ms(model, prompt[:, :1]),
        prefill_ms=_ms(model, lambda: model(prompt, use_cache=False, logits_to_keep=1)),
        prefill=prefill,
    )


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    """Return exp of the mean negative log-likelihood of each next token; tokens (s, n)."""
    total = 0.0
    for rows in chunks(tokens):
        ids = tokens[rows].to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        total += float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return _exp(total / (len(tokens) * (tokens.shape[1] - 1)))


def _streamed(folder: Path, tokens: Tensor | None, device: torch.device) -> float | None:
    """Return the perplexity with one layer in memory, or None where layers differ in width or have added biases."""
    if tokens is None:
        return None
    try:
        checkpoint = Checkpoint(folder, device)
    except DataError:
        return None
    hidden = checkpoint.embed(tokens)
    for layer in range(checkpoint.num_layers):
        checkpoint.load(layer)
        for rows in chunks(tokens):
            hidden[rows] = checkpoint.run(layer, hidden[rows])
        checkpoint.release(layer)
    return _exp(loss(checkpoint, hidden, tokens).mean)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _decode_ms(model: Any, token: Tensor) -> float:
    """Return milliseconds a token, each with the cache of those before."""

    def decode() -> None:
        cache = None
        for _ in range(_DECODED):
            cache = model(token, cache=cache, use_cache=True).cache

    return _ms(model, decode) / _DECODED


def _ms(model: Any, call: Callable[[], object]) -> float:
    """Return the fewest milliseconds of the calls of a while; the first, which warms up, does not count."""
    times: list[float] = []
    while len(times) <= _REPEATS or sum(times) < _SECONDS:
        start = time.perf_counter()
        call()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        times.append(time.perf_counter() - start)
    return min(times[1:]) * 1e3
