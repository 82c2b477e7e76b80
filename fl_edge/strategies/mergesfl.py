"""MergeSFL as a Flower strategy: plan a round, exchange features and gradients, average the bottoms.

Source: MergeSFL (ICDE 2024, arXiv 2311.13348). Formulas are in `fl_edge.mergesfl`; here stands who is asked, what is
sent, and what is done with the answers. The client is `fl_edge.clients.mergesfl`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from threadpoolctl import threadpool_limits
from torch import Tensor

from fl_edge.config import check
from fl_edge.edge.config import EdgeConfig
from fl_edge.edge.costs import bandwidth_bps, bottom_transfer_seconds
from fl_edge.errors import ConfigError, ReplyError, TrainingError
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.packing import pack, tensor_bytes
from fl_edge.mergesfl.batching import average_waiting, bottom_learning_rates
from fl_edge.mergesfl.bottoms import aggregate
from fl_edge.mergesfl.config import MergeSFLConfig
from fl_edge.mergesfl.planning import Plan, make_plan
from fl_edge.mergesfl.replies import checked_weights
from fl_edge.mergesfl.report import RoundReport
from fl_edge.mergesfl.state import ControlState
from fl_edge.models.split import SplitModel
from fl_edge.observers import Lines
from fl_edge.seeding import numpy_rng
from fl_edge.strategies.exchange import wait_for_nodes
from fl_edge.strategies.roster import Roster
from fl_edge.strategies.split_round import Member, SplitRound

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
Observer = Callable[[RoundReport], None]

log = logging.getLogger("flwr.fl_edge")

_EMPTY_ROUNDS = 3  # so many rounds in a row without a single bottom coming back end the run
_FLOAT_BYTES = 4


class MergeSFL(Strategy):
    """Split federated learning with feature merging and batch size regulation.

    Parameters
    ----------
    model
        Bottom and top; its weights are where training begins, unless `start` is given others.
    feature_shape
        Shape of one sample's features, without the batch.
    config
        Settings of the algorithm; `fl_edge.mergesfl.config.released` turns them into the authors' released variant.
    seed
        Every draw of server and devices comes from (seed, round, device).
    edge
        What the server's part costs in virtual time; nothing when the devices measure their time.
    min_devices
        Training begins when so many are connected.
    patience_s
        Seconds to wait for them.
    threads
        Threads of torch in the server; equal bits need equal threads.
    observers
        Called with the report of every round, in order, when the round is complete. Without any, a line is logged.

    Examples
    --------
    In a Flower project of one's own::

        strategy = MergeSFL(SplitModel(bottom, top), feature_shape=(64, 4, 4))
        result = strategy.start(grid, num_rounds=100)
    """

    def __init__(
        self,
        model: SplitModel,
        feature_shape: Sequence[int],
        config: MergeSFLConfig | None = None,
        *,
        seed: int = 0,
        edge: EdgeConfig | None = None,
        min_devices: int = 1,
        patience_s: float = 60.0,
        threads: int = 1,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.model = model
        self.feature_shape = tuple(feature_shape)
        self.config = config or MergeSFLConfig()
        check(self.config)
        self.seed = seed
        # without profiles the devices measure themselves, and the server's own part is in the wall-clock time
        self.edge = edge or EdgeConfig(clock="real", top_s_per_sample=0.0, count_bottom_transfer=False)
        self.min_devices = min_devices
        self.patience_s = patience_s
        self.threads = threads
        self.observers = list(observers)
        self.state = ControlState()
        self._timeout: float | None = None
        self._roster = Roster("query.mergesfl_describe")
        self._plan: Plan
        self._members: list[Member] = []

    # --- what must survive a crash ---

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (weights, plain record): all that the next round depends on."""
        return dict(self.model.state_dict()), self.state.to_record()

    def restore(self, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Go back to a snapshot; `start` then takes up with the round after it."""
        self.model.load_state_dict(weights)
        self.state = ControlState.from_record(record)

    # --- Flower's Strategy ---

    def summary(self) -> None:
        """Log one line about the strategy."""
        log.info(
            "MergeSFL: %s selection, %s batches up to %d, tau %d, budget %d samples an iteration, seed %d",
            self.config.selection,
            self.config.batches,
            self.config.batch_size,
            self.config.tau,
            self.config.ingress_samples,
            self.seed,
        )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float | None = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Train until `num_rounds` rounds are complete, those before a `restore` included.

        Parameters
        ----------
        initial_arrays
            Weights of the whole model, keys as in its state_dict; nothing keeps those it has.
        timeout
            Seconds that one exchange of messages may take; a device that takes longer leaves the round.
        train_config, evaluate_config
            Not used: what a device needs to know is planned for each.
        evaluate_fn
            (round, arrays of the whole model) -> metrics; `accuracy` and `loss` enter the report.

        Raises
        ------
        TrainingError
            Too few devices, no device finishing any of three rounds, or a loss that is not finite.
        ConfigError
            Initial arrays of another model, or a cohort that cannot be formed.
        """
        torch.set_num_threads(self.threads)
        self._timeout = timeout
        if initial_arrays and self.state.server_round == 0:
            self._load(initial_arrays)
        self.summary()
        wait_for_nodes(grid, self.min_devices, self.patience_s)
        result, empty = Result(), 0
        observers = self.observers or [Lines(num_rounds, log.info)]
        for server_round in range(self.state.server_round + 1, num_rounds + 1):
            started = time.perf_counter()
            begin = self.configure_train(server_round, ArrayRecord(), train_config or ConfigRecord(), grid)
            split = self._split_round(grid, server_round)
            replies = split.run(begin)
            arrays, _ = self.aggregate_train(server_round, replies.values())
            empty = 0 if arrays else empty + 1
            if empty == _EMPTY_ROUNDS:
                raise TrainingError(
                    f"no device finished any of rounds {server_round - empty + 1} to {server_round}; the last to leave "
                    f"was {split.lost[-1].device}: {split.lost[-1].why}"
                )
            self._close_round(server_round, split)
            result.arrays = ArrayRecord(self.model.state_dict())
            tested = evaluate_fn(server_round, result.arrays) if evaluate_fn else None
            report = self._report(split, tested, time.perf_counter() - started)
            result.train_metrics_clientapp[server_round] = MetricRecord(
                {"loss": report.train_loss, "accuracy": report.train_accuracy}
            )
            if tested is not None:
                result.evaluate_metrics_serverapp[server_round] = tested
            for observer in observers:
                observer(report)
        return result

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> list[Message]:
        """Plan the round and return the messages that begin it, one to each device of the cohort."""
        probe = self.config.unselected == "probe"
        self._roster.meet(grid, server_round, self._meet, self._timeout, everyone=probe)
        names = self._roster.names
        with threadpool_limits(self.threads):  # more threads add up in another order, and may choose other devices
            self._plan = make_plan(self.state.workers(names), self.config, numpy_rng(self.seed, "plan", server_round))
        sizes = self._plan.batch_sizes
        rates = bottom_learning_rates(
            self.config.learning_rate_at(server_round), sizes, self.config.batch_size, self.config.scale
        )
        self._members, messages = [], []
        bottom = pack(self.model.bottom.state_dict())  # once: all messages share its bytes
        for index, size, rate in zip(self._plan.workers, sizes, rates, strict=True):
            device = names[index]
            known = self.state.devices[device]
            member = Member(device, self._roster.nodes[device], int(size), known.compute_s, known.transfer_s)
            order = {"round": server_round, "seed": self.seed, "batch_size": int(size), "learning_rate": float(rate)}
            content = make_content(order, bottom)
            messages.append(Message(content, member.node, "train.mergesfl_begin", group_id=str(server_round)))
            self._members.append(member)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the bottoms of the devices that finished the round, and count their participation.

        Returns
        -------
        tuple
            Arrays of the whole model, or None when no bottom came back; no metrics.
        """
        by_node = {reply.metadata.src_node_id: reply for reply in replies}
        states, weights = [], []
        for member in self._members:  # in the plan's order, whatever the order of arrival
            if member.node not in by_node:
                continue
            reply = by_node[member.node]
            try:
                state, config = checked_weights(tensors_of(reply), self.model.bottom.state_dict()), config_of(reply)
                transfer_s = float(config["transfer_s"]) if self.edge.clock == "virtual" else member.transfer_s
                self.state.observe(member.device, float(config["compute_s"]), transfer_s, self.config.smoothing)
            except (ReplyError, KeyError, TypeError, ValueError) as error:
                log.warning("round %d: the bottom of %s is not used: %s", server_round, member.device, error)
                continue
            states.append(state)
            weights.append(float(member.batch_size) if self.config.aggregation == "batch" else 1.0)
            self.state.devices[member.device].participation += 1
        if not states:
            return None, None
        self.model.bottom.load_state_dict(aggregate(states, weights))
        return ArrayRecord(self.model.state_dict()), None

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> list[Message]:
        """Ask nobody: the server holds the top model and evaluates by itself."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Return nothing: no device evaluates."""

    # --- inside a round ---

    def _load(self, arrays: ArrayRecord) -> None:
        try:
            self.model.load_state_dict(arrays.to_torch_state_dict())
        except RuntimeError:
            raise ConfigError(
                f"initial_arrays do not fit the model; their keys are {', '.join(list(arrays)[:3])}, ..., those of the "
                f"model are {', '.join(list(self.model.state_dict())[:3])}, ..."
            ) from None

    def _meet(self, device: str, config: dict[str, Any]) -> None:
        costs = float(config["compute_s"]), float(config["transfer_s"])
        new = self.state.meet(device, [int(count) for count in config["labels"]], *costs)
        if not new and self.config.unselected == "probe":
            self.state.observe(device, *costs, self.config.smoothing)

    def _split_round(self, grid: Grid, server_round: int) -> SplitRound:
        return SplitRound(
            grid=grid,
            server_round=server_round,
            members=list(self._members),
            top=self.model.top,
            learning_rate=self.config.learning_rate_at(server_round),
            feature_shape=self.feature_shape,
            num_classes=self.state.num_classes,
            config=self.config,
            edge=self.edge,
            timeout=self._timeout,
        )

    def _close_round(self, server_round: int, split: SplitRound) -> None:
        """Let the clock and the traffic counter take in the round."""
        bottom_bytes = tensor_bytes(self.model.bottom.state_dict())
        split.traffic.add(bottom_bytes * len(split.members), bottom_bytes * len(self._members))
        self.state.server_round = server_round
        self.state.traffic.add(split.traffic.up_bytes, split.traffic.down_bytes)
        self.state.clock.advance(split.elapsed_s + self._bottom_transfer_s(bottom_bytes))

    def _bottom_transfer_s(self, bottom_bytes: int) -> float:
        """Return the seconds that the slowest link needs for the bottom, down and up, once a round."""
        slowest_s = max(member.transfer_s for member in self._members)
        if not self.edge.count_bottom_transfer or slowest_s == 0:
            return 0.0
        feature_bytes = _FLOAT_BYTES * torch.Size(self.feature_shape).numel()
        return bottom_transfer_seconds(bottom_bytes, bandwidth_bps(slowest_s, feature_bytes))

    def _report(self, split: SplitRound, tested: MetricRecord | None, real_s: float) -> RoundReport:
        metrics = dict(tested or {})
        busy_s = np.array([member.busy_s for member in split.members])
        return RoundReport(
            server_round=split.server_round,
            learning_rate=split.learning_rate,
            train_loss=sum(split.losses) / max(len(split.losses), 1),
            train_accuracy=split.correct / max(split.seen, 1),
            test_accuracy=float(metrics["accuracy"]) if "accuracy" in metrics else None,  # type: ignore[arg-type]
            test_loss=float(metrics["loss"]) if "loss" in metrics else None,  # type: ignore[arg-type]
            kl=self._plan.kl,
            kl_reached=self._plan.kl_reached,
            label_mix=self._plan.label_mix.tolist(),
            reference=self._plan.reference.tolist(),
            devices=[member.device for member in self._members],
            batch_sizes=[member.batch_size for member in self._members],
            iteration_s=[m.batch_size * (m.compute_s + m.transfer_s) for m in self._members],
            waiting_s=average_waiting(busy_s) if len(busy_s) else 0.0,
            virtual_s=self.state.clock.now_s if self.edge.clock == "virtual" else None,
            real_s=real_s,
            up_bytes=split.traffic.up_bytes,
            down_bytes=split.traffic.down_bytes,
            lost=split.lost,
            aborted=split.aborted,
        )
