"""What the user takes home: for each size that came out, a folder with a pruned model that loads with one call."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fl_edge.fedspine.aggregation import truncate
from fl_edge.fedspine.config import FedSpineConfig
from fl_edge.fedspine.deciding import class_plan
from fl_edge.fedspine.factors import Factors, gather
from fl_edge.fedspine.lora import ADAPTER, load_head
from fl_edge.fedspine.messages import kept
from fl_edge.fedspine.model_card import CARD, model_card
from fl_edge.fedspine.replies import named
from fl_edge.fedspine.state import DeviceState, FedSpineState
from fl_edge.files import write_whole
from fl_edge.pruning import PruningPlan, count_costs, members, prune, save_pruned, sparsity
from fl_edge.seeding import torch_rng

if TYPE_CHECKING:
    from peft import PeftModel

Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class SizeClass:
    """Devices that ended at one sparsity, and the one model that stands for them.

    Attributes
    ----------
    sparsity
        Of the devices, to two places; the plan's own may differ by the smallest unit.
    rank
        Of the LoRA adapter.
    """

    sparsity: float
    devices: tuple[str, ...]
    rank: int
    plan: PruningPlan

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"sparsity-{self.sparsity:.2f}"


def assemble(
    base: nn.Module,
    plan: PruningPlan,
    adapter: Mapping[str, Factors],
    head: Mapping[str, Tensor],
    rank: int,
    scale: float,
) -> PeftModel:
    """Return the global model at a size: the base pruned, with the global head and the global adapter.

    Parameters
    ----------
    base
        The unpruned model; it is changed, and wrapped by what is returned.
    plan
        What stays.
    adapter, head
        The global ones. They are copied.
    rank
        Of the adapter that is put on. Where the global one has another (stacking has the sum of the devices' ranks),
        it is the best approximation of what the plan keeps of the products.
    scale
        s = alpha / r.

    Returns
    -------
    PeftModel
        In evaluation mode, on the device of the base; only the adapter is trainable. Head and base are the plain model.

    Raises
    ------
    ConfigError
        A plan of another model.
    ReplyError
        A head of another model.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict  # noqa: PLC0415 - takes seconds to import

    prune(base, plan)
    load_head(base, head, trainable=False)
    maps = members(base)
    generator = torch_rng(0, "assemble")  # fresh directions, which change no product
    held = {}
    for member in maps:
        pair = gather(adapter[member.path], adapter[member.path].rank, *kept(member, plan))
        held[member.path] = pair if pair.rank == rank else truncate(pair, rank, generator)
    device = base.get_parameter(f"{maps[0].path}.weight").device
    tensors = {f"base_model.model.{name}": tensor.to(device, copy=True) for name, tensor in named(held).items()}
    config = LoraConfig(
        r=rank, lora_alpha=scale * rank,  # type: ignore[arg-type] # any number does
        target_modules=[member.path for member in maps],
    )  # fmt: skip
    with warnings.catch_warnings():
        # peft asks transformers by a name that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model: PeftModel = get_peft_model(base, config, ADAPTER, low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, tensors, ADAPTER, low_cpu_mem_usage=True)
    model.peft_config[ADAPTER].base_model_name_or_path = None  # a path of this machine, to a model that is not pruned
    return model.eval()


def size_classes(state: FedSpineState, config: FedSpineConfig, sizes: Sequence[tuple[int, int]]) -> list[SizeClass]:
    """Return the sizes that came out, the largest model first. Ours.

    Devices whose sparsities agree to 0.01 are of one class. Its plan goes as far as the smallest of their models, its
    rank is the median of the ranks that they were given last (the lower one of two). A device that never finished a
    round is in none.

    Parameters
    ----------
    sizes
        Parameters of one head and one channel of the unpruned model, for each layer.
    """
    groups: dict[float, list[str]] = {}
    reached = {name: sparsity(device.plan, sizes) for name, device in state.devices.items() if device.participation}
    for name in sorted(reached):
        groups.setdefault(round(reached[name], 2), []).append(name)
    return [
        SizeClass(
            rounded,
            tuple(names),
            median_low(_last_rank(state.devices[name], config) for name in names),
            class_plan(config, [state.devices[n].plan for n in names], sizes, max(reached[n] for n in names)),
        )
        for rounded, names in sorted(groups.items())
    ]


def _last_rank(device: DeviceState, config: FedSpineConfig) -> int:
    return device.agent.history[-1].arm.rank if device.agent.history else config.fixed_rank


def export(
    folder: Path,
    base_factory: Callable[[], nn.Module],
    state: FedSpineState,
    config: FedSpineConfig,
    sizes: Sequence[tuple[int, int]],
    tokenizer: Any,
    evaluate: Evaluate,
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Write a folder for each size class: pruned base with head, plan, adapter, tokenizer and model card.

    ::

        folder/
            sparsity-0.50/
                README.md            model card
                model.safetensors    pruned base with head; config.json, plan.json
                adapter/             LoRA in peft's format
                tokenizer.json ...

    Parameters
    ----------
    folder
        Classes of an earlier export that are no longer there are removed from it.
    base_factory
        Gives a fresh copy of the unpruned model at every call.
    sizes
        As for :func:`size_classes`.
    tokenizer
        Saved with every model.
    evaluate
        Gives figures of a model by name, as ``accuracy`` and ``loss``; they are those of the model that is saved.
    about
        What else stands in the cards (``base``, ``data``, ``seed``, ``versions``, ...), see
        :func:`~fl_edge.fedspine.model_card.model_card`.

    Returns
    -------
    list
        A row for each class: ``folder``, ``devices`` (number), ``sparsity``, ``rank``, ``parameters``,
        ``parameters_before``, ``adapter_parameters``, ``macs``, ``macs_before`` (multiply-adds a token in the blocks'
        linear maps, without the adapter's), and the figures.

    Raises
    ------
    RunFolderError
        The folder cannot be written.
    """
    classes = size_classes(state, config, sizes)
    _remove_others(folder, {each.folder for each in classes})
    rows = []
    for each in classes:
        base = base_factory()
        before, after = count_costs(base, each.plan.unpruned()), count_costs(base, each.plan)
        model = assemble(base, each.plan, state.adapter, state.head, each.rank, config.scale)
        row = {
            "folder": each.folder,
            "devices": len(each.devices),
            "sparsity": sparsity(each.plan, sizes),
            "rank": each.rank,
            "parameters": after.parameters,
            "parameters_before": before.parameters,
            "adapter_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "macs": after.block_macs,
            "macs_before": before.block_macs,
            **evaluate(model),
        }
        facts = {
            **about,
            "rounds": state.server_round,
            "devices": len(state.devices),
            "aggregation": config.aggregation,
        }
        task = "text-classification" if state.head else "text-generation"
        _write(model, each.plan, folder / each.folder, tokenizer, model_card(row, task, config.aggregation, facts))
        rows.append(row)
    return rows


def _write(model: nn.Module, plan: PruningPlan, folder: Path, tokenizer: Any, card: str) -> None:
    save_pruned(model, plan, folder, tokenizer)
    write_whole(folder / CARD, card)


def _remove_others(folder: Path, names: set[str]) -> None:
    for old in folder.glob("sparsity-*/plan.json"):
        if old.parent.name not in names:
            shutil.rmtree(old.parent, ignore_errors=True)
