"""A Flower grid inside this process: no Ray, no ports, no waiting.

:class:`LocalGrid` calls a ClientApp for one node after another, and hands the replies back as Flower would. It is for
tests, benchmarks and quick trials. Strategies and ClientApps that keep to Flower's public interface work on it
unchanged; what it adds is determinism, and drop-outs, delays and errors on request (:mod:`fl_edge.link.faults`).

Time is virtual. A delay is never slept, and the time that a handler really takes does not count against a time-out.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fl_edge.errors import ConfigError
from fl_edge.link.arrays import FastArray
from fl_edge.link.faults import Fault, FaultFunction
from fl_edge.link.flower import (
    CLIENT_APP_RAISED_EXCEPTION,
    NODE_UNAVAILABLE,
    SERVER_NODE_ID,
    check_outgoing,
    identify_process,
    unavailable,
)

# Virtual seconds until Flower gives up a node that sends no heartbeat, and that one pull of messages takes.
NODE_LOSS_S = 60.0
PULL_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalRun:
    """What ``grid.run`` returns as long as no Flower run has been set."""

    run_id: int
    override_config: Mapping[str, Any]


class LocalGrid(Grid):
    """Flower's ``Grid``, served by a ClientApp in this process.

    ::

        grid = LocalGrid(client_app, num_nodes=10)
        result = FedAvg().start(grid, initial_arrays, num_rounds=3)
        print(result.train_metrics_clientapp)

    A whole ServerApp runs on it too: ``server_app(grid, context)``.

    A message is delivered as a copy whose records belong to the receiver, so that neither side can change the other's;
    only the array's immutable bytes are shared. A handler that raises answers with Flower's error reply, and the grid
    lives on. Random generators of the process are shared by all nodes, unlike in Flower's simulation: a client should
    draw from its own (:mod:`fl_edge.seeding`).

    Parameters
    ----------
    client_app
        The app that all nodes run.
    num_nodes
        How many nodes there are; their ids are 1 to ``num_nodes``.
    node_configs
        One mapping a node, laid over ``partition-id`` and ``num-partitions``, which every node has as in Flower's
        simulation.
    run_config
        The run's configuration as clients see it.
    run_id
        The run's id in messages and contexts.
    faults
        Decides what befalls each message: called with the message and with how many messages its node got before.

    Raises
    ------
    ConfigError
        No nodes, or not one ``node_configs`` entry for each.

    Attributes
    ----------
    contexts : dict[int, Context]
        The context of each node, kept over all messages.
    now_s : float
        Virtual seconds since the grid was made.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        *,
        node_configs: Sequence[Mapping[str, Any]] | None = None,
        run_config: Mapping[str, Any] | None = None,
        run_id: int = 1,
        faults: FaultFunction | None = None,
    ) -> None:
        if num_nodes < 1:
            raise ConfigError(f"num_nodes: {num_nodes} is not allowed, at least 1")
        if node_configs is not None and len(node_configs) != num_nodes:
            raise ConfigError(f"node_configs: {len(node_configs)} entries for {num_nodes} nodes, one each is allowed")
        identify_process(run_id)
        run_config = dict(run_config or {})
        self.contexts: dict[int, Context] = {}
        for index in range(num_nodes):
            node_config: UserConfig = {"partition-id": index, "num-partitions": num_nodes}
            node_config.update(node_configs[index] if node_configs is not None else {})
            self.contexts[index + 1] = Context(run_id, index + 1, node_config, RecordDict(), dict(run_config))
        self.now_s = 0.0
        self._client_app = client_app
        self._faults = faults
        self._run: Any = LocalRun(run_id, run_config)
        self._pushed = 0
        self._received = dict.fromkeys(self.contexts, 0)
        # Replies under way: id of the message they answer -> (virtual time of arrival, reply). Pushing keeps order.
        self._replies: dict[str, tuple[float, Message]] = {}

    def set_run(self, run: Any) -> None:
        """Set what :attr:`run` returns; messages take their run id from it."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run: the object given to :meth:`set_run`, else one that has ``run_id`` and ``override_config``."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message (deprecated in Flower: call ``Message`` instead)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes, ascending."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver messages, one after another, and keep the replies for :meth:`pull_messages`.

        Returns
        -------
        list[str]
            One id a message. A message to an unknown node is answered by Flower's error 5 (node unavailable).

        Raises
        ------
        ValueError
            A message that is a reply, carries no content, or has no time to live.
        """
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived, each once; a pull takes 0.1 virtual seconds, as Flower's does.

        An id that is unknown, or whose reply has been pulled, is answered by Flower's error 3 (message unavailable).
        """
        ids = dict.fromkeys(message_ids)
        unknown = [unavailable(message_id, self._run.run_id) for message_id in ids if message_id not in self._replies]
        arrived = self._take(ids, self.now_s)
        self.advance(PULL_S)
        return arrived + unknown

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Deliver messages and return the replies that arrive in less than ``timeout`` virtual seconds.

        The clock moves on to the last reply, or by ``timeout`` where one is missing. As in Flower, a late reply can
        still be pulled by the id of its message.
        """
        ids = dict.fromkeys(self.push_messages(messages))
        end = max((self._replies[message_id][0] for message_id in ids), default=self.now_s)
        if timeout is not None and end >= self.now_s + timeout:
            end = self.now_s + max(timeout, 0.0)
            arrived = self._take(ids, end, include_end=False)
        else:
            arrived = self._take(ids, end)
        self.now_s = max(self.now_s, end)
        return arrived

    def advance(self, seconds: float) -> None:
        """Move the virtual clock on."""
        if seconds < 0:
            raise ValueError(f"the clock cannot go back by {-seconds} seconds")
        self.now_s += seconds

    def _take(self, ids: Iterable[str], until: float, *, include_end: bool = True) -> list[Message]:
        """Take the replies that arrive until a time, in order of arrival, then of their messages."""
        due = []
        for message_id in ids:
            arrival = self._replies.get(message_id, (float("inf"),))[0]
            if arrival < until or (include_end and arrival == until):
                due.append((arrival, message_id))
        due.sort(key=lambda item: item[0])
        return [self._replies.pop(message_id)[1] for _, message_id in due]

    def _push(self, message: Message) -> str:
        meta = message.metadata
        check_outgoing(message)
        self._pushed += 1
        message_id = f"{self._run.run_id:x}-{self._pushed:08x}"
        meta.__dict__["_message_id"] = message_id  # Flower's grids tell the sender in the same way
        delivered = _copy(message, message_id, self._run.run_id, SERVER_NODE_ID, meta.dst_node_id)
        node_id = meta.dst_node_id
        if node_id not in self.contexts:
            text = f"node {node_id} does not exist: the nodes are 1 to {len(self.contexts)}"
            self._replies[message_id] = (self.now_s, self._server_error(delivered, NODE_UNAVAILABLE, text))
            return message_id
        fault = self._faults(delivered, self._received[node_id]) if self._faults else None
        self._received[node_id] += 1
        self._replies[message_id] = self._answer(delivered, fault or Fault())
        return message_id

    def _answer(self, message: Message, fault: Fault) -> tuple[float, Message]:
        """Return when the reply to a delivered message arrives, and the reply."""
        if fault.drop:
            text = f"node {message.metadata.dst_node_id} sent no heartbeat"
            return self.now_s + NODE_LOSS_S, self._server_error(message, NODE_UNAVAILABLE, text)
        if fault.error is not None:
            reply = Message(Error(CLIENT_APP_RAISED_EXCEPTION, fault.error), reply_to=message)
        else:
            reply = self._call(message)
        meta = reply.metadata
        own = _copy(reply, f"{message.metadata.message_id}-reply", meta.run_id, meta.src_node_id, meta.dst_node_id)
        return self.now_s + fault.delay_s, own

    def _call(self, message: Message) -> Message:
        """Let the node's ClientApp answer; whatever goes wrong there becomes an error reply."""
        node_id, message_id = message.metadata.dst_node_id, message.metadata.message_id
        try:
            reply = self._client_app(message, self.contexts[node_id])
            if not isinstance(reply, Message):
                raise TypeError(f"the handler returned {type(reply).__name__}, not a Message")
            if reply.metadata.reply_to_message_id != message_id:
                raise ValueError("the handler's message is no reply: build it with Message(content, reply_to=message)")
        except Exception as error:  # a client's mistakes are many, and none of them is the server's
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
            _log.warning("node %d: %s", node_id, reason, exc_info=_log.isEnabledFor(logging.DEBUG))
            return Message(Error(CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        return reply

    def _server_error(self, message: Message, code: int, reason: str) -> Message:
        """Return an error that comes from the server's side: Flower names no node in it."""
        reply = Message(Error(code, reason), reply_to=message)
        message_id = f"{message.metadata.message_id}-reply"
        return _copy(reply, message_id, self._run.run_id, SERVER_NODE_ID, SERVER_NODE_ID)


def _copy(message: Message, message_id: str, run_id: int, src: int, dst: int) -> Message:
    """Return the receiver's own copy of a message; of its content only the arrays' bytes are shared."""
    own, meta = copy.copy(message), copy.copy(message.metadata)
    # Metadata has no setters for ids: Flower's own grids write them in this way. Copying, unlike naming all fields,
    # keeps what later releases add.
    meta.__dict__.update(_message_id=message_id, _run_id=run_id, _src_node_id=src, _dst_node_id=dst)
    own.__dict__["_metadata"] = meta
    if message.has_content():
        own.__dict__["_content"] = copy_records(message.content)
    return own


def copy_records(records: RecordDict) -> RecordDict:
    """Return a copy that can be edited without a trace in the original; array bytes are shared, not copied."""
    own = records.copy()
    for name, record in records.items():
        copied = record.copy()
        # Setting values through the record would check each type again, at twice the price of all the rest.
        values = copied.__dict__["_data"]
        for key, value in record.items():
            if isinstance(value, list):
                values[key] = list(value)
            elif isinstance(value, Array):
                values[key] = FastArray.like(value)
        own.__dict__["_data"][name] = copied
    return own
