"""A conversation with each of many devices, one message at a time, none of them waiting for another."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Set
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fl_edge.link.content import make_content
from fl_edge.strategies.arriving import sorted_reply

_LINE = 500  # characters of what a device has to say of itself

log = logging.getLogger("flwr.fl_edge")


class Talk:
    """Says something to a device, and hears what devices answer.

    Parameters
    ----------
    grid
        Flower's, or one that behaves like it.
    nodes
        Device -> node.
    prefix
        Of the message types.
    timeout
        Seconds that a device has for an answer; nothing for no limit.

    Attributes
    ----------
    nodes
        Device -> node, of those that are still there.
    lost
        Device -> why it is not, where it did not :meth:`end`.
    """

    def __init__(self, grid: Grid, nodes: Mapping[str, int], prefix: str, timeout: float | None) -> None:
        self._grid, self._prefix, self._timeout = grid, prefix, timeout
        self.nodes = dict(nodes)
        self._waiting: dict[str, tuple[str, float]] = {}  # message id -> device, and when it was sent
        self.lost: dict[str, str] = {}

    @property
    def devices(self) -> Set[str]:
        """Those that are still there."""
        return self.nodes.keys()

    def meet(self, device: str, node: int) -> str:
        """Add a device, and return its name."""
        self.nodes[device] = node
        return device

    def say(
        self, device: str, what: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Send a device a message; it must have answered the one before."""
        message = Message(make_content(config, tensors), self.nodes[device], self._prefix + what)
        (number,) = self._grid.push_messages([message])
        self._waiting[number] = device, time.monotonic()

    def owed(self, device: str) -> bool:
        """Return whether a device has a message that it has not answered."""
        return any(each == device for each, _ in self._waiting.values())

    def hear(self) -> list[tuple[str, Message | None]]:
        """Return what has come since the last call, without waiting: device and reply, or nothing if it is lost."""
        heard: list[tuple[str, Message | None]] = []
        for reply in self._grid.pull_messages(list(self._waiting)) if self._waiting else ():
            device, _ = self._waiting.pop(reply.metadata.reply_to_message_id)
            found = sorted_reply(reply)
            if isinstance(found, str):
                self.lose(device, found)
            heard.append((device, None if isinstance(found, str) else found))
        for number, (device, sent) in list(self._waiting.items()):
            if self._timeout is not None and time.monotonic() - sent > self._timeout:
                del self._waiting[number]
                self.lose(device, f"no answer within {self._timeout} s")
                heard.append((device, None))
        return heard

    def end(self, device: str) -> None:
        """Let a device go, which has come to its end."""
        self.nodes.pop(device, None)

    def lose(self, device: str, why: str) -> None:
        """Let a device go that cannot go on."""
        self.end(device)
        self.lost[device] = line = "".join(each if each.isprintable() else " " for each in why[:_LINE])
        log.warning("%s is out: %s", device, line)
