"""The devices that take part in a pruning: asking all of them, and losing one without losing the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fl_edge.comp.config import CompConfig
from fl_edge.comp.fleet import FleetConfig
from fl_edge.comp.history import History, Step
from fl_edge.comp.messages import Order, checked_answer
from fl_edge.comp.outcome import Outcome
from fl_edge.comp.pooled import Answer, Measure, Question
from fl_edge.comp.report import CompReport
from fl_edge.comp.sums import Form, form_of
from fl_edge.comp.workbench import Workbench
from fl_edge.errors import ReplyError, TrainingError
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.packing import tensor_bytes
from fl_edge.pruning import Unit
from fl_edge.strategies.arriving import arriving

Orders = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]]

log = logging.getLogger("flwr.fl_edge")

_MIB = 2**20
_FALLS = 3  # back to fewer decisions that a device may have


@dataclass
class Member:
    """One device: its node, its text's tokens, how many decisions it has followed, and what it has spent so far."""

    node: int
    tokens: int
    steps: int = 0
    falls: int = 0  # how often it had followed fewer than before
    seconds: float = 0.0
    bytes_read: float = 0.0


class Crowd:
    """Asks all devices that are left.

    Parameters
    ----------
    grid
        Flower's, or one that behaves like it.
    config
        Says how few devices are enough, and what messages may weigh.
    report
        Is told of lost devices and of traffic.
    members
        By name, in the order in which their sums are added.
    session
        Names the run on the devices.
    timeout
        Seconds to answer; nothing for no limit.
    """

    def __init__(
        self,
        grid: Grid,
        config: FleetConfig,
        report: CompReport,
        members: dict[str, Member],
        session: str,
        timeout: float | None,
    ) -> None:
        self._grid, self._config, self._report, self._timeout = grid, config, report, timeout
        self.members, self._session = members, session
        self._method: CompConfig = config
        self._history: History | None = None
        self._bench: Workbench | None = None

    def measure(self, method: CompConfig, bench: Workbench, history: History | None) -> None:
        """Set what the next questions are about: settings, whose layer is loaded, and the decisions to follow."""
        self._method, self._bench, self._history = method, bench, history

    def ask(self, question: Question) -> list[Answer]:
        """Put a question to every device; return the answers in the order of the devices.

        Raises
        ------
        TrainingError
            Fewer devices than are to.
        """
        answers: dict[str, Answer] = {}
        waiting = list(self.members)
        while waiting:
            orders = {device: self._written(self.order(device, question, self._history)) for device in waiting}
            waiting = []
            for device, reply in self.exchange("train.comp_answer", orders):
                with self.losing(device):
                    if (answer := self._answer(question, device, reply)) is None:
                        waiting.append(device)
                    else:
                        answers[device] = answer
        self.enough(len(answers))
        return [answers[device] for device in self.members if device in answers]

    def order(self, device: str, question: Question | None, history: History | None) -> Order:
        """Return a question with the decisions that a device has not followed, as far as one message holds them."""
        first = self.members[device].steps
        most, steps = self._config.message_mib * _MIB, list[Step]()
        if history is not None and (question is None or isinstance(question, Measure)):
            steps = list(history.since(first, len(history), most))
        measures, form = self._config.mode == "federated", _form(question, self._method)
        return Order(self._session, measures, self._method, question, first, steps, form, self._config.wire)

    def exchange(self, kind: str, orders: Orders) -> Iterator[tuple[str, Message]]:
        """Send an order to each device and yield the replies as they come; who does not answer is lost."""
        names = {self.members[device].node: device for device in orders}
        messages = []
        for device, (config, tensors) in orders.items():
            messages.append(Message(make_content(config, tensors), self.members[device].node, kind))
            self._report.down_bytes += tensor_bytes(tensors)
        for node, reply in arriving(self._grid, messages, self._timeout):
            if isinstance(reply, str):
                self._lose(names[node], reply)
                continue
            member, config = self.members[names[node]], config_of(reply)
            with self.losing(names[node]):
                self._report.up_bytes += tensor_bytes(tensors_of(reply))
            member.seconds += _number(config.get("handled_s"))
            member.bytes_read += _number(config.get("bytes_read"))
            if names[node] in self.members:
                yield names[node], reply

    def moved(self, device: str, reply: Message) -> None:
        """Note how far a device has followed.

        Raises
        ------
        ReplyError
            It has not come further, or went further than there is.
        """
        member, steps = self.members[device], config_of(reply).get("steps")
        if not isinstance(steps, int) or steps < 0 or steps == member.steps:
            raise ReplyError(f"it has followed {steps} decisions, and was sent those from {member.steps} on")
        member.falls += steps < member.steps
        if member.falls > _FALLS:
            raise ReplyError(f"it has lost what it kept {member.falls} times")
        member.steps = steps

    def in_all(self, device: str, outcome: Outcome) -> Outcome:
        """Return an outcome with what a device spent on earlier messages."""
        member = self.members[device]
        return replace(outcome, seconds=member.seconds, bytes_read=member.bytes_read)

    @contextmanager
    def losing(self, device: str) -> Iterator[None]:
        """Lose a device whose reply does not pass what is done inside."""
        try:
            yield
        except (ReplyError, KeyError, TypeError, ValueError) as error:
            self._lose(device, str(error))

    def enough(self, count: int) -> None:
        """Refuse to go on with too few devices.

        Raises
        ------
        TrainingError
            Fewer devices than ``fewest``.
        """
        if count < self._config.fewest:
            last = next(reversed(self._report.lost.items()), ("none", "none was lost"))
            raise TrainingError(
                f"{count} devices answered and fewest={self._config.fewest} must; the last that was lost is {last[0]}: "
                f"{last[1]}"
            )

    def _lose(self, device: str, why: str) -> None:
        del self.members[device]
        self._report.lost[device] = why
        log.warning("%s does not count from here on: %s", device, why)

    @staticmethod
    def _written(order: Order) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        return order.to_config(), order.to_tensors()

    def _answer(self, question: Question, device: str, reply: Message) -> Answer | None:
        config = config_of(reply)
        if "sums" not in config:
            self.moved(device, reply)
            return None
        bench = self._bench
        assert bench is not None

        def shape(layer: int, unit: Unit) -> tuple[int, int]:
            linear = bench.consumer(layer, unit)
            return linear.in_features, linear.out_features

        member, layers = self.members[device], bench.checkpoint.num_layers
        form = _form(question, self._method)
        answer = checked_answer(question, config, tensors_of(reply), form, member.tokens, layers, shape)
        member.steps = int(config["steps"])
        return answer


def _form(question: Question | None, method: CompConfig) -> Form:
    """Return what of the statistics comes back; of the dense model its own output is wanted."""
    return form_of(method) if isinstance(question, Measure) else "own"


def _number(value: Any) -> float:
    """Return what a device says that it spent, 0 where it says nothing that can be."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e15 else 0.0
