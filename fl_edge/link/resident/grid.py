"""ResidentGrid: Flower's grid, with clients that stay."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import count
from types import TracebackType
from typing import Any, Self

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fl_edge.errors import ConfigError
from fl_edge.link.flower import NODE_UNAVAILABLE, check_outgoing, unavailable
from fl_edge.link.resident.codec import decode, encode
from fl_edge.link.resident.compression import Compressor
from fl_edge.link.resident.config import ENVIRONMENT, TLS, LinkConfig
from fl_edge.link.resident.frames import Buffer
from fl_edge.link.resident.inbox import Inbox
from fl_edge.link.resident.invitation import make_invitation
from fl_edge.link.resident.server import LinkServer

_POLL_S = 2.0  # how often Flower is asked what became of invitations that nobody followed
_ANYWHERE = ("0.0.0.0", "[::]", "*")  # noqa: S104 - addresses to refuse, not to bind

log = logging.getLogger("flwr.fl_edge")


class ResidentGrid(Grid):
    """Flower's ``Grid``, over one stream a node instead of polls and a process a message.

    The first message to a node makes Flower deliver an invitation; the node's ClientApp
    (:class:`fl_edge.link.resident.ClientApp`) comes, and stays until :meth:`close`. Its handlers, mods and ``Context``
    are those it has anyway, and Flower gets the ``Context`` back when it leaves. For a node that is lost, Flower's
    error 5 (node unavailable) answers each message that it owes a reply to; the next message invites it again.

    ::

        with ResidentGrid(grid) as grid:
            strategy.start(grid, initial_arrays)

    :class:`fl_edge.link.resident.ServerApp` does just that.

    Parameters
    ----------
    grid
        Flower's own grid, to a SuperLink.
    listen
        ``host:port`` to listen on; port 0 takes a free one. If not given, $FL_EDGE_LINK_LISTEN, else ``127.0.0.1:0``.
    advertise
        ``host[:port]`` at which the devices reach it; the host must stand in the certificate. If not given,
        $FL_EDGE_LINK_ADVERTISE, else what it listens on.
    tls
        The certificate that Flower's SuperLink has. If not given, the files named by $FL_EDGE_LINK_CERTIFICATE, _KEY
        and _CA. Needed unless Flower itself runs with ``--insecure``.
    config
        Limits, time-outs, compression.

    Raises
    ------
    ConfigError
        No certificate though Flower has one, or an address that cannot be used.

    Attributes
    ----------
    address : str
        ``host:port`` that devices are told.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        listen: str | None = None,
        advertise: str | None = None,
        tls: TLS | None = None,
        config: LinkConfig | None = None,
    ) -> None:
        self._flower = grid
        self._config = config or LinkConfig()
        self._tls = tls or TLS.from_environment()
        if self._tls is None and flower_security(grid) != "insecure":
            raise ConfigError(
                "Flower runs with TLS, so clients that stay need it too: give tls=TLS.from_files(...), or set "
                f"{ENVIRONMENT}CERTIFICATE, {ENVIRONMENT}KEY and {ENVIRONMENT}CA where the SuperLink is started"
            )
        self._inbox = Inbox(self._config.inbox_mib * 1024**2)
        listen = listen or os.environ.get(f"{ENVIRONMENT}LISTEN") or "127.0.0.1:0"
        host = _host(listen, advertise or os.environ.get(f"{ENVIRONMENT}ADVERTISE"))
        self._server = LinkServer(self._config, listen, self._tls, self._on_message, self._on_end)
        self.address = host if _has_port(host) else f"{host}:{self._server.port}"
        self._numbers = count(1)
        self._compressors: dict[int, Compressor] = {}
        self._invitations: dict[str, int] = {}  # Flower's message id -> node
        self._lock = threading.Lock()  # Flower's grid is not made for several threads
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="fl_edge-watch", daemon=True).start()
        log.info("clients stay connected: listening on port %d as %s", self._server.port, self.address)

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

    def set_run(self, run: Any) -> None:
        """Set the run, in Flower's grid."""
        self._flower.set_run(run)

    @property
    def run(self) -> Any:
        """The run, as Flower's grid has it."""
        return self._flower.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message (deprecated in Flower: call ``Message`` instead)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of the nodes that Flower counts as connected."""
        with self._lock:
            return list(self._flower.get_node_ids())

    def get_nodes(self) -> Iterable[Any]:
        """Return what Flower knows of the nodes that are connected."""
        with self._lock:
            return self._flower.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, and return the id of each.

        Nothing is waited for: a node that is not there yet gets its messages when it comes. The bytes of arrays are
        not copied, and must not change until the reply is there.

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
            nodes = dict.fromkeys(message.metadata.dst_node_id for message in outgoing)
            self._invite([node for node in nodes if self._server.state(node) == "absent"])
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

    def _invite(self, nodes: Sequence[int]) -> None:
        """Ask nodes, by Flower's own way, to come."""
        if not nodes:
            return
        authority = self._tls.authority if self._tls else b""
        try:
            tokens = [self._server.admit(node) for node in nodes]
            invitations = [
                make_invitation(node, token, self.address, authority, self._config)
                for node, token in zip(nodes, tokens, strict=True)
            ]
            self._invitations.update(zip(self._flower.push_messages(invitations), nodes, strict=True))
        except BaseException:
            for node in nodes:
                self._server.release(node, "it could not be invited")
            raise

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
        owed = self._inbox.owed_by(node_id)
        log.warning("node %d is no longer connected: %s; it owes %d replies", node_id, reason, len(owed))
        for asked in owed:
            self._fail(asked, reason)

    def _fail(self, asked: Message, reason: str) -> None:
        error = Error(NODE_UNAVAILABLE, f"node {asked.metadata.dst_node_id} is not connected: {reason}")
        self._inbox.settle(Message(error, reply_to=asked))

    # --- invitations that nobody followed ---

    def _watch(self) -> None:
        """Ask Flower, now and then, what became of the invitations of nodes that are not connected."""
        while not self._closed.wait(_POLL_S):
            open_ids = [
                flower_id
                for flower_id, node in list(self._invitations.items())
                if self._server.state(node) != "connected"
            ]
            if not open_ids:
                continue
            with self._lock:  # also while replies are handled: a node that is being invited again must not be expelled
                try:
                    replies = list(self._flower.pull_messages(open_ids))
                except Exception as error:  # whatever it is, the ServerApp's own next call will meet it too
                    log.debug("Flower cannot be asked about invitations: %s", error)
                    continue
                for reply in replies:
                    node = self._invitations.pop(reply.metadata.reply_to_message_id, None)
                    if node is not None and node not in self._invitations.values():  # else it was invited again
                        self._server.expel(node, _why(reply))


