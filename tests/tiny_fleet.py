"""A tiny fleet that prunes: a Llama of four layers, three devices with unequal texts, all in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_edge.clients.cache import WeightCache
from fl_edge.clients.comp import CompClient, CompWorkload
from fl_edge.comp.fleet import FleetConfig
from fl_edge.comp.outcome import base_digest
from fl_edge.comp.report import CompReport
from fl_edge.link import LocalGrid
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.strategies.comp import Comp
from tests.tiny_comp_core import PLAIN, draw_tokens, save

SEQUENCES = (2, 5, 9)  # of the devices
LENGTH = 24
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def settings(**changes: Any) -> FleetConfig:
    """Settings that do not move when the defaults do."""
    plain = {**vars(PLAIN), "ratio": 0.3, "allocation": "importance"}
    return FleetConfig(**{**plain, "ratios": "0.2 0.3", "wire": "float64", **changes})


def texts() -> list[Tensor]:
    return [draw_tokens(count, LENGTH, seed) for seed, count in enumerate(SEQUENCES)]


def union() -> Tensor:
    return torch.cat(texts())


class Fleet:
    """A model on disk, and devices that have it."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.base = folder, save(folder / "base", intermediate_size=96, **changes)
        digest = base_digest(self.base)
        self.work = [
            CompWorkload(
                device=f"device-{index}",
                base=self.base,
                base_digest=digest,
                calibration=text,
                test=draw_tokens(3, LENGTH, 99),
                out=folder / "devices",
            )
            for index, text in enumerate(texts())
        ]

    def replaced(self, index: int, **changes: Any) -> None:
        """Change what a device works on."""
        self.work[index] = dataclasses.replace(self.work[index], **changes)

    def app(self, keep_live: int = 16) -> ClientApp:
        app, cache = ClientApp(), WeightCache(self.folder / "cache")
        client = CompClient(
            lambda context: self.work[int(context.node_config["partition-id"])], cache=cache, keep_live=keep_live
        )
        client.register(app)
        return app

    def run(
        self, *, app: Any = None, faults: Any = None, grid: LocalGrid | None = None, name: str = "out", **changes: Any
    ) -> CompReport:
        """Prune on a LocalGrid."""
        grid = grid or LocalGrid(app or self.app(), len(self.work), faults=faults)
        return self.strategy(**changes).start(grid, self.folder / name)

    def strategy(self, **changes: Any) -> Comp:
        return Comp(self.base, settings(**changes), patience_s=1, observers=[lambda row: None])


def tampered(app: Any, change: Change, node: int = 0, action: str = "train.comp_answer", after: int = 0) -> Any:
    """A ClientApp of which one node changes what it answers to one kind of message, from one of them on."""
    seen = 0

    def call(message: Message, context: Context) -> Message:
        nonlocal seen
        reply: Message = app(message, context)
        if message.metadata.message_type != action or int(context.node_config["partition-id"]) != node:
            return reply
        seen += 1
        if seen <= after:
            return reply
        config, tensors = config_of(reply), tensors_of(reply)
        change(config, tensors)
        return Message(make_content(config, tensors), reply_to=message)

    return call
