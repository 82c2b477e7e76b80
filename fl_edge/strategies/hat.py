"""HAT's cloud as a Flower server: many devices at once, one batch after another.

Knows messages and nodes; what is done with hidden states is :mod:`fl_edge.hat.cloud`'s.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from fl_edge.config import check
from fl_edge.errors import ReplyError
from fl_edge.hat.account import Account, HatReport
from fl_edge.hat.cloud import Cloud, Refusal
from fl_edge.hat.config import CloudConfig
from fl_edge.hat.messages import Answer
from fl_edge.hat.middle import Middle
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.split import identify, load_middle
from fl_edge.hat.wire import read_upload, write_answer
from fl_edge.link.content import config_of, tensors_of
from fl_edge.strategies.exchange import wait_for_nodes
from fl_edge.strategies.roster import Roster
from fl_edge.strategies.talk import Talk

Observer = Callable[[str, Account], None]

_PAUSE_S = 0.0005  # when nothing has come and nothing waits

log = logging.getLogger("flwr.fl_edge")


class Hat:
    """Serves a model's middle submodel to all devices until they have no more prompts.

    Parameters
    ----------
    folder
        Of the whole model, whose middle is read.
    shallow
        Decoder layers on the devices; 0 for :func:`~fl_edge.hat.split.default_shallow`.
    config
        What bounds the cloud.
    min_devices
        Devices to wait for.
    patience_s
        Seconds to wait for them.
    accelerator
        Where the middle submodel computes.
    threads
        Threads of torch.
    observers
        Called with every request that is done. Without any, a line is logged.

    Examples
    --------
    In a Flower project of one's own::

        report = Hat(Path("my-llama")).start(grid)
    """

    def __init__(
        self,
        folder: Path,
        shallow: int = 0,
        config: CloudConfig | None = None,
        *,
        min_devices: int = 1,
        patience_s: float = 60.0,
        accelerator: str = "cpu",
        threads: int = 1,
        observers: Sequence[Observer] = (),
    ) -> None:
        own = config or CloudConfig()
        check(own)
        place = torch.device(accelerator)
        middle = Middle(load_middle(folder, shallow, place), own.capacity, own.cache_tokens)
        self.capacity = middle.capacity
        self.cloud = Cloud(middle, Limits(own.batch_tokens, own.prompt_chunk), own.lease_s)
        self.identity = identify(folder, shallow)
        self.min_devices, self.patience_s, self.threads = min_devices, patience_s, threads
        self.observers = list(observers)
        self.report = HatReport()
        self._at: dict[str, int] = {}  # the request that a device is at
        self._roster = Roster("query.hat_describe")

    def start(self, grid: Grid, timeout: float | None = 600) -> HatReport:
        """Serve all devices to the end of their prompts.

        Parameters
        ----------
        grid
            Flower's, or one that behaves like it.
        timeout
            Seconds that a device has for a message; one that takes longer is left out from then on.

        Raises
        ------
        TrainingError
            No device can take part.
        """
        torch.set_num_threads(self.threads)
        wait_for_nodes(grid, self.min_devices, self.patience_s)
        self._roster.meet(grid, 0, self._accept, timeout)
        talk = Talk(grid, self._roster.nodes, "query.hat_", timeout)
        self._at = dict.fromkeys(self._roster.names, 0)
        self.report.accounts = {device: [] for device in self._roster.names}
        for device in self._roster.names:
            talk.say(device, "begin", {"capacity": self.capacity})
        while talk.devices:
            arrived = talk.hear()
            for device, reply in arrived:
                self._take(talk, device, reply)
            answers = self.cloud.step(time.monotonic())
            for device, answer in answers:
                self._give(talk, device, answer)
            self.cloud.expire(time.monotonic())
            if not arrived and not answers and not self.cloud.waiting:
                time.sleep(_PAUSE_S)
        self.report.lost = talk.lost
        return self.report

    def _accept(self, _device: str, said: Mapping[str, Any]) -> None:
        check_model(said, self.identity)

    def _take(self, talk: Talk, device: str, reply: Message | None) -> None:
        """Hand on what a device sent; a device that is lost loses its requests."""
        if reply is None:
            self.cloud.end(device, self._at[device])
            return
        said = config_of(reply)
        try:
            if "account" in said:
                self._done(device, Account.from_text(said["account"]))
                self.cloud.end(device, self._at[device])
            if said.get("end"):
                talk.end(device)
                return
            upload = read_upload(said, tensors_of(reply))
            self._at[device] = upload.request
            self.cloud.submit(device, upload, time.monotonic())
        except ReplyError as error:
            self._refuse(talk, device, self._at[device], str(error))
            return
        if not upload.last:
            talk.say(device, "go_on", {})

    def _give(self, talk: Talk, device: str, answer: Answer | Refusal) -> None:
        if isinstance(answer, Refusal):
            self._refuse(talk, device, answer.request, answer.reason)
        elif len(answer.rows):
            plain, tensors = write_answer(answer)
            talk.say(device, "answer", plain, tensors)

    def _refuse(self, talk: Talk, device: str, request: int, reason: str) -> None:
        self.cloud.end(device, request)
        self.report.refused.setdefault(device, []).append(reason)
        talk.say(device, "refused", {"request": request, "reason": reason})

    def _done(self, device: str, account: Account) -> None:
        self.report.accounts[device].append(account)
        for observer in self.observers or [_logged]:
            observer(device, account)


def check_model(said: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """See that a device's part of the model, as it describes it, is of a model and a cut.

    Raises
    ------
    ReplyError
        It is of another one.
    """
    try:
        model = json.loads(said["model"])
    except (ValueError, TypeError):
        model = None
    if model != identity:
        told = ", ".join(
            key for key, value in identity.items() if not isinstance(model, dict) or model.get(key) != value
        )
        raise ReplyError(f"its part of the model is not of the server's model: {told} differ")


def _logged(device: str, account: Account) -> None:
    log.info("%s", account.line(device))
