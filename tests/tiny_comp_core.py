"""Tiny models on disk, drawn dense layers, and COMP done the long way: least squares on whole data, masks hooked in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.config import CompConfig
from fl_edge.comp.course import Progress, prune_layers
from fl_edge.comp.decision import Decision
from fl_edge.comp.local import TextSource
from fl_edge.comp.outline import Outline, Sizes, Source, draw_outline
from fl_edge.comp.statistics import Statistics
from fl_edge.comp.system import System, mask_statistics, weight_system
from fl_edge.comp.workbench import Workbench
from fl_edge.pruning import PruningPlan, Unit, prune
from fl_edge.pruning.plan import UNITS
from fl_edge.pruning.units import find_blocks
from fl_edge.seeding import torch_rng
from tests.tiny_transformers import VOCABULARY, make_model

CPU = torch.device("cpu")
LOOSE = 1e9  # a variance that no mask here reaches
PLAIN = CompConfig(
    ratio=0.4,
    layer_share=0.5,
    layer_rule="similarity",
    similarity="mean",
    iterative_layers=False,
    protect_first=1,
    protect_last=1,
    repair=False,
    allocation="importance",
    alpha=1.0,
    max_layer_ratio=0.8,
    prune_attention=True,
    score="conditioning",
    restore="mask",
    target="dense",
    bias=False,
    damping=1e-3,
    steps=4,
    max_variance=LOOSE,
    block=2048,
)


def configured(**changes: Any) -> CompConfig:
    """Settings that do not move when the defaults do."""
    return dataclasses.replace(PLAIN, **changes)


# models


def save(folder: Path, family: str = "llama", layers: int = 4, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    make_model(family, "causal", num_hidden_layers=layers, **more).to(dtype).save_pretrained(folder)
    return folder


def open_bench(folder: Path) -> Workbench:
    return Workbench(Checkpoint(folder, CPU))


def load(folder: Path) -> Any:
    """The whole model, as transformers loads it."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.eval().requires_grad_(False)


def draw_tokens(sequences: int = 8, length: int = 16, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCABULARY, (sequences, length), generator=torch_rng(seed, "tokens", sequences, length))


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return find_blocks(model)[1]


def consumer(model: Any, layer: int, unit: Unit) -> nn.Linear:
    """The map that heads or channels flow into, by its name."""
    names = ("self_attn.out_proj", "fc2") if model.config.model_type == "opt" else ("self_attn.o_proj", "mlp.down_proj")
    found = blocks_of(model)[layer].get_submodule(names[UNITS.index(unit)])
    assert isinstance(found, nn.Linear)
    return found


def skip_block(block: nn.Module) -> None:
    """What comes into a block goes on unchanged, for good."""
    block.register_forward_hook(lambda _module, inputs, _output: inputs[0])


@dataclass
class Passed:
    """What went into a module and came out of it."""

    before: Tensor
    after: Tensor


@contextmanager
def passing(modules: Mapping[Any, nn.Module]) -> Iterator[dict[Any, Passed]]:
    """Keep what passes through modules while this lasts."""
    found: dict[Any, Passed] = {}

    def keep(key: Any) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            leaving = output if isinstance(output, Tensor) else output[0]
            found[key] = Passed(inputs[0].clone(), leaving.clone())

        return hook

    handles = [module.register_forward_hook(keep(key)) for key, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def pass_through(model: Any, tokens: Tensor) -> dict[Any, Passed]:
    """What passes through a model's blocks (by number) and consumers (by number and unit), all (s, n, features)."""
    numbers = range(len(blocks_of(model)))
    watched: dict[Any, nn.Module] = {layer: blocks_of(model)[layer] for layer in numbers}
    watched |= {(layer, unit): consumer(model, layer, unit) for layer in numbers for unit in UNITS}
    with passing(watched) as found:
        model(tokens, use_cache=False)
    for each in found.values():  # OPT flattens what goes into its feed-forward maps
        each.before, each.after = (part.view(*tokens.shape, -1) for part in (each.before, each.after))
    return found


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(tokens, use_cache=False).logits
    return found.double()


# whole runs


class Recorded(TextSource):
    """A text's source that remembers what was decided."""

    def __init__(self, bench: Workbench, tokens: Tensor, target: str) -> None:
        super().__init__(bench, tokens, target)
        self.decisions: dict[tuple[int, Unit], Decision] = {}

    def decided(self, layer: int, unit: Unit, decision: Decision) -> None:
        self.decisions[layer, unit] = decision
        super().decided(layer, unit, decision)


@dataclass
class Run:
    """What came out of a course."""

    outline: Outline
    progress: Progress
    tensors: dict[int, dict[str, Tensor]]
    plan: PruningPlan


def run_course(config: CompConfig, bench: Workbench, source: Source) -> Run:
    sizes = Sizes(bench)
    outline = draw_outline(config, sizes, bench, source)
    source.begin()
    progress = Progress()
    tensors = dict(prune_layers(config, outline, sizes, bench, source, progress))
    return Run(outline, progress, tensors, dataclasses.replace(bench.full, layers=tuple(progress.layers)))


def folded_model(folder: Path, run: Run) -> Any:
    """The pruned model: sliced, its layers' weights those of a run."""
    model = load(folder)
    prune(model, run.plan)
    for block, layer in zip(blocks_of(model), run.plan.layers_kept, strict=True):
        for name, tensor in run.tensors[layer].items():
            owner, _, kind = name.rpartition(".")
            setattr(block.get_submodule(owner), kind, nn.Parameter(tensor, requires_grad=False))
    return model


def masked_model(folder: Path, run: Run, decisions: Mapping[tuple[int, Unit], Decision]) -> Any:
    """The unpruned model with masks hooked in before the consumers, removed layers stepped over, and what later layers
    add divided by the growth of removed ones."""
    model = load(folder)
    scale = 1.0
    for layer, block in enumerate(blocks_of(model)):
        if layer in run.outline.removed:
            skip_block(block)
            scale *= run.outline.growth[layer]
            continue
        for unit in UNITS:
            linear, decision = consumer(model, layer, unit), decisions[layer, unit]
            width = linear.in_features // bench_units(model, unit)
            mask = torch.zeros(linear.in_features, dtype=torch.float64)
            assert decision.mask is not None
            mask[columns(decision.kept, width)] = decision.mask
            _hook_mask(linear, mask, scale)
    return model


def _hook_mask(linear: nn.Linear, mask: Tensor, scale: float) -> None:
    linear.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * mask.to(inputs[0]),))
    linear.register_forward_hook(lambda _module, _inputs, output: output / scale)


