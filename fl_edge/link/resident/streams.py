"""What grids over streams have in common: messages go out, replies come in, a node that is lost fails what it owes."""

from __future__ import annotations

import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import count
from types import TracebackType
from typing import Self

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fl_edge.link.flower import NODE_UNAVAILABLE, check_outgoing, unavailable
from fl_edge.link.resident.codec import decode, encode
from fl_edge.link.resident.compression import Compressor
from fl_edge.link.resident.config import TLS, LinkConfig
from fl_edge.link.resident.frames import Buffer
from fl_edge.link.resident.inbox import Inbox
from fl_edge.link.resident.server import LinkServer

log = logging.getLogger("flwr.fl_edge")


class StreamGrid(Grid):
    """Flower's ``Grid`` over one stream a node; how nodes come is for its two kinds to say.

    For a node that is lost, Flower's error 5 (node unavailable) answers each message that it owes a reply to.

    Parameters
    ----------
    listen
        ``host:port`` to listen on; port 0 takes a free one.
    tls
        The server's certificate; nothing: in the clear.
    config
        Limits, time-outs, compression.
    opens
        As :class:`~fl_edge.link.resident.server.LinkServer` has it.

    Raises
    ------
    ConfigError
        An address that cannot be used.

    Attributes
    ----------
    port : int
        That is listened on.
    """

    def __init__(
        self, listen: str, tls: TLS | None, config: LinkConfig, opens: Callable[[bytes], bool] | None = None
    ) -> None:
        self._config = config
        self._inbox = Inbox(config.inbox_mib * 1024**2)
        self._server = LinkServer(config, listen, tls, self._on_message, self._on_end, opens)
        self.port = self._server.port
        self._numbers = count(1)
        self._compressors: dict[int, Compressor] = {}
        self._lock = threading.Lock()  # for one caller at a time
        self._closed = threading.Event()

    # --- opening and closing ---

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("the run failed" if error else "the run has ended")

    def close(self, reason: str = "the run has ended") -> None:
        """Let all clients go, and stop listening. All tokens are void from now on."""
        if not self._closed.is_set():
            self._closed.set()
            self._server.close(reason)
            self._inbox.close()

    # --- Flower's Grid ---

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message (deprecated in Flower: call ``Message`` instead)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, and return the id of each.

        Nothing is waited for. The bytes of arrays are not copied, and must not change until the reply is there.

        Raises
        ------
        ValueError
            A message that is a reply, carries no content, has no time to live, or is too long.
        ConfigError
            There are more nodes than `max_nodes`.
        """
        if self._closed.is_set():
            raise ValueError("this grid is closed; messages can be sent only while the ServerApp runs")
        outgoing = list(messages)
        with self._lock:
            encoded = [self._encode(message) for message in outgoing]  # before anything is sent: one may be wrong
            self._call(dict.fromkeys(message.metadata.dst_node_id for message in outgoing))
            for message, parts in zip(outgoing, encoded, strict=True):
                self._send(message, parts)
        return [message.metadata.message_id for message in outgoing]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived, each once; does not wait.

        An id that is unknown, or whose reply has been pulled, is answered by Flower's error 3 (message unavailable).
        """
        replies, unknown = self._inbox.pull(dict.fromkeys(message_ids))
        return replies + [unavailable(message_id, run_id=0) for message_id in unknown]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies, in the order of the messages, as soon as all are there.

        After `timeout` seconds those that have arrived are returned; as in Flower, a late reply can still be pulled by
        the id of its message.
        """
        return self._inbox.wait(self.push_messages(messages), timeout)

    @staticmethod
    def turnaround_s(reply: Message) -> float:
        """Return the seconds from sending a message to the arrival of this, its reply."""
        return float(reply.__dict__["_turnaround_s"])

    # --- sending ---

    @abstractmethod
    def _call(self, nodes: Collection[int]) -> None:
        """Let nodes that are to get a message come, where that is possible."""

    def _encode(self, message: Message) -> list[Buffer]:
        meta = message.metadata
        check_outgoing(message)
        meta.__dict__["_message_id"] = f"{meta.run_id:x}-{next(self._numbers):08x}"  # as Flower's grids do
        scheme = self._config.compression
        if scheme != "none" and meta.dst_node_id not in self._compressors:
            self._compressors[meta.dst_node_id] = Compressor(scheme)  # type: ignore[arg-type]
        parts = encode(message, self._compressors.get(meta.dst_node_id))
        if (size := sum(map(len, parts))) > self._config.max_message_bytes:
            most = self._config.max_message_mib
            raise ValueError(f"a message of {size} bytes cannot be sent; it may have {most} MiB (max_message_mib)")
        return parts

    def _send(self, message: Message, parts: Sequence[Buffer]) -> None:
        asked = Message(metadata=message.metadata, content=RecordDict())  # type: ignore[call-overload]
        asked.__dict__["_sent_at"] = time.monotonic()
        self._inbox.expect(asked)
        try:
            self._server.send(message.metadata.dst_node_id, parts)
        except KeyError:  # it was lost a moment ago
            self._fail(asked, "it was lost")

    # --- receiving; in threads of the server ---

    def _on_message(self, node_id: int, chunks: Sequence[Buffer]) -> None:
        arrived_at = time.monotonic()
        reply = decode(chunks)
        asked = self._inbox.asked(reply.metadata.reply_to_message_id)
        if asked is None or asked.metadata.dst_node_id != node_id:
            return  # a second reply, or one to a message that the node was never sent
        meta = asked.metadata
        reply.metadata.__dict__.update(  # what a device says of itself is not taken on trust
            _message_id=f"{meta.message_id}-reply",
            _run_id=meta.run_id,
            _src_node_id=node_id,
            _dst_node_id=meta.src_node_id,
            _group_id=meta.group_id,
            _message_type=meta.message_type,
            _src_task_id=meta.dst_task_id,
            _dst_task_id=meta.src_task_id,
        )
        reply.__dict__["_turnaround_s"] = arrived_at - asked.__dict__["_sent_at"]
        self._inbox.settle(reply, sum(map(len, chunks)))

    def _on_end(self, node_id: int, reason: str) -> None:
        self._compressors.pop(node_id, None)  # what it feeds back is of messages that may not have arrived
        for asked in self._inbox.owed_by(node_id):
            self._fail(asked, reason)

    def _fail(self, asked: Message, reason: str) -> None:
        error = Error(NODE_UNAVAILABLE, f"node {asked.metadata.dst_node_id} is not connected: {reason}")
        self._inbox.settle(Message(error, reply_to=asked))
