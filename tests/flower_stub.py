"""Stands in for Flower between ResidentGrid and clients: delivers invitations, and has their replies afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fl_edge.link.local import LocalRun, copy_records
from fl_edge.link.resident.codec import decode, encode


class FlowerStub(Grid):
    """What both kinds have in common; a message is handed to `deliver`, which answers in its own time."""

    _insecure = True

    def __init__(self, num_nodes: int) -> None:
        self.nodes = list(range(1, num_nodes + 1))
        self.delivered: list[Message] = []
        self._replies: dict[str, Message] = {}
        self._run: Any = LocalRun(1, {})

    def deliver(self, message: Message) -> None:
        raise NotImplementedError

    def answer(self, message: Message, reply: Message) -> None:
        self._replies[message.metadata.message_id] = reply

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"flower-{len(self.delivered)}"
            self.delivered.append(message)
            if message.metadata.dst_node_id in self.nodes:
                self.deliver(message)
            else:
                self.answer(message, Message(Error(5, "no such node"), reply_to=message))
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, *_: Any, **__: Any) -> list[Message]:
        raise NotImplementedError


class ThreadFlower(FlowerStub):
    """Runs a ClientApp in a thread a node; `contexts` are the nodes'."""

    def __init__(self, app: ClientApp, num_nodes: int) -> None:
        super().__init__(num_nodes)
        self._app = app
        self.contexts = {
            node: Context(1, node, {"partition-id": node - 1, "num-partitions": num_nodes}, RecordDict(), {})
            for node in self.nodes
        }
        self.threads: list[threading.Thread] = []

    def deliver(self, message: Message) -> None:
        def work() -> None:
            try:
                reply = self._app(message, self.contexts[message.metadata.dst_node_id])
            except Exception as error:
                reply = Message(Error(2, str(error)), reply_to=message)
            self.answer(message, reply)

        self.threads.append(threading.Thread(target=work, daemon=True))
        self.threads[-1].start()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()


class ProcessFlower(FlowerStub):
    """Runs `tests.resident_device` in a process a message, as a SuperNode does."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__(num_nodes)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}  # the newest of each node

    def deliver(self, message: Message) -> None:
        node = message.metadata.dst_node_id
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.resident_device"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin
        process.stdin.write(b"".join(encode(message)))
        process.stdin.close()
        self.processes[node] = process
        threading.Thread(target=self._follow, args=(message, process), daemon=True).start()

    def _follow(self, message: Message, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        with process.stdout as stdout:
            output = stdout.read()
        process.wait()
        reply = decode([output]) if output else Message(Error(8, "the ClientApp crashed"), reply_to=message)
        self.answer(message, reply)

    def __enter__(self) -> ProcessFlower:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()


def copied(records: RecordDict) -> RecordDict:
    """Return records of one's own, to change and send back."""
    return copy_records(records)
