"""Training of HAT's adapter as a federation: the cloud answers devices' texts once, then devices train and it averages.

Messages and nodes only; what a device does is :mod:`fl_edge.clients.hat.learning`'s, the mean is
:mod:`fl_edge.hat.federation`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fl_edge.config import check
from fl_edge.errors import ReplyError, TrainingError
from fl_edge.hat.adapter import load_adapter, new_adapter, save_adapter
from fl_edge.hat.cloud import Cloud, Refusal
from fl_edge.hat.config import CloudConfig, TrainingConfig
from fl_edge.hat.federation import AdapterRound, Learned, Weights, course, figures, fitted
from fl_edge.hat.middle import Middle
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.split import load_device, load_middle
from fl_edge.hat.wire import check_model, read_upload, write_answer
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.packing import pack, tensor_bytes
from fl_edge.models.averaging import weighted_mean
from fl_edge.observers import Lines
from fl_edge.seeding import torch_rng
from fl_edge.strategies.exchange import ask, wait_for_nodes
from fl_edge.strategies.roster import Roster
from fl_edge.strategies.talk import Talk

Observer = Callable[[AdapterRound], None]

_EMPTY_ROUNDS = 3  # in a row, after which training ends
_PAUSE_S = 0.0005  # when nothing has come

log = logging.getLogger("flwr.fl_edge")


class HatTraining:
    """Trains the adapter on the texts of devices, which stay there (FedAvg).

    Parameters
    ----------
    folder
        Of the whole model.
    shallow
        Decoder layers on the devices; 0 for :func:`~fl_edge.hat.split.default_shallow`.
    config
        Rounds and how devices train.
    cloud
        What bounds the cloud while it answers texts.
    seed
        Of all draws.
    min_devices, patience_s
        Devices to wait for, and for how many seconds.
    accelerator
        Where the middle submodel computes.
    threads
        Threads of torch.
    observers
        Called after every round. Without any, a line is logged.

    Attributes
    ----------
    weights
        The adapter as it is.
    server_round
        Rounds that are complete.

    Examples
    --------
    In a Flower project of one's own::

        training = HatTraining(Path("my-llama"))
        training.start(grid)
        training.hand_out(grid)
        training.save(Path("adapter.safetensors"))
    """

    def __init__(
        self,
        folder: Path,
        shallow: int = 0,
        config: TrainingConfig | None = None,
        cloud: CloudConfig | None = None,
        *,
        seed: int = 0,
        min_devices: int = 1,
        patience_s: float = 60.0,
        accelerator: str = "cpu",
        threads: int = 1,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.config, self._bounds = config or TrainingConfig(), cloud or CloudConfig()
        check(self.config)
        check(self._bounds)
        self._folder, self._shallow, self._place = folder, shallow, torch.device(accelerator)
        self._model = load_device(folder, shallow, torch.device("cpu"))
        self.seed, self.min_devices, self.patience_s, self.threads = seed, min_devices, patience_s, threads
        self.observers = list(observers)
        adapter = new_adapter(self._model, torch_rng(seed, "hat", "adapter"))
        self.weights: Weights = {name: tensor.detach().clone() for name, tensor in adapter.state_dict().items()}
        self.server_round = 0
        self._roster = Roster("query.hat_describe")

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, plain record): all that the next round depends on."""
        return self.weights, {"round": self.server_round}

    def restore(self, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go back to a snapshot; :meth:`start` then takes up with the round after it."""
        self.weights, self.server_round = dict(weights), int(record["round"])

    def save(self, file: Path) -> None:
        """Write the adapter as it is; see :func:`~fl_edge.hat.adapter.save_adapter`."""
        save_adapter(fitted(self._model, self.weights), self._model, file)

    def load(self, file: Path) -> None:
        """Go on from an adapter that was saved; see :func:`~fl_edge.hat.adapter.load_adapter`."""
        self.weights = {name: tensor.float() for name, tensor in load_adapter(file, self._model).state_dict().items()}

    def start(self, grid: Grid, timeout: float | None = 600) -> Weights:
        """Train until all rounds are complete, those before a :meth:`restore` included; return the adapter.

        Parameters
        ----------
        grid
            Flower's, or one that behaves like it.
        timeout
            Seconds that a device has for a message.

        Raises
        ------
        TrainingError
            Too few devices, or three rounds in a row without a reply that can be used.
        """
        torch.set_num_threads(self.threads)
        if self.server_round >= self.config.rounds:
            return self.weights
        wait_for_nodes(grid, self.min_devices, self.patience_s)
        self._roster.meet(grid, 0, self._accept, timeout)
        taught, absent = self._teach(grid, timeout)
        observers, empty = self.observers or [Lines(self.config.rounds, log.info)], 0
        for server_round in range(self.server_round + 1, self.config.rounds + 1):
            report = self._round(grid, server_round, taught, absent, timeout)
            empty, absent = 0 if report.devices else empty + 1, {}
            if empty == _EMPTY_ROUNDS:
                why = next(iter(report.absent.values()), "no device was taught")
                raise TrainingError(f"no device trained the adapter in {_EMPTY_ROUNDS} rounds; the last: {why}")
            for observer in observers:
                observer(report)
        return self.weights

    def hand_out(self, grid: Grid, timeout: float | None = 600) -> None:
        """Send the adapter to all devices, which draft with it from then on.

        Raises
        ------
        TrainingError
            No device took it.
        """
        self._roster.meet(grid, self.server_round, self._accept, timeout)
        packed = pack(self.weights)
        messages = [Message(make_content({}, packed), node, "query.hat_keep") for node in self._nodes.values()]
        answers = ask(grid, messages, timeout)
        for why in answers.refusals.values():
            log.warning("a device did not take the adapter: %s", why)
        if not answers.replies:
            raise TrainingError(f"no device took the adapter: {next(iter(answers.refusals.values()))}")

    def _accept(self, _device: str, said: Mapping[str, Any]) -> None:
        check_model(said["model"], self._model.identity)

    @property
    def _nodes(self) -> dict[str, int]:
        return {device: self._roster.nodes[device] for device in self._roster.names}

    def _teach(self, grid: Grid, timeout: float | None) -> tuple[dict[str, int], dict[str, str]]:
        """Answer the texts of all devices; return the nodes that were taught, and why others were not."""
        middle = Middle(
            load_middle(self._folder, self._shallow, self._place), self._bounds.capacity, self._bounds.cache_tokens
        )
        cloud = Cloud(middle, Limits(self._bounds.batch_tokens), self._bounds.lease_s)
        talk = Talk(grid, self._nodes, "query.hat_", timeout)
        for device in self._roster.names:
            talk.say(device, "study", {})
        taught: dict[str, int] = {}
        while talk.devices:
            arrived = talk.hear()
            for device, reply in arrived:
                if reply is None:
                    continue
                if config_of(reply).get("end"):
                    taught[device] = self._roster.nodes[device]
                    talk.end(device)
                    continue
                try:
                    cloud.submit(device, read_upload(config_of(reply), tensors_of(reply)), time.monotonic())
                except ReplyError as error:
                    talk.lose(device, str(error))
            answers = cloud.step(time.monotonic())
            for device, answer in answers:
                cloud.end(device, answer.request)
                if isinstance(answer, Refusal):
                    talk.lose(device, answer.reason)
                else:
                    talk.say(device, "lesson", *write_answer(answer))
            if not arrived and not answers:
                time.sleep(_PAUSE_S)
        return {device: taught[device] for device in self._roster.names if device in taught}, talk.lost

    def _round(
        self, grid: Grid, server_round: int, taught: Mapping[str, int], absent: Mapping[str, str], timeout: float | None
    ) -> AdapterRound:
        started, order = time.perf_counter(), course(self.config, server_round)
        said = {**asdict(order), "held_out": self.config.held_out, "seed": self.seed, "round": server_round}
        packed = pack(self.weights)
        messages = [
            Message(make_content(said, packed), node, "train.hat_adapter", group_id=str(server_round))
            for node in taught.values()
        ]
        answers = ask(grid, messages, timeout)
        missed, learned = dict(absent), list[Learned]()
        for device, node in taught.items():
            try:
                if node in answers.refusals:
                    raise ReplyError(answers.refusals[node])
                reply = answers.replies[node]
                learned.append(Learned.checked(config_of(reply), tensors_of(reply), self.weights))
            except ReplyError as error:
                missed[device] = str(error)
                log.warning("round %d: %s does not count: %s", server_round, device, error)
        if learned:
            self.weights = weighted_mean([(each.tokens, each.weights) for each in learned])
        self.server_round = server_round
        return AdapterRound(
            server_round=server_round,
            devices=len(learned),
            **figures(learned),
            absent=missed,
            up_bytes=sum(tensor_bytes(each.weights) for each in learned),
            down_bytes=len(messages) * tensor_bytes(self.weights),
            real_s=time.perf_counter() - started,
        )
