"""COMP as :mod:`benchmarks.comp` runs it: from a model's folder to a pruned one, as a user would."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.comp_models import texts
from fl_edge.comp.config import CompConfig
from fl_edge.comp.decision import Decision
from fl_edge.comp.device import Device
from fl_edge.comp.history import History
from fl_edge.comp.local import TextSource
from fl_edge.comp.outline import Source
from fl_edge.comp.pooled import Answer, PooledSource, Question
from fl_edge.comp.run import prune_checkpoint
from fl_edge.comp.statistics import Statistics, relative_error
from fl_edge.comp.sums import Sums, form_of
from fl_edge.comp.walker import Walker
from fl_edge.comp.workbench import Workbench
from fl_edge.models.small import small_model
from fl_edge.pruning import Unit, load_pruned

PARTS = (16, 40, 72)  # calibration sequences of the devices
HELD_OUT = 64  # sequences
_WIRE = torch.float32
_MOST_BYTES = 2**24  # of an answer
SourceOf = Callable[[Workbench], Source]


def pruned(name: str, steps: int, tokens: Tensor, config: CompConfig, device: str) -> nn.Module:
    """Return a model of :mod:`benchmarks.comp_models`, pruned on some text."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        _prune(name, steps, out, config, device, lambda bench: TextSource(bench, tokens, config.target))
        model = load_pruned(out).to(device)
    model.config.use_cache = False  # type: ignore[union-attr]
    return model


class _HeldOut(TextSource):
    """Measures on a second text too what each decision does to a map's error there."""

    def __init__(self, bench: Workbench, tokens: Tensor, held: Tensor, target: str) -> None:
        super().__init__(bench, tokens, target)
        self.parts: list[float] = []  # error with the mask / with ones, map by map where units went
        self._walker_there = Walker(bench, held)
        self._there: tuple[Statistics, Tensor] | None = None

    def begin(self) -> None:
        super().begin()
        self._walker_there.begin()

    def skip(self, layer: int, growth: float) -> None:
        super().skip(layer, growth)
        self._walker_there.skip(layer, growth)

    def statistics(self, layer: int, unit: Unit) -> Statistics:
        self._there = (
            self._walker_there.measure(layer, unit, self._target),
            self._bench.consumer(layer, unit).weight.detach().clone(),
        )
        return super().statistics(layer, unit)

    def decided(self, layer: int, unit: Unit, decision: Decision) -> None:
        super().decided(layer, unit, decision)
        assert self._there is not None
        assert decision.mask is not None
        statistics, weight = self._there
        width = self._bench.member(layer, unit).width
        kept = (torch.tensor(decision.kept)[:, None] * width + torch.arange(width)).flatten()
        bare, tuned = torch.zeros_like(weight), torch.zeros_like(weight)
        bare[:, kept] = weight[:, kept]
        tuned[:, kept] = weight[:, kept] * decision.mask.to(weight)
        if decision.order:
            self.parts.append(relative_error(statistics, tuned) / relative_error(statistics, bare))
        if unit == "channels":
            self._walker_there.advance(layer)


def held_out(name: str, ratio: float, steps: int, seed: int, device: str, config: CompConfig) -> dict[str, float]:
    """Return in how many of the maps that lost units mask tuning lowers the error on held-out text, and the worst."""
    text, made = texts(name, steps), list[_HeldOut]()
    config = replace(config, ratio=ratio)

    def source_of(bench: Workbench) -> Source:
        made.append(_HeldOut(bench, text.calibration(seed), text.validation[:HELD_OUT], config.target))
        return made[0]

    with tempfile.TemporaryDirectory() as folder:
        _prune(name, steps, Path(folder) / "out", config, device, source_of)
    parts = made[0].parts
    return {"lowered": sum(part < 1 for part in parts), "tuned_maps": len(parts), "worst": max(parts)}


def federated_difference(name: str, steps: int, seed: int, device: str) -> float:
    """Return how far the weights of devices that pool their sums are from those of one run on all of their text.

    The largest of the tensors' relative differences, in the Frobenius norm; sums travel in float32.
    """
    config = CompConfig(ratio=0.2)
    tokens = texts(name, steps).calibration(seed, sum(PARTS))
    found: list[Mapping[str, Tensor]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        history = History(folder / "decisions")
        devices = [
            Device(small_model(name, steps), folder / f"device-{number}", part, config, torch.device(device))
            for number, part in enumerate(torch.split(tokens, list(PARTS)))
        ]

        def ask(question: Question) -> list[Answer]:
            answers: list[Answer] = []
            for each in devices:
                each.follow(each.steps, [history.read(step) for step in range(each.steps, len(history))], measures=True)
                answer = each.answer(question, form_of(config))
                assert answer is not None
                answers.append({key: _sent(value) for key, value in answer.items()})
            return answers

        for out, source_of in (
            (folder / "together", lambda bench: PooledSource(bench, ask, history, _MOST_BYTES)),
            (folder / "alone", lambda bench: TextSource(bench, tokens, config.target)),
        ):
            _prune(name, steps, out, config, device, source_of)
            found.append(load_pruned(out).state_dict())
    together, alone = found
    return max(
        float((together[key].double() - alone[key].double()).norm() / alone[key].double().norm()) for key in alone
    )


def _sent(value: object) -> object:
    """Return what arrives of a sum."""
    if isinstance(value, Sums):
        return Sums(value.tokens, {key: tensor.to(_WIRE).double() for key, tensor in value.tensors.items()})
    return value


def _prune(name: str, steps: int, out: Path, config: CompConfig, device: str, source_of: SourceOf) -> None:
    prune_checkpoint(
        small_model(name, steps),
        out,
        config,
        source_of,
        key="benchmark",
        device=torch.device(device),
    )
