"""The decoder layer that is in memory: what its heads and channels flow into, and how a decision changes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.decision import Decision
from fl_edge.pruning import LayerPlan, Member, PruningPlan, Unit, full_plan, members, prune
from fl_edge.pruning.plan import UNITS


class Workbench:
    """One layer of a checkpoint at a time, being pruned.

    Attributes
    ----------
    checkpoint
        The unpruned model.
    full
        The plan that keeps everything.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.full = full_plan(checkpoint.skeleton)
        self._consumers = {(m.layer, m.unit): m for m in members(checkpoint.skeleton) if m.axis == 1}
        self._present = self.full
        self._scale = 1.0

    def open(self, layer: int, scale: float = 1.0) -> None:
        """Load a layer; what it adds to the hidden states is divided by ``scale``."""
        self.checkpoint.load(layer)
        self._present, self._scale = self.full, scale
        for unit in UNITS:
            linear = self.consumer(layer, unit)
            with torch.no_grad():
                linear.weight.div_(scale)
                if linear.bias is not None:
                    linear.bias.div_(scale)

    @contextmanager
    def undivided(self, layer: int) -> Iterator[None]:
        """Let a loaded layer add to the hidden states what it does in the dense model, whatever it was opened with."""
        scale = self._scale
        maps = (self.consumer(layer, unit) for unit in UNITS if scale != 1)
        handles = [linear.register_forward_hook(lambda _module, _inputs, output: output * scale) for linear in maps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def member(self, layer: int, unit: Unit) -> Member:
        """Return which map consumes a layer's units, and how many of its columns belong to one."""
        return self._consumers[layer, unit]

    def consumer(self, layer: int, unit: Unit) -> nn.Linear:
        """Return the map that consumes a loaded layer's units."""
        found: nn.Linear = self.checkpoint.skeleton.get_submodule(self.member(layer, unit).path)
        return found

    def apply(self, layer: int, unit: Unit, decision: Decision) -> None:
        """Slice the loaded layer and fold what was tuned into its weights."""
        before = self._present.layers[layer]
        kept = LayerPlan(decision.kept, before.channels) if unit == "heads" else LayerPlan(before.heads, decision.kept)
        layers = (*self.full.layers[:layer], kept, *self.full.layers[layer + 1 :])
        plan = replace(self.full, layers=layers)
        prune(self.checkpoint.skeleton, plan, self._present)
        self._present = plan
        decision.fold(self.consumer(layer, unit))

    def close(self, layer: int) -> tuple[LayerPlan, dict[str, Tensor]]:
        """Release a layer; return what it keeps, and its tensors by their names in the layer."""
        block = self.checkpoint.skeleton.get_submodule(self.member(layer, "heads").path.partition(f".{layer}.")[0])
        tensors = {name: tensor.detach() for name, tensor in block[layer].state_dict().items()}
        plan: PruningPlan = self._present
        self._scale = 1.0
        self.checkpoint.release(layer)
        return plan.layers[layer], tensors
