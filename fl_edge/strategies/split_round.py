"""The tau iterations inside one round of MergeSFL: features in, one top step, gradients out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor, nn

from fl_edge.edge.config import EdgeConfig
from fl_edge.edge.costs import iteration_seconds
from fl_edge.edge.traffic import Traffic
from fl_edge.errors import ReplyError, TrainingError
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.packing import tensor_bytes
from fl_edge.mergesfl.config import MergeSFLConfig
from fl_edge.mergesfl.estimation import measured_transfer_s
from fl_edge.mergesfl.merging import top_step
from fl_edge.mergesfl.replies import checked_batch
from fl_edge.mergesfl.report import Lost
from fl_edge.strategies.exchange import Answers, ask

log = logging.getLogger("flwr.fl_edge")


@dataclass
class Member:
    """A worker of the cohort."""

    device: str
    node: int
    batch_size: int
    compute_s: float  # mu_i and beta_i, at first as estimated, then as it reports them
    transfer_s: float
    busy_s: float = 0.0  # t_i of eq. 7, as it came about


@dataclass
class _Batch:
    tag: str
    features: Tensor
    labels: Tensor


@dataclass
class SplitRound:
    """Runs one round and adds up what happened in it.

    Parameters
    ----------
    members
        The cohort, in the fixed order in which features are merged. A worker that is lost leaves it.
    top
        Top model, updated in place.
    learning_rate
        eta of the round, for the top.
    """

    grid: Grid
    server_round: int
    members: list[Member]
    top: nn.Module
    learning_rate: float
    feature_shape: Sequence[int]
    num_classes: int
    config: MergeSFLConfig
    edge: EdgeConfig
    timeout: float | None

    traffic: Traffic = field(default_factory=Traffic)  # features, labels and gradients; not the bottoms
    lost: list[Lost] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    correct: int = 0
    seen: int = 0
    aborted: int = 0
    elapsed_s: float = 0.0  # by the workers' own seconds a sample: the slowest of each iteration

    def run(self, begin: Sequence[Message]) -> dict[str, Message]:
        """Carry out all iterations and return the replies that hold the bottoms, by device."""
        answers, lost_before = self._ask(begin, 0), 0
        for step in range(self.config.tau):
            batches = self._collect(answers, step)
            if not self.members:
                return {}
            kept = self.config.lost == "drop" or len(self.lost) == lost_before
            lost_before = len(self.lost)
            gradients: Sequence[Tensor | None] = self._update(batches, step) if kept else [None] * len(self.members)
            self.aborted += not kept
            last = step == self.config.tau - 1
            answers = self._ask(self._orders("end" if last else "step", batches, gradients), step + 1)
        return {member.device: answers.replies[member.node] for member in self.members}

    def _ask(self, messages: Sequence[Message], step: int) -> Answers:
        answers = ask(self.grid, messages, self.timeout)
        for member in list(self.members):
            if member.node in answers.refusals:
                self._lose(member, step, answers.refusals[member.node])
        return answers

    def _collect(self, answers: Answers, step: int) -> list[_Batch]:
        """Return the members' batches in their order; who sent none that can be used leaves the cohort."""
        batches = []
        for member in list(self.members):
            reply = answers.replies[member.node]
            try:
                config, tensors = config_of(reply), tensors_of(reply)
                due = f"{self.server_round}/{step}/{member.device}"
                if config.get("tag") != due:
                    raise ReplyError(f"it sent batch {config.get('tag')}; batch {due} was due")
                features, labels = checked_batch(tensors, member.batch_size, self.feature_shape, self.num_classes)
                member.compute_s = float(config["compute_s"])
                member.transfer_s = self._transfer_s(member, config, answers, step)
            except (ReplyError, KeyError, TypeError, ValueError) as error:
                self._lose(member, step, str(error))
                continue
            self.traffic.add(up_bytes=tensor_bytes(tensors))
            batches.append(_Batch(due, features, labels))
        self._account()
        return batches

    def _transfer_s(self, member: Member, config: Mapping[str, Any], answers: Answers, step: int) -> float:
        """Return beta_i: what the device's profile says, or what the exchange took beyond the device's own work."""
        turnaround_s = answers.turnaround_s.get(member.node)
        if self.edge.clock != "real" or turnaround_s is None:
            return float(config["transfer_s"])
        if step == 0:  # the bottom's way down is in there as well
            return member.transfer_s
        return measured_transfer_s(turnaround_s, float(config["handled_s"]), member.batch_size)

    def _update(self, batches: Sequence[_Batch], step: int) -> list[Tensor]:
        done = top_step(self.top, [b.features for b in batches], [b.labels for b in batches], self.learning_rate)
        if not math.isfinite(done.loss):
            raise TrainingError(
                f"round {self.server_round}, iteration {step}: the loss is {done.loss}; a smaller learning_rate than "
                f"{self.learning_rate:g} is needed"
            )
        self.losses.append(done.loss)
        self.correct += done.correct
        self.seen += sum(len(batch.labels) for batch in batches)
        return done.gradients

    def _orders(self, action: str, batches: Sequence[_Batch], gradients: Sequence[Tensor | None]) -> list[Message]:
        messages = []
        for member, batch, gradient in zip(self.members, batches, gradients, strict=True):
            tensors = {} if gradient is None else {"gradient": gradient}
            self.traffic.add(down_bytes=tensor_bytes(tensors))
            content = make_content({"tag": batch.tag}, tensors)
            messages.append(Message(content, member.node, f"train.mergesfl_{action}", group_id=str(self.server_round)))
        return messages

    def _account(self) -> None:
        """Let virtual time pass: an iteration lasts as long as its slowest worker, and the top's own step."""
        if not self.members:
            return
        sizes = [member.batch_size for member in self.members]
        compute, transfer = [m.compute_s for m in self.members], [m.transfer_s for m in self.members]
        self.elapsed_s += iteration_seconds(sizes, compute, transfer, self.edge)
        for member in self.members:
            member.busy_s += member.batch_size * (member.compute_s + member.transfer_s)

    def _lose(self, member: Member, step: int, why: str) -> None:
        self.members.remove(member)
        self.lost.append(Lost(member.device, step, why))
        log.warning("round %d: %s left at iteration %d: %s", self.server_round, member.device, step, why)
