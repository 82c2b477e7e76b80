"""FedSpine as a Flower strategy: each device its own pruning ratio and LoRA rank, one exchange a round.

Source: FedSpine (arXiv 2501.02438). Formulas are in `fl_edge.fedspine`; here stands who is asked, what is sent, and
what is done with the answers. The client is `fl_edge.clients.fedspine`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from fl_edge.config import check
from fl_edge.edge.costs import measured_transfer_seconds
from fl_edge.errors import ConfigError, ReplyError, TrainingError
from fl_edge.fedspine.config import FedSpineConfig
from fl_edge.fedspine.costs import round_seconds
from fl_edge.fedspine.deciding import decide, removal_scores
from fl_edge.fedspine.factors import Factors, fresh_rows
from fl_edge.fedspine.lora import head_of, map_shapes
from fl_edge.fedspine.messages import checked_number, checked_reply, device_adapter, make_order, order_tensors
from fl_edge.fedspine.report import Absent, DeviceRound, RoundReport
from fl_edge.fedspine.reward import waiting_time
from fl_edge.fedspine.rounds import Done, Sent, aggregate_round, factors_to_send, learn
from fl_edge.fedspine.state import FedSpineState
from fl_edge.link.content import PACKED, config_of, make_content, tensors_of
from fl_edge.link.packing import pack, tensor_bytes, unpack
from fl_edge.observers import Lines
from fl_edge.pruning import full_plan, members, unit_params
from fl_edge.seeding import numpy_rng, torch_rng
from fl_edge.strategies.exchange import ask, wait_for_nodes
from fl_edge.strategies.roster import Roster

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
Observer = Callable[[RoundReport], None]

log = logging.getLogger("flwr.fl_edge")

_EMPTY_ROUNDS = 3  # so many rounds in a row without a single reply that can be used end the run


class FedSpine(Strategy):
    """Federated LoRA tuning of a transformer that every device prunes at its own pace.

    Parameters
    ----------
    model
        The unpruned model, as every device has it: its shapes count, and the head is where training begins. The base
        may be on the meta device.
    config
        Settings of the algorithm.
    rounds
        T, by which the pruning schedule goes; `start` sets it to its `num_rounds`.
    seed
        Every draw of server and devices comes from (seed, round, device).
    base_digest
        Hash of the base's weights that devices must have; empty: whatever they have.
    virtual
        Devices report times of emulated devices, which a virtual clock adds up; else times are measured.
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

        model = AutoModelForSequenceClassification.from_pretrained("roberta-base", num_labels=2)
        result = FedSpine(model).start(grid, num_rounds=100)
    """

    def __init__(
        self,
        model: nn.Module,
        config: FedSpineConfig | None = None,
        *,
        rounds: int = 100,
        seed: int = 0,
        base_digest: str = "",
        virtual: bool = False,
        min_devices: int = 1,
        patience_s: float = 60.0,
        threads: int = 1,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.config = config or FedSpineConfig()
        check(self.config)
        self.rounds = rounds
        self.seed = seed
        self.base_digest = base_digest
        self.virtual = virtual
        self.min_devices = min_devices
        self.patience_s = patience_s
        self.threads = threads
        self.observers = list(observers)
        self.plan = full_plan(model)
        self.members = members(model)
        self.sizes = unit_params(model)
        self.shapes = map_shapes(model, self.members)
        widest = min(min(shape) for shape in self.shapes.values())
        if self.config.max_rank > widest:
            raise ConfigError(f"ranks={self.config.ranks} are not allowed; the narrowest layer has a width of {widest}")
        self.state = FedSpineState(self._first_adapter(), head_of(model))
        self._roster = Roster("query.fedspine_describe")
        self._timeout: float | None = None
        self._turnaround_s: Callable[[Message], float] | None = None
        self._start: dict[str, Factors] = {}  # what the devices of this round start from
        self._sent: dict[int, Sent] = {}  # by node
        self._done: list[Done] = []
        self._rows: list[DeviceRound] = []
        self._absent: list[Absent] = []

    def _first_adapter(self) -> dict[str, Factors]:
        """Return LoRA's start: A as peft draws it, B zero."""
        generator, rank = torch_rng(self.seed, "adapter"), self.config.max_rank
        return {
            path: Factors(fresh_rows(rank, d_in, generator), torch.zeros(d_out, rank))
            for path, (d_out, d_in) in self.shapes.items()
        }

    # --- what must survive a crash ---

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, plain record): all that the next round depends on."""
        return self.state.tensors(), self.state.to_record()

    def restore(self, weights: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Go back to a snapshot; `start` then takes up with the round after it."""
        self.state = FedSpineState.from_record(weights, record, self.config)

    def factors_to_send(self) -> dict[str, Factors]:
        """Return the global factors, of rank r_max; their first r directions are what a device of rank r receives."""
        return factors_to_send(self.state, self.config, self.seed)

    def arrays(self) -> ArrayRecord:
        """Return global factors and head as one packed array; `fl_edge.link.packing.unpack` gives them by name."""
        return ArrayRecord({PACKED: pack(order_tensors(self.state.adapter, self.state.head))})

    # --- Flower's Strategy ---

    def summary(self) -> None:
        """Log one line about the strategy."""
        config = self.config
        log.info(
            "FedSpine: sparsity %g, %s over ranks %s, %s importance, %s, tau %d, seed %d",
            config.schedule.target, config.choice, config.ranks, config.importance, config.aggregation, config.tau,
            self.seed,
        )  # fmt: skip

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
            Factors and head as :meth:`arrays` gives them; nothing for LoRA's start.
        timeout
            Seconds that a device has to answer; one that takes longer misses the round, and no more than that.
        train_config, evaluate_config
            Not used: what a device needs to know is decided for each.
        evaluate_fn
            (round, arrays) -> metrics; `accuracy`, `loss` and `sparsity` enter the report.

        Raises
        ------
        TrainingError
            Too few devices, or three rounds in a row without a reply that can be used.
        ConfigError
            Initial arrays of another model.
        """
        torch.set_num_threads(self.threads)
        self._timeout, self.rounds = timeout, num_rounds
        if initial_arrays and self.state.server_round == 0:
            self._load(initial_arrays)
        self.summary()
        wait_for_nodes(grid, self.min_devices, self.patience_s)
        result, empty = Result(), 0
        observers = self.observers or [Lines(num_rounds, log.info)]
        for server_round in range(self.state.server_round + 1, num_rounds + 1):
            started = time.perf_counter()
            messages = self.configure_train(server_round, ArrayRecord(), train_config or ConfigRecord(), grid)
            answers = ask(grid, messages, timeout)
            self._note_refusals(answers.refusals)
            arrays, metrics = self.aggregate_train(server_round, answers.replies.values())
            empty = 0 if self._done else empty + 1
            if empty == _EMPTY_ROUNDS:
                raise TrainingError(
                    f"no device finished any of rounds {server_round - empty + 1} to {server_round}; the last was "
                    f"{self._absent[-1].device}: {self._absent[-1].why}"
                )
            result.arrays = arrays or self.arrays()
            tested = evaluate_fn(server_round, result.arrays) if evaluate_fn else None
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            if tested is not None:
                result.evaluate_metrics_serverapp[server_round] = tested
            report = self._report(server_round, tested, time.perf_counter() - started)
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
        """Decide ratio and rank of every device, and return one message to each."""
        self._turnaround_s = getattr(grid, "turnaround_s", None)
        self._roster.meet(grid, server_round, self._accept, self._timeout)
        self._sent, self._absent, messages = {}, [], []
        self._start = self.factors_to_send()
        head, scores = self.state.head, None
        for device in self._roster.names:
            known = self.state.devices[device]
            rng = numpy_rng(self.seed, "decide", server_round, device)
            if scores is None or self.config.importance == "own":  # a consensus is the same for all
                scores = removal_scores(self.config, self.state.devices, device)
            decision = decide(self.config, known, scores, self.sizes, server_round, self.rounds, rng)
            order = make_order(self.config, self.seed, server_round, decision.plan, decision.arm.rank)
            adapter = device_adapter(self._start, self.members, decision.plan, decision.arm.rank)
            tensors = order_tensors(adapter, head)
            node = self._roster.nodes[device]
            content = make_content(order.to_config(), tensors)
            messages.append(Message(content, node, "train.fedspine", group_id=str(server_round)))
            self._sent[node] = Sent(device, decision, order, tensor_bytes(tensors))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate factors and heads of those who answered, and let the bandits learn.

        Returns
        -------
        tuple
            Global factors and head in one packed array, and the devices' mean loss; nothing when no reply can be used.
        """
        self._done, self._rows = self._checked(replies), []
        self.state.server_round = server_round
        down_bytes = sum(sent.down_bytes for sent in self._sent.values())
        self.state.traffic.add(sum(each.up_bytes for each in self._done), down_bytes)
        if not self._done:
            return None, None
        weights = aggregate_round(
            self.state, self.config, self.members, self._start, self._done, self.seed, server_round
        )
        self._rows = learn(self.state, self.config, self._done)
        self.state.clock.advance(max(each.busy_s for each in self._done))
        loss = sum(weight * row.loss_after for weight, row in zip(weights, self._rows, strict=True))
        return self.arrays(), MetricRecord({"loss": loss})

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> list[Message]:
        """Ask nobody: devices measure their loss while they train, and the server tests by itself."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Return nothing: no device evaluates."""

    # --- inside a round ---

    def _load(self, arrays: ArrayRecord) -> None:
        tensors = unpack(arrays[PACKED]) if PACKED in arrays else {}
        mine = order_tensors(self.state.adapter, self.state.head)
        for name, tensor in mine.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise ConfigError(f"initial_arrays do not fit: {name} must be of shape {tuple(tensor.shape)}")
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])

    def _accept(self, device: str, config: Mapping[str, Any]) -> None:
        if self.base_digest and config.get("base") != self.base_digest:
            raise ReplyError("its base model has other weights than the server's")
        self.state.meet(device, int(checked_number(config, "samples")), self.plan, self.config)

    def _note_refusals(self, refusals: Mapping[int, str]) -> None:
        for node, why in refusals.items():
            if node in self._sent:
                self._miss(self._sent[node].device, why)

    def _miss(self, device: str, why: str) -> None:
        self._absent.append(Absent(device, why))
        log.warning("round %d: %s does not count: %s", self.state.server_round + 1, device, why)

    def _checked(self, replies: Iterable[Message]) -> list[Done]:
        """Return the replies that can be used, in the order of the devices, whatever the order of arrival."""
        by_node = {reply.metadata.src_node_id: reply for reply in replies}
        missed, done = {absent.device for absent in self._absent}, []
        for node, sent in self._sent.items():
            if sent.device in missed:
                continue
            try:
                done.append(self._check(sent, by_node.get(node)))
            except (ReplyError, KeyError, TypeError, ValueError) as error:
                self._miss(sent.device, str(error))
        return done

    def _check(self, sent: Sent, reply: Message | None) -> Done:
        if reply is None:
            raise ReplyError("no answer in time")
        if reply.has_error():
            raise ReplyError(f"Flower's error {reply.error.code}: {reply.error.reason}")
        config, tensors = config_of(reply), tensors_of(reply)
        if "refused" in config:
            raise ReplyError(str(config["refused"]))
        checked = checked_reply(config, tensors, sent.order, self.members, self.state.head, self.shapes)
        up_bytes = tensor_bytes(tensors)
        if self._turnaround_s is not None and not self.virtual:
            transfer_s = measured_transfer_seconds(self._turnaround_s(reply), checked_number(config, "handled_s"))
        else:
            transfer_s = round_seconds(0.0, sent.down_bytes, up_bytes, checked.bandwidth_bps)
        return Done(sent, checked, up_bytes, transfer_s)

    def _report(self, server_round: int, tested: MetricRecord | None, real_s: float) -> RoundReport:
        metrics: dict[str, Any] = dict(tested or {})
        return RoundReport(
            server_round=server_round,
            learning_rate=self.config.learning_rate_at(server_round),
            devices=self._rows,
            absent=self._absent,
            test_accuracy=metrics.get("accuracy"),
            test_loss=metrics.get("loss"),
            test_sparsity=metrics.get("sparsity"),
            waiting_s=float(waiting_time([row.busy_s for row in self._rows])) if self._rows else 0.0,
            virtual_s=self.state.clock.now_s if self.virtual else None,
            real_s=real_s,
            up_bytes=sum(each.up_bytes for each in self._done),
            down_bytes=sum(sent.down_bytes for sent in self._sent.values()),
        )