def _why(reply: Message) -> str:
    """Say why a client did not come, or left, by the reply to its invitation."""
    if not reply.has_error():
        return "its client left"
    error = reply.error
    text = ((error.reason or "").strip().splitlines() or ["no reason given"])[-1]
    if "No query function registered" in text:
        return "its ClientApp does not stay: build it with ClientApp of fl_edge.link.resident"
    return f"Flower's error {error.code}: {text}"


def flower_security(grid: Grid) -> str:
    """Return how Flower's grid reaches its SuperLink: ``tls``, ``insecure``, or ``in-process`` if there is none.

    It does not say so itself; this is the one place that looks inside.
    """
    insecure = getattr(grid, "_insecure", None)
    return "in-process" if insecure is None else "insecure" if insecure else "tls"


def _host(listen: str, advertise: str | None) -> str:
    """Return the ``host[:port]`` that devices are told."""
    host = advertise or listen.rpartition(":")[0]
    if not advertise and host in _ANYWHERE:
        raise ConfigError(
            f"listen={listen} is no address for devices; say which one is: advertise=HOST, or {ENVIRONMENT}ADVERTISE"
        )
    return host


def _has_port(host: str) -> bool:
    name, _, port = host.rpartition(":")
    return port.isdecimal() and (":" not in name or name.endswith("]"))  # or it is a part of an IPv6 address