def bench_units(model: Any, unit: Unit) -> int:
    config = model.config
    if unit == "heads":
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return int(config.ffn_dim if config.model_type == "opt" else config.intermediate_size)


def columns(units: Sequence[int], width: int) -> Tensor:
    return (torch.tensor(units, dtype=torch.int64)[:, None] * width + torch.arange(width)).flatten()


# dense layers


@dataclass
class Layer:
    """A drawn dense layer Y = X W^T and an output that is wanted."""

    inputs: Tensor
    weight: Tensor
    targets: Tensor

    @property
    def output(self) -> Tensor:
        return self.inputs @ self.weight.T

    @property
    def statistics(self) -> Statistics:
        return Statistics.of(self.inputs, self.targets)


def draw_layer(
    seed: int, tokens: int = 60, neurons: int = 12, outputs: int = 5, noise: float = 0.0, mean: float = 0.0
) -> Layer:
    """Correlated inputs with a mean; wanted is the layer's own output, plus noise."""
    rng = torch_rng(seed, "layer", tokens, neurons, outputs)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    inputs = draw(tokens, neurons) + 0.7 * draw(tokens, 2) @ draw(2, neurons) + mean * draw(neurons)
    weight = draw(outputs, neurons) * (0.3 + draw(neurons).abs())
    return Layer(inputs, weight, inputs @ weight.T + noise * draw(tokens, outputs))


def duplicate(layer: Layer, of: int, at: int) -> Layer:
    """Make neuron ``at`` equal to another, what enters it and what leaves it."""
    inputs, weight = layer.inputs.clone(), layer.weight.clone()
    inputs[:, at], weight[:, at] = inputs[:, of], weight[:, of]
    return Layer(inputs, weight, inputs @ weight.T)


def mask_system(statistics: Statistics, weight: Tensor, damping: float, block: Tensor, current: Tensor) -> System:
    """The system of a layer's mask (n, 1)."""
    return weight_system(mask_statistics(statistics, weight), torch.ones_like(weight[:1]), damping, block, current)


def masked_error(layer: Layer, mask: Tensor) -> float:
    """||Y* - X diag(m) W^T||^2, from the data."""
    return float((layer.targets - (layer.inputs * mask) @ layer.weight.T).square().sum())


def solve_mask(layer: Layer, kept: Sequence[int], damping: float) -> Tensor:
    """The mask on kept neurons by least squares over every token and output; ``damping`` is lambda itself."""
    parts = layer.inputs[:, kept, None] * layer.weight.T[kept]  # (T, s, o)
    rows = parts.permute(0, 2, 1).reshape(-1, len(kept))
    root = damping**0.5 * torch.eye(len(kept), dtype=torch.float64)
    wanted = torch.cat([layer.targets.reshape(-1), damping**0.5 * torch.ones(len(kept), dtype=torch.float64)])
    found: Tensor = torch.linalg.lstsq(torch.cat([rows, root]), wanted[:, None]).solution[:, 0]
    return found


def solve_weight(layer: Layer, kept: Sequence[int], damping: float) -> Tensor:
    """The weight (o, s) on kept neurons, likewise."""
    root = damping**0.5 * torch.eye(len(kept), dtype=torch.float64)
    wanted = torch.cat([layer.targets, damping**0.5 * layer.weight.T[kept]])
    found: Tensor = torch.linalg.lstsq(torch.cat([layer.inputs[:, kept], root]), wanted).solution.T
    return found


def mask_damping(layer: Layer, share: float) -> float:
    """Lambda as a part of the mean diagonal of (X^T X) o (W^T W)."""
    return share * float((layer.inputs.square().sum(0) * layer.weight.square().sum(0)).mean())
