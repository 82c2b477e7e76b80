"""HAT's cloud as a Flower server: many devices at once, one batch after another.

Knows messages and nodes; what is done with hidden states is :mod:`fl_edge.hat.cloud`'s.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from fl_edge.config import check
from fl_edge.errors import ReplyError, TrainingError
from fl_edge.hat.account import Account, HatReport
from fl_edge.hat.cloud import Cloud, Refusal
from fl_edge.hat.config import CloudConfig
from fl_edge.hat.messages import Answer
from fl_edge.hat.middle import Middle
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.split import identify, load_middle
from fl_edge.hat.wire import check_model, read_upload, write_answer
from fl_edge.link.content import config_of, tensors_of
from fl_edge.strategies.exchange import wait_for_nodes
from fl_edge.strategies.talk import Talk

Observer = Callable[[str, Account], None]

_PAUSE_S = 0.0005  # when nothing has come and nothing waits
_IDLE_S = 0.002  # and no device is in the middle of a request
_LOOK_S = 0.5  # between two looks for nodes that are new
_NAME = 40  # characters of a device's name, at most
_MOST_REQUESTS = 2**53  # of a device; the number of the next one must fit into a message

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
        self._met: set[int] = set()  # nodes that were asked who they are
        self._strangers: dict[str, int] = {}  # those that have not said it yet
        self._look_at = 0.0
        self._void: dict[str, str] = {}  # why its request cannot go on, for a device that has to be waited for
        self._keeps = True  # a report

    def start(self, grid: Grid, timeout: float | None = 600, *, until: Callable[[], bool] | None = None) -> HatReport:
        """Serve all devices, also those that come while others generate.

        Parameters
        ----------
        grid
            Flower's, or one that behaves like it.
        timeout
            Seconds that a device has for a message; one that takes longer is left out from then on. Nothing for no
            limit: a person may sit at the device.
        until
            Asked again and again whether this is the end; nothing is noted in the report then. Without it, the end is
            there when no device has a prompt any more.

        Raises
        ------
        TrainingError
            No device can take part, and there is no `until` to wait for.
        """
        torch.set_num_threads(self.threads)
        wait_for_nodes(grid, self.min_devices, self.patience_s)
        self._keeps, self.report, self._look_at = until is None, HatReport(), 0.0
        self._met, self._strangers = set(), {}
        talk = Talk(grid, {}, "query.hat_", timeout)
        while True:
            self._meet(grid, talk)
            if not talk.devices if until is None else until():
                break
            arrived = talk.hear()
            for device, reply in arrived:
                self._take(talk, device, reply)
            if not self._keeps:
                talk.lost.clear()
            answers = self.cloud.step(time.monotonic())
            for device, answer in answers:
                self._give(talk, device, answer)
            self.cloud.expire(time.monotonic())
            if not arrived and not answers and not self.cloud.waiting:
                time.sleep(_PAUSE_S if self.cloud.requests else _IDLE_S)
        self.report.lost = talk.lost
        if until is None and not self.report.accounts:
            raise TrainingError(f"no device can take part: {next(iter(talk.lost.values()))}")
        return self.report

    def _meet(self, grid: Grid, talk: Talk) -> None:
        """Ask nodes that are new, now and then, who they are."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK_S
        nodes = set(grid.get_node_ids())
        self._met &= nodes | set(talk.nodes.values())
        for node in sorted(nodes - self._met):
            self._met.add(node)
            self._strangers[talk.meet(f"node {node}", node)] = node
            talk.say(f"node {node}", "describe", {"model": json.dumps(self.identity)})

    def _enter(self, talk: Talk, stranger: str, node: int, reply: Message) -> None:
        """Let a device begin that has said who it is, under a name that no other has."""
        said = config_of(reply)
        try:
            check_model(said.get("model"), self.identity)
        except ReplyError as error:
            talk.lose(stranger, str(error))
            return
        talk.end(stranger)
        name = "".join(each for each in str(said.get("device")) if each.isprintable())[:_NAME] or "nameless"
        taken = talk.devices | self.report.accounts.keys()
        free = (each for each in chain([name], (f"{name}#{number}" for number in count(2))) if each not in taken)
        device = talk.meet(next(free), node)
        if self._keeps:
            self.report.accounts[device] = []
        else:
            log.info("%s is here", device)
        self._begin(talk, device, 0)

    def _begin(self, talk: Talk, device: str, request: int) -> None:
        self._at[device] = request
        talk.say(device, "begin", {"request": request, "capacity": self.capacity})

    def _leave(self, device: str) -> None:
        """Forget a device and its request."""
        self.cloud.end(device, self._at.pop(device))
        self._void.pop(device, None)

    def _take(self, talk: Talk, device: str, reply: Message | None) -> None:
        """Hand on what a device sent; a device that is lost loses its request."""
        if (node := self._strangers.pop(device, None)) is not None:
            if reply is not None:
                self._enter(talk, device, node, reply)
            return
        if reply is None:
            self._leave(device)
            return
        said, at = config_of(reply), self._at[device]
        try:
            if "account" in said:
                self._done(device, Account.from_text(said["account"]))
            if said.get("end"):
                talk.end(device)
                self._leave(device)
                if not self._keeps:
                    log.info("%s has left", device)
                return
            if said.get("next"):
                self.cloud.end(device, at)
                self._begin(talk, device, at + 1)
                return
            upload = read_upload(said, tensors_of(reply))
            if not at <= upload.request < _MOST_REQUESTS:
                raise ReplyError(f"request {upload.request} is not allowed; it must be {at} or a later one")
            if upload.request != at:  # prompts between were passed over
                self.cloud.end(device, at)
            self._at[device] = upload.request
            self.cloud.submit(device, upload, time.monotonic())
        except ReplyError as error:
            self._refuse(talk, device, self._at[device], self._void.get(device, str(error)))
            return
        if not upload.last:
            talk.say(device, "go_on", {})

    def _give(self, talk: Talk, device: str, answer: Answer | Refusal) -> None:
        if isinstance(answer, Refusal):
            if talk.owed(device):  # the next chunk of the prompt is on its way, and will not fit any more
                self._void[device] = answer.reason
            else:
                self._refuse(talk, device, answer.request, answer.reason)
        elif len(answer.rows):
            plain, tensors = write_answer(answer)
            talk.say(device, "answer", plain, tensors)

    def _refuse(self, talk: Talk, device: str, request: int, reason: str) -> None:
        self.cloud.end(device, request)
        self._void.pop(device, None)
        if self._keeps:
            self.report.refused.setdefault(device, []).append(reason)
        else:
            log.warning("%s is refused: %s", device, reason)
        talk.say(device, "refused", {"request": request, "reason": reason})

    def _done(self, device: str, account: Account) -> None:
        if self._keeps:
            self.report.accounts[device].append(account)
        for observer in self.observers or [_logged]:
            observer(device, account)


def _logged(device: str, account: Account) -> None:
    log.info("%s", account.line(device))
