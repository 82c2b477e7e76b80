"""How every client of fl_edge answers: what it raises on purpose becomes an answer of one line."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from flwr.app import Context, Message, RecordDict

from fl_edge.errors import FlEdgeError
from fl_edge.link.content import CONFIG, make_content


class Threaded(Protocol):
    """A workload that says how many threads torch may use."""

    @property
    def threads(self) -> int:
        """At least 1."""


W = TypeVar("W", bound=Threaded)


def answering(
    load: Callable[[Context], W], handler: Callable[[Message, Context, W], RecordDict]
) -> Callable[[Message, Context], Message]:
    """Return a Flower handler: load the workload, handle the message, say how long it took.

    Whatever fl_edge raises on purpose becomes the answer's `refused`, which the server prints.
    """

    def answer(message: Message, context: Context) -> Message:
        started = time.perf_counter()
        try:
            work = load(context)
            torch.set_num_threads(work.threads)
            content = handler(message, context, work)
        except FlEdgeError as error:
            content = make_content({"refused": str(error)})
        content.config_records[CONFIG]["handled_s"] = time.perf_counter() - started
        return Message(content, reply_to=message)

    return answer
