"""COMP over Flower: devices prune a language model, each for itself or together on the sums of their texts.

Formulas are in `fl_edge.comp`; here stands who is asked, what is sent, and what is done with the answers. The client is
`fl_edge.clients.comp`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.course import LayerReport
from fl_edge.comp.fleet import FleetConfig, check_ratio
from fl_edge.comp.history import History
from fl_edge.comp.messages import config_text, plan_text
from fl_edge.comp.outcome import Outcome, base_digest
from fl_edge.comp.pooled import PooledSource
from fl_edge.comp.pooled_classes import prune_pooled_classes, recording
from fl_edge.comp.report import CompReport, DeviceRow, LayerRow
from fl_edge.comp.run import prune_checkpoint
from fl_edge.comp.state import run_key
from fl_edge.comp.workbench import Workbench
from fl_edge.config import check
from fl_edge.edge.traffic import Traffic
from fl_edge.errors import ReplyError
from fl_edge.link.content import config_of
from fl_edge.pruning import PruningPlan
from fl_edge.strategies.crowd import Crowd, Member, Orders
from fl_edge.strategies.exchange import wait_for_nodes
from fl_edge.strategies.roster import Roster

Observer = Callable[[LayerRow | DeviceRow], None]

log = logging.getLogger("flwr.fl_edge")

_MIB = 2**20


class Comp:
    """Structured pruning of a causal language model on many devices, none of whose text is ever sent.

    Parameters
    ----------
    base
        Folder of the unpruned model. Devices have one with the same weights.
    config
        Settings of the method, and who decides.
    min_devices
        It begins when so many are connected.
    patience_s
        Seconds to wait for them.
    accelerator
        Where the server computes.
    threads
        Threads of torch in the server.
    observers
        Called with every layer that is decided on and every device that is done. Without any, a line is logged.

    Examples
    --------
    In a Flower project of one's own::

        report = Comp(Path("my-llama"), FleetConfig(mode="federated", ratio=0.3)).start(grid, Path("run"))
    """

    def __init__(
        self,
        base: Path,
        config: FleetConfig | None = None,
        *,
        min_devices: int = 1,
        patience_s: float = 60.0,
        accelerator: str = "cpu",
        threads: int = 1,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.config = config or FleetConfig()
        check(self.config)
        self.base, self.out = base, Path()
        self.min_devices, self.patience_s = min_devices, patience_s
        self.accelerator, self.threads = torch.device(accelerator), threads
        self.observers = list(observers)
        self.bench = Workbench(Checkpoint(base, self.accelerator))
        for ratio in self.config.each_ratio:
            check_ratio(self.config.method(ratio), self.bench)
        self.report = CompReport(self.config.mode)
        self._roster = Roster("query.comp_describe")
        self._tokens: dict[str, int] = {}

    def start(self, grid: Grid, out: Path, timeout: float | None = 3600, done: Collection[str] = ()) -> CompReport:
        """Prune, and return what came of it.

        Parameters
        ----------
        out
            Folder of the server's part: decisions below ``checkpoints``, and in the federated mode the pruned model,
            with which an interrupted run goes on. Nothing is written there in the local mode.
        timeout
            Seconds that a device has for an answer; one that takes longer is left out from then on.
        done
            Devices that are not asked again in the local mode.

        Raises
        ------
        TrainingError
            Fewer devices than ``config.fewest`` answer.
        ConfigError, DataError, RunFolderError
            What keeps the server from deciding.
        """
        torch.set_num_threads(self.threads)
        self.out = out
        wait_for_nodes(grid, self.min_devices, self.patience_s)
        digest = base_digest(self.base)

        def accept(device: str, said: Mapping[str, Any]) -> None:
            if said.get("base") != digest:
                raise ReplyError("its base model has other weights than the server's")
            if not isinstance(tokens := said.get("tokens"), int) or tokens < 1:
                raise ReplyError(f"it has {tokens} tokens of text; at least 1 is due")
            self._tokens[device] = tokens

        self._roster.meet(grid, 0, accept, timeout)
        names, nodes = self._roster.names, self._roster.nodes
        # a name of its own: a client that outlives a run that broke off must not take this one for it
        session = f"{self.config.mode}-{grid.run.run_id}-{secrets.token_hex(4)}"
        members = {name: Member(nodes[name], self._tokens[name]) for name in names}
        crowd = Crowd(grid, self.config, self.report, members, session, timeout)
        mode = {"local": self._prune_locally, "federated": self._prune_together, "nested": self._prune_classes}
        mode[self.config.mode](crowd, done)
        return self.report

    # --- the three modes ---

    def _prune_locally(self, crowd: Crowd, done: Collection[str]) -> None:
        ratios = self._dealt()
        asked = [device for device in crowd.members if device not in done]
        orders: Orders = {device: ({"config": config_text(self.config.method(ratios[device]))}, {}) for device in asked}
        for device, reply in crowd.exchange("train.comp_prune", orders):
            with crowd.losing(device):
                self._done(crowd, device, ratios[device], reply)
        crowd.enough(len(self.report.devices))

    def _prune_together(self, crowd: Crowd, _done: Collection[str]) -> None:
        config = self.config.method(self.config.ratio)
        history = History(self.out / "checkpoints")

        def source_of(bench: Workbench) -> PooledSource:
            crowd.measure(config, bench, history)
            return PooledSource(bench, crowd.ask, history, self.config.message_mib * _MIB)

        result = prune_checkpoint(
            self.base,
            self.out / "model",
            config,
            source_of,
            key=run_key(self.base, config, self.config.wire),
            device=self.accelerator,
            on_layer=self._rows(crowd, config.ratio),
        )
        self._finish(crowd, dict.fromkeys(crowd.members, config.ratio), {config.ratio: (history, result.plan)})

    def _prune_classes(self, crowd: Crowd, _done: Collection[str]) -> None:
        ratios = self.config.each_ratio
        bench = recording(self.base, self.accelerator)
        histories = {ratio: History(self.out / "checkpoints" / f"{ratio:g}") for ratio in ratios}
        for history in histories.values():
            history.truncate(0)
        config = self.config.method(max(ratios))
        crowd.measure(config, bench, None)
        most = self.config.message_mib * _MIB
        plans = prune_pooled_classes(bench, config, ratios, crowd.ask, histories, most, self._rows(crowd, max(ratios)))
        self._finish(crowd, self._dealt(), {ratio: (histories[ratio], plans[ratio]) for ratio in ratios})

    def _rows(self, crowd: Crowd, ratio: float) -> Callable[[LayerReport, int], None]:
        """Return what tells of each layer."""
        before, started = Traffic(), time.monotonic()

        def add(report: LayerReport, layers: int) -> None:
            nonlocal before, started
            now, at = Traffic(self.report.up_bytes, self.report.down_bytes), time.monotonic()
            row = LayerRow(
                ratio, report, layers, len(crowd.members), now.up_bytes - before.up_bytes,
                now.down_bytes - before.down_bytes, at - started,
            )  # fmt: skip
            before, started = now, at
            self.report.layers.append(row)
            self._tell(row)

        return add

    def _dealt(self) -> dict[str, float]:
        """Return each device's ratio: they are dealt in turn."""
        ratios = self.config.each_ratio
        return {device: ratios[place % len(ratios)] for place, device in enumerate(self._roster.names)}

    def _finish(
        self, crowd: Crowd, ratios: Mapping[str, float], decided: Mapping[float, tuple[History, PruningPlan]]
    ) -> None:
        """Send every device what it has not followed, and let it make its model of it."""
        waiting = list(crowd.members)
        while waiting:
            orders: dict[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]] = {}
            for device in waiting:
                history, plan = decided[ratios[device]]
                order = crowd.order(device, None, history)
                more = {"plan": plan_text(plan), "end": len(history)}
                orders[device] = ({**order.to_config(), **more}, order.to_tensors())
            waiting = []
            for device, reply in crowd.exchange("train.comp_finish", orders):
                with crowd.losing(device):
                    if "plan" in config_of(reply):
                        self._done(crowd, device, ratios[device], reply)
                    else:
                        crowd.moved(device, reply)
                        waiting.append(device)
        crowd.enough(len(self.report.devices))

    def _done(self, crowd: Crowd, device: str, ratio: float, reply: Message) -> None:
        outcome = Outcome.checked(config_of(reply), self.bench.full)
        row = DeviceRow(device, ratio, crowd.in_all(device, outcome))
        self.report.devices.append(row)
        self._tell(row)

    def _tell(self, row: LayerRow | DeviceRow) -> None:
        for observer in self.observers or [_logged]:
            observer(row)


def _logged(row: LayerRow | DeviceRow) -> None:
    log.info("%s", row.line())
