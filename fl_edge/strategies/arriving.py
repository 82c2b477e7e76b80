"""One exchange with many devices whose answers are wanted as they come."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from fl_edge.link.content import config_of
from fl_edge.link.flower import NODE_UNAVAILABLE

_PAUSE_S = 0.1


def arriving(grid: Grid, messages: Iterable[Message], timeout: float | None) -> Iterator[tuple[int, Message | str]]:
    """Send messages, at most one a node, and yield each node's reply, or in one line why there is none, as it comes.

    Parameters
    ----------
    timeout
        Seconds; nothing for no limit.
    """
    sent = {message.metadata.dst_node_id: message for message in messages}
    ids = dict(zip(grid.push_messages(sent.values()), sent, strict=True))
    deadline = None if timeout is None else time.monotonic() + timeout
    while ids:
        replies = list(grid.pull_messages(list(ids)))
        for reply in replies:
            node = ids.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                yield node, sorted_reply(reply)
        if deadline is not None and time.monotonic() > deadline:
            break
        if ids and not replies:
            time.sleep(_PAUSE_S)
    for node in ids.values():
        yield node, f"no answer within {timeout} s"


def sorted_reply(reply: Message) -> Message | str:
    """Return a reply, or in one line why it is none: Flower's error, or what the device refused."""
    if reply.has_error():
        line = ((reply.error.reason or "").strip().splitlines() or ["no reason given"])[-1]
        return line if reply.error.code == NODE_UNAVAILABLE else f"Flower's error {reply.error.code}: {line}"
    refused = config_of(reply).get("refused")
    return reply if refused is None else str(refused)
