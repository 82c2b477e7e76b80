"""What was asked and what came back: every message sent is settled exactly once."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import Message


@dataclass
class _Waiter:
    """A caller that waits for the replies to some messages."""

    missing: set[str]
    replies: dict[str, Message]


class Inbox:
    """Replies by the id of the message that they answer. Safe for threads.

    Parameters
    ----------
    limit_bytes
        When the replies that nobody has taken exceed this, :meth:`settle` waits until some were taken.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._open: dict[str, Message] = {}  # messages without a reply, as they were sent but for their content
        self._replies: dict[str, tuple[Message, int]] = {}
        self._bytes = 0
        self._waiters: list[_Waiter] = []
        self._given_up: dict[str, None] = {}  # whose callers' time was over
        self._closed = False

    def expect(self, asked: Message) -> None:
        """Note that a message was sent; its content is not looked at, and need not be there."""
        with self._changed:
            self._open[asked.metadata.message_id] = asked

    def asked(self, message_id: str) -> Message | None:
        """Return the message of this id, if there is no reply to it yet."""
        return self._open.get(message_id)

    def owed_by(self, node_id: int) -> list[Message]:
        """Return the messages to which a node owes a reply, oldest first."""
        with self._changed:
            return [asked for asked in self._open.values() if asked.metadata.dst_node_id == node_id]

    def settle(self, reply: Message, size: int = 0) -> None:
        """Take in a reply of so many bytes, unless the message that it answers has one already.

        A reply of no bytes does not wait for room: it is an error that this end has found itself.
        """
        message_id = reply.metadata.reply_to_message_id
        with self._changed:
            if self._open.pop(message_id, None) is None:
                return
            for waiter in self._waiters:
                if message_id in waiter.missing:
                    waiter.replies[message_id] = reply
                    waiter.missing.discard(message_id)
                    if not waiter.missing:
                        self._changed.notify_all()
                    return
            self._replies[message_id] = reply, size
            self._bytes += size
            self._changed.notify_all()
            if size:
                self._changed.wait_for(lambda: self._closed or self._has_room())

    def _has_room(self) -> bool:
        for message_id in [each for each in self._replies if each in self._given_up]:
            if self._bytes > self._limit_bytes:
                self._take(message_id)
        return self._bytes <= self._limit_bytes

    def _take(self, message_id: str) -> Message | None:
        if message_id not in self._replies:
            return None
        reply, size = self._replies.pop(message_id)
        self._given_up.pop(message_id, None)
        self._bytes -= size
        self._changed.notify_all()
        return reply

    def pull(self, message_ids: Iterable[str]) -> tuple[list[Message], list[str]]:
        """Return the replies that are there, each once, and the ids that are neither answered nor awaited."""
        with self._changed:
            replies, unknown = [], []
            for message_id in message_ids:
                if (reply := self._take(message_id)) is not None:
                    replies.append(reply)
                elif message_id not in self._open:
                    unknown.append(message_id)
            return replies, unknown

    def wait(self, message_ids: Iterable[str], timeout: float | None) -> list[Message]:
        """Return the replies to messages as soon as all are there, or those that are when the time is over.

        They are in the order of the messages, whatever the order of arrival, so that sums over them have the same bits
        in every run. A reply that comes later can still be pulled; when room is short, such replies go first.
        """
        with self._changed:
            ids = list(dict.fromkeys(message_ids))
            there = {each: reply for each in ids if (reply := self._take(each)) is not None}
            waiter = _Waiter({each for each in ids if each in self._open}, there)
            self._waiters.append(waiter)
            try:
                self._changed.wait_for(lambda: self._closed or not waiter.missing, timeout)
            finally:
                self._waiters.remove(waiter)
                self._given_up.update(dict.fromkeys(waiter.missing))
            return [waiter.replies[message_id] for message_id in ids if message_id in waiter.replies]

    def close(self) -> None:
        """Let nobody wait any longer, neither for a reply nor for room."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
