"""What :mod:`benchmarks.aggregation` compares with: peft's combinations, and the textbook ways to a truncated mean."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fl_edge.fedspine.factors import Factors, Part

Round = Mapping[str, Sequence[Part]]  # the parts of each map


class PeftPeer:
    """A peft model with the adapters of one round."""

    def __init__(self, maps: Round) -> None:
        from peft import LoraConfig, get_peft_model

        shapes = {name: (parts[0].factors.a.shape[1], len(parts[0].factors.b)) for name, parts in maps.items()}
        ranks = [part.factors.rank for part in next(iter(maps.values()))]
        configs = [LoraConfig(r=rank, lora_alpha=rank, target_modules=list(maps)) for rank in ranks]
        self.names = [f"device{index}" for index in range(len(ranks))]
        weights = [part.weight for part in next(iter(maps.values()))]
        self.weights = [weight / sum(weights) for weight in weights]
        base = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model: Any = get_peft_model(base, configs[0], adapter_name=self.names[0])
            for name, config in zip(self.names[1:], configs[1:], strict=True):
                self.model.add_adapter(name, config)
        for map_name, parts in maps.items():
            for name, part in zip(self.names, parts, strict=True):
                pair = self._pair(map_name, name)
                pair.a.copy_(part.factors.a)
                pair.b.copy_(part.factors.b)

    def combine(self, maps: Round, rank: int, combination: str, **options: Any) -> tuple[float, dict[str, Factors]]:
        """Return the seconds of one ``add_weighted_adapter``, and what it made."""
        if combination == "svd":
            options["svd_rank"] = rank
        started = time.perf_counter()
        self.model.add_weighted_adapter(self.names, self.weights, "all", combination_type=combination, **options)
        seconds = time.perf_counter() - started
        made = {name: self._pair(name, "all") for name in maps}
        self.model.delete_adapter("all")
        return seconds, made

    def _pair(self, map_name: str, adapter: str) -> Factors:
        layer = self.model.base_model.model[map_name]
        return Factors(layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data)


def by_qr(parts: Sequence[Part], rank: int) -> Factors:
    """QR of the two stacks and an SVD of the small core, in float64: the usual way on factors."""
    total = sum(part.weight for part in parts)
    left = torch.cat([part.factors.b.double() * (part.weight / total) for part in parts], dim=1)
    right = torch.cat([part.factors.a.double() for part in parts])
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    root = s[:rank].sqrt()
    return Factors(((root[:, None] * vh[:rank]) @ q_right.T).float(), (q_left @ (u[:, :rank] * root)).float())


def by_dense(parts: Sequence[Part], previous: Factors, rank: int) -> Factors:
    """SVD of the dense mean in float64; only its thin part is computed."""
    u, s, vh = torch.linalg.svd(dense_mean(parts, previous), full_matrices=False)
    root = s[:rank].sqrt()
    return Factors((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float())


def dense_mean(parts: Sequence[Part], previous: Factors, by_rank: bool = False) -> Tensor:
    """Return the weighted mean of the products in float64, with ``by_rank`` that of each direction over its owners.

    Rows that nobody holds are the previous product's.
    """
    every = sorted({previous.rank, *(part.factors.rank for part in parts)})
    mean, low = torch.zeros(len(previous.b), previous.a.shape[1], dtype=torch.float64), 0
    for high in every if by_rank else every[-1:]:
        total, weight = torch.zeros_like(mean), mean.new_zeros(len(mean), 1)
        for part in parts:
            if part.factors.rank > low:
                held = slice(None) if part.rows is None else part.rows
                total[held] += part.weight * _product(part.factors, low, high)
                weight[held] += part.weight
        mean += torch.where(weight > 0, total / weight, _product(previous, low, high))
        low = high
    return mean


def _product(factors: Factors, low: int, high: int) -> Tensor:
    return factors.b[:, low:high].double() @ factors.a[low:high].double()


def best_of_rank(mean: Tensor, rank: int) -> Tensor:
    """Return the mean's best approximation, in float64."""
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
    best: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return best
