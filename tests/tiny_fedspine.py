"""A tiny federated tuning job: a BERT of two blocks, three classes that differ by their tokens, few samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from fl_edge.clients.fedspine import FedSpineClient, FedSpineWorkload
from fl_edge.fedspine.config import FedSpineConfig
from fl_edge.fedspine.factors import Factors
from fl_edge.fedspine.messages import make_order
from fl_edge.fedspine.report import RoundReport
from fl_edge.fedspine.schedule import ScheduleConfig
from fl_edge.fedspine.training import TrainingSettings
from fl_edge.link import LocalGrid
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.pruning import LayerPlan, Member, PruningPlan
from fl_edge.pruning.plan import UNITS
from fl_edge.seeding import torch_rng
from fl_edge.strategies.fedspine import FedSpine
from tests.tiny_transformers import PAD, VOCABULARY, make_config

CLASSES, DEVICES, LENGTH = 3, 3, 8
Handler = Callable[[Message, Context], Message]
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]
SETTINGS = TrainingSettings(
    learning_rate=1e-2, scale=2.0, dropout=0.0, weight_decay=0.01, clip_norm=1.0, smoothing=0.9, normalise=True
)


def make_plan(heads: tuple[int, ...], channels: tuple[int, ...]) -> PruningPlan:
    """A plan that keeps everything, of any sizes."""
    layers = [LayerPlan(tuple(range(h)), tuple(range(c))) for h, c in zip(heads, channels, strict=True)]
    return PruningPlan("bert", heads, channels, tuple(layers))


def draw_scores(plan: PruningPlan, rng: np.random.Generator, ties: bool = False) -> Any:
    """One score for each unit of the unpruned model."""

    def some(count: int) -> Any:
        return rng.integers(0, 3, count).astype(float) if ties else rng.random(count)

    return [{unit: some(plan.total(layer, unit)) for unit in UNITS} for layer in range(len(plan.layers))]


def draw_factors(members: list[Member], model: nn.Module, rank: int, seed: int = 0) -> dict[str, Factors]:
    """Factors of which neither is zero, in the shapes of the model as it is."""
    generator = torch_rng(seed, "factors")
    shapes = {member.path: model.get_parameter(f"{member.path}.weight").shape for member in members}
    return {
        path: Factors(
            0.3 * torch.randn(rank, d_in, generator=generator), 0.3 * torch.randn(d_out, rank, generator=generator)
        )
        for path, (d_out, d_in) in shapes.items()
    }


def make_fedspine(**settings: Any) -> FedSpineConfig:
    """Short rounds; what belongs to the schedule goes there."""
    names = ScheduleConfig.__dataclass_fields__
    schedule = ScheduleConfig(**{"largest": 0.25, **{n: settings.pop(n) for n in list(settings) if n in names}})
    return FedSpineConfig(
        **{"ranks": "2 4 8", "fixed_rank": 4, "tau": 2, "batch_size": 8, "probe_batches": 1, "learning_rate": 1e-2,
           "dropout": 0.1, "schedule": schedule, **settings}
    )  # fmt: skip


def base_model() -> Any:
    """A classifier as transformers draws it, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return BertForSequenceClassification(make_config("bert", intermediate_size=40))


BASE = base_model()


def make_dataset(device: int, samples: int = 20) -> datasets.Dataset:
    """Rows whose tokens tell the class; device k holds mostly class k mod 3."""
    generator = torch_rng(7, "tiny", device)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    labels[: samples // 2] = device % CLASSES
    ids = 2 + torch.randint(0, 20, (samples, LENGTH), generator=generator) + 20 * labels[:, None]
    assert samples == 0 or int(ids.max()) < VOCABULARY
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels.tolist()}
    return datasets.Dataset.from_dict(rows)


def workload(device: int, samples: int | None = None, **changes: Any) -> FedSpineWorkload:
    given: dict[str, Any] = {
        "device": f"device-{device}",
        "base": lambda: copy.deepcopy(BASE),
        "base_digest": "tiny",
        "dataset": make_dataset(device, 20 + 4 * device if samples is None else samples),
        "pad_id": PAD,
        "costs": lambda server_round: (1e8 * (device + 1), 1e7),
    }
    return FedSpineWorkload(**{**given, **changes})


def make_app(workloads: list[FedSpineWorkload] | None = None, keep_live: int = 32) -> ClientApp:
    work = [workload(device) for device in range(DEVICES)] if workloads is None else workloads
    app = ClientApp()
    FedSpineClient(lambda context: work[int(context.node_config["partition-id"])], keep_live=keep_live).register(app)
    return app


def make_strategy(rounds: int = 2, *, virtual: bool = True, base_digest: str = "", **settings: Any) -> FedSpine:
    return FedSpine(
        BASE, make_fedspine(**settings), rounds=rounds, seed=3, virtual=virtual, base_digest=base_digest,
        patience_s=1, observers=[lambda report: None],
    )  # fmt: skip


def train(rounds: int = 2, *, app: Any = None, grid: LocalGrid | None = None, faults: Any = None, **settings: Any
          ) -> tuple[FedSpine, list[RoundReport]]:  # fmt: skip
    """Train on a LocalGrid; return the strategy and the report of every round."""
    strategy, reports = make_strategy(rounds, **settings), list[RoundReport]()
    strategy.observers.append(reports.append)
    strategy.start(grid or LocalGrid(app or make_app(), DEVICES, faults=faults), num_rounds=rounds)
    return strategy, reports


def tampered(app: Any, change: Change, node: int = 0, action: str = "train.fedspine") -> Any:
    """A ClientApp of which one node changes what it answers to one kind of message."""

    def call(message: Message, context: Context) -> Message:
        reply: Message = app(message, context)
        if message.metadata.message_type != action or int(context.node_config["partition-id"]) != node:
            return reply
        config, tensors = config_of(reply), tensors_of(reply)
        change(config, tensors)
        return Message(make_content(config, tensors), reply_to=message)

    return call


def order_of(plan: PruningPlan, rank: int = 2, server_round: int = 4, **settings: Any) -> Any:
    return make_order(make_fedspine(**settings), 3, server_round, plan, rank)
