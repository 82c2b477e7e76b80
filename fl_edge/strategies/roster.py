"""Who is connected: devices by their own names, whatever node ids Flower gives them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fl_edge.errors import ReplyError, TrainingError
from fl_edge.link.content import config_of, make_content
from fl_edge.strategies.exchange import Answers, ask

Accept = Callable[[str, dict[str, Any]], None]

log = logging.getLogger("flwr.fl_edge")


class Roster:
    """The devices that can take part, and the node id of each.

    Parameters
    ----------
    question_type
        Message type of the question who a node is; it carries `round`, and the answer must name the `device`.

    Attributes
    ----------
    nodes : dict[str, int]
        Device -> node id, as of the last :meth:`meet`.
    """

    def __init__(self, question_type: str) -> None:
        self.question_type = question_type
        self.nodes: dict[str, int] = {}
        self._complaints: set[str] = set()  # reasons of nodes that take no part, said once

    @property
    def names(self) -> list[str]:
        """The devices in an order that does not depend on node ids: device-2 before device-10."""
        return sorted(self.nodes, key=lambda name: (len(name), name))

    def meet(
        self, grid: Grid, server_round: int, accept: Accept, timeout: float | None, *, everyone: bool = False
    ) -> None:
        """Forget who has left, and ask new nodes who they are.

        Parameters
        ----------
        accept
            Called with the device's name and its whole answer; whatever it raises of ReplyError, KeyError, TypeError
            and ValueError keeps the device out until it is asked again.
        timeout
            Seconds to wait for the answers; nothing for no limit.
        everyone
            Ask all nodes, not only the new ones.

        Raises
        ------
        TrainingError
            No device can take part.
        """
        connected = sorted(grid.get_node_ids())
        self.nodes = {device: node for device, node in self.nodes.items() if node in connected}
        asked = [node for node in connected if everyone or node not in self.nodes.values()]
        question, group = {"round": server_round}, str(server_round)
        messages = [Message(make_content(question), node, self.question_type, group_id=group) for node in asked]
        answers = ask(grid, messages, timeout)
        reasons: dict[str, list[int]] = {}
        for node in asked:
            try:
                self._enter(node, answers, accept)
            except (ReplyError, KeyError, TypeError, ValueError) as error:
                reasons.setdefault(str(error), []).append(node)
        for reason, affected in reasons.items():
            if reason not in self._complaints:
                self._complaints.add(reason)
                log.warning("%d of %d devices take no part: %s", len(affected), len(connected), reason)
        if not self.nodes:
            reason = next(iter(reasons), "none is connected")
            raise TrainingError(f"round {server_round}: no device can take part: {reason}")

    def _enter(self, node: int, answers: Answers, accept: Accept) -> None:
        if node in answers.refusals:
            raise ReplyError(answers.refusals[node])
        config = config_of(answers.replies[node])
        device = str(config["device"])
        if self.nodes.get(device, node) != node:
            raise ReplyError(f"it calls itself {device}, as node {self.nodes[device]} does; names must differ")
        accept(device, config)
        self.nodes[device] = node
