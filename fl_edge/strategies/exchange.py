"""One exchange with many devices: ask, wait, and sort answers from refusals."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from fl_edge.errors import TrainingError
from fl_edge.link.content import config_of


@dataclass
class Answers:
    """What came back, by node id."""

    replies: dict[int, Message] = field(default_factory=dict)
    turnaround_s: dict[int, float] = field(default_factory=dict)  # from message to reply, where the grid tells
    refusals: dict[int, str] = field(default_factory=dict)  # one line each: why there is no answer to use


def ask(grid: Grid, messages: Iterable[Message], timeout: float | None) -> Answers:
    """Send messages, at most one a node, wait for all, and sort what comes back.

    A node that answers with Flower's error, or with a refusal of its own (`refused`), or not in time is a refusal.

    Parameters
    ----------
    timeout
        Seconds; nothing for no limit.
    """
    sent = list(messages)  # Flower's grids go through them twice
    answers = Answers()
    turnaround_s = getattr(grid, "turnaround_s", None)  # ResidentGrid sees when replies arrive; Flower's grids poll
    for reply in grid.send_and_receive(sent, timeout=timeout):
        node = reply.metadata.src_node_id
        if reply.has_error():
            lines = (reply.error.reason or "").strip().splitlines() or ["no reason given"]
            answers.refusals[node] = f"Flower's error {reply.error.code}: {lines[-1]}"
        elif "refused" in (config := config_of(reply)):
            answers.refusals[node] = str(config["refused"])
        else:
            answers.replies[node] = reply
            if turnaround_s is not None:
                answers.turnaround_s[node] = turnaround_s(reply)
    for message in sent:
        node = message.metadata.dst_node_id
        if node not in answers.replies and node not in answers.refusals:
            answers.refusals[node] = f"no answer within {timeout} s"
    return answers


def wait_for_nodes(grid: Grid, at_least: int, patience_s: float) -> None:
    """Return once so many nodes are connected, and no more are coming in.

    Raises
    ------
    TrainingError
        Fewer than asked for when patience ends.
    """
    deadline = time.monotonic() + patience_s
    before: set[int] = set()
    while True:
        now = set(grid.get_node_ids())
        if len(now) >= at_least and now == before:
            return
        if time.monotonic() > deadline:
            raise TrainingError(
                f"{at_least} devices are asked for and {len(now)} connected within {patience_s:.0f} s; start more "
                f"SuperNodes (in simulation: --federation-config 'num-supernodes={at_least}') or ask for fewer"
            )
        if before or not now:
            time.sleep(0.2)  # a simulation's nodes are registered one after another
        before = now
