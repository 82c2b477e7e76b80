"""The devices of a federated search: asking them, sending the super-network to who lacks it, pooling their sums."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from flwr.app import Array, Message
from flwr.serverapp import Grid
from torch import Tensor

from fl_edge.edge.traffic import Traffic
from fl_edge.errors import ReplyError, TrainingError
from fl_edge.imbnas.federation import (
    Calibration,
    Named,
    Place,
    Question,
    lengths,
    read_statistics,
    trained_part,
)
from fl_edge.imbnas.messages import Aim, read_answers, read_counts, write_question, write_space
from fl_edge.imbnas.report import total_counts
from fl_edge.imbnas.supernet import Supernet
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.packing import pack, tensor_bytes
from fl_edge.models.averaging import check_weights, weighted_mean
from fl_edge.models.pretraining import weights_digest
from fl_edge.strategies.exchange import Answers, ask
from fl_edge.strategies.roster import Roster

Said = Callable[[str], Mapping[str, Any]]
Check = Callable[[str, Mapping[str, Any], dict[str, Tensor]], None]  # device, plain values, tensors

log = logging.getLogger("flwr.fl_edge")


class Lost(Exception):  # noqa: N818 - what was asked must be asked again, of those who are left
    """A device did not answer in the middle of a search."""


@dataclass(frozen=True)
class Member:
    """What a device has, in images by class."""

    train: tuple[int, ...]
    validation: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Averaged:
    """What one round of federated averaging gave.

    Attributes
    ----------
    weights
        The mean by training images; as they were where nobody answered.
    loss
        Mean of the devices' by training images, and over what they trained.
    devices
        That count.
    absent
        Device -> why it does not.
    """

    weights: Named
    loss: float | None
    devices: int
    absent: dict[str, str]


class Fleet:
    """The devices that take part.

    Parameters
    ----------
    supernet
        What they are to have.
    classes, shape
        Names, and (channels, height, width), that they must have.
    fewest
        So many must be left.

    Attributes
    ----------
    members
        By name; those that are lost to the search, too.
    lost
        Device -> why the search goes on without it.
    traffic
        Bytes of tensors so far.
    """

    def __init__(self, supernet: Supernet, classes: Sequence[str], shape: Sequence[int], fewest: int) -> None:
        self._supernet, self._classes, self._shape, self._fewest = supernet, list(classes), list(shape), fewest
        weights = trained_part(supernet)
        self.digest = weights_digest(supernet)
        self._packed, self._bytes = pack(weights), tensor_bytes(weights)
        self.members: dict[str, Member] = {}
        self.lost: dict[str, str] = {}
        self.traffic = Traffic()
        self._roster = Roster("query.imbnas_describe")
        self._grid: Grid | None = None
        self._timeout: float | None = None

    def meet(self, grid: Grid, server_round: int, timeout: float | None) -> None:
        """Ask new nodes who they are; see :meth:`fl_edge.strategies.roster.Roster.meet`."""
        self._grid, self._timeout = grid, timeout
        self._roster.meet(grid, server_round, self._accept, timeout)

    @property
    def present(self) -> list[str]:
        """The devices that are connected and not lost, in the order in which their sums are added."""
        return [device for device in self._roster.names if device not in self.lost]

    def counts(self, devices: Sequence[str]) -> Tensor:
        """Return the training images of some devices by class, int64 (C,)."""
        return total_counts([self.members[device].train for device in devices], len(self._classes))

    def validation(self, devices: Sequence[str]) -> Tensor:
        """Return the validation images of some devices by class, int64 (C,)."""
        return total_counts([self.members[device].validation for device in devices], len(self._classes))

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes of tensors so far: (up, down)."""
        return self.traffic.up_bytes, self.traffic.down_bytes

    def enough(self) -> list[str]:
        """Return who is present.

        Raises
        ------
        TrainingError
            Fewer than ``fewest``.
        """
        devices = self.present
        if len(devices) < self._fewest:
            last, why = next(reversed(self.lost.items()), ("none", "none was lost"))
            raise TrainingError(
                f"{len(devices)} devices are left and fewest={self._fewest} must be; the last that was lost is {last}: "
                f"{why}"
            )
        return devices

    def exchange(
        self, kind: str, devices: Sequence[str], said: Said, tensors: Mapping[str, Tensor], check: Check
    ) -> dict[str, str]:
        """Ask some devices the same, let ``check`` take each answer in their order; return why others have none.

        Parameters
        ----------
        check
            What it raises of ReplyError, KeyError, TypeError and ValueError makes an answer one that does not count.
        """
        packed, size = pack(tensors), tensor_bytes(tensors)
        answers = self._ask(kind, devices, said, packed, size)
        lacking = [device for device in devices if self._says(answers, device, "missing")]
        if lacking:
            taken = self._hand_out(lacking)
            again = [device for device in lacking if self._roster.nodes[device] in taken.replies]
            second = self._ask(kind, again, said, packed, size)
            answers.replies |= second.replies
            answers.refusals |= taken.refusals | second.refusals
        absent = {}
        for device in devices:
            node = self._roster.nodes[device]
            try:
                if node in answers.refusals:
                    raise ReplyError(answers.refusals[node])
                reply = answers.replies[node]
                if self._says(answers, device, "missing"):
                    raise ReplyError("it does not keep the super-network")
                found = tensors_of(reply)
                self.traffic.add(up_bytes=tensor_bytes(found))
                check(device, config_of(reply), found)
            except (ReplyError, KeyError, TypeError, ValueError) as error:
                absent[device] = _line(error)
                log.warning("%s does not count: %s", device, absent[device])
        return absent

    def average(self, kind: str, order: Mapping[str, Any], weights: Named, least: int) -> Averaged:
        """Let the devices that have at least so many training images train weights, and return the mean."""
        sizes = {device: sum(self.members[device].train) for device in self.present}
        parts, losses = list[tuple[int, Named]](), list[float]()

        def take(device: str, said: Mapping[str, Any], found: Named) -> None:
            check_weights(found, weights)
            each = said["losses"] if "losses" in said else [said["loss"]]
            if said["samples"] != sizes[device] or not each or not all(map(isfinite, each)):
                raise ReplyError(f"it says it trained on {said['samples']} images, with losses {each}")
            parts.append((sizes[device], found))
            losses.append(sum(each) / len(each))

        devices = [device for device, size in sizes.items() if size >= least]
        absent = self.exchange(kind, devices, lambda _device: order, weights, take)
        if not parts:
            return Averaged(weights, None, 0, absent)
        total = sum(samples for samples, _ in parts)
        loss = sum(samples * value for (samples, _), value in zip(parts, losses, strict=True)) / total
        return Averaged(weighted_mean(parts), loss, len(parts), absent)

    def sums(self, question: Question, calibration: Calibration, devices: Sequence[str], aim: Aim) -> list[Tensor]:
        """Put a question to some devices and return the sums of their answers.

        Raises
        ------
        Lost
            A device did not answer, or answered what cannot be; it is lost from then on.
        """
        config, tensors = write_question(question, calibration)
        config |= {"digest": self.digest, **(aim.to_config() if question.kind in ("gram", "slope") else {})}
        places, first = {}, 0
        for device in devices:
            places[device] = first
            first += sum(self.members[device].train)
        due = lengths(question, self._supernet, len(self._classes), layerwise=calibration.config.layerwise)
        found: list[list[Tensor]] = []

        def check(device: str, _said: Mapping[str, Any], own: dict[str, Tensor]) -> None:
            answers = read_answers(own, due, question.kind, self.members[device].validation)
            if question.kind == "moments":
                for answer, architecture, known in zip(answers, question.architectures, question.known, strict=True):
                    read_statistics(answer, self._supernet, architecture, len(known))
            found.append(answers)

        absent = self.exchange(
            "train.imbnas_sums",
            devices,
            lambda device: {**config, **vars(Place(places[device], first)), "digest": self.digest},
            tensors,
            check,
        )
        if absent:
            self.lost |= absent
            raise Lost
        return [torch.stack(each).sum(0) for each in zip(*found, strict=True)]

    def forget(self) -> None:
        """Let devices remove what they kept; who does not answer removes it later."""
        assert self._grid is not None
        nodes = self._roster.nodes.values()
        ask(self._grid, [Message(make_content({}), node, "query.imbnas_forget") for node in nodes], self._timeout)

    def _ask(self, kind: str, devices: Sequence[str], said: Said, packed: Array, size: int) -> Answers:
        assert self._grid is not None
        nodes = self._roster.nodes
        messages = [Message(make_content(said(device), packed), nodes[device], kind) for device in devices]
        self.traffic.add(down_bytes=len(messages) * size)
        return ask(self._grid, messages, self._timeout)

    def _hand_out(self, devices: Sequence[str]) -> Answers:
        """Send the super-network to devices, and return what they say to it."""
        said = {"digest": self.digest, "space": write_space(self._supernet.space)}
        return self._ask("query.imbnas_keep", devices, lambda _device: said, self._packed, self._bytes)

    def _says(self, answers: Answers, device: str, what: str) -> bool:
        reply = answers.replies.get(self._roster.nodes[device])
        return reply is not None and what in config_of(reply)

    def _accept(self, device: str, said: dict[str, Any]) -> None:
        if list(said["classes"]) != self._classes or list(said["shape"]) != self._shape:
            raise ReplyError(
                f"its images are of {len(said['classes'])} classes and shape {tuple(said['shape'])}; due are "
                f"{len(self._classes)} classes, {', '.join(self._classes)[:60]}, and shape {tuple(self._shape)}"
            )
        one, two = (read_counts(said, name, len(self._classes)) for name in ("train", "validation"))
        if not sum(one) + sum(two):
            raise ReplyError("it has no images")
        self.members[device] = Member(one, two)


def _line(error: Exception) -> str:
    text = f"it said no {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:500]
