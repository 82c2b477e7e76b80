"""ResidentGrid: Flower's grid, with clients that stay."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fl_edge.errors import ConfigError
from fl_edge.link.resident.config import ENVIRONMENT, TLS, LinkConfig
from fl_edge.link.resident.invitation import make_invitation
from fl_edge.link.resident.streams import StreamGrid

_POLL_S = 2.0  # how often Flower is asked what became of invitations that nobody followed
_ANYWHERE = ("0.0.0.0", "[::]", "*")  # noqa: S104 - addresses to refuse, not to bind

log = logging.getLogger("flwr.fl_edge")


class ResidentGrid(StreamGrid):
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
        self._tls = tls or TLS.from_environment()
        if self._tls is None and flower_security(grid) != "insecure":
            raise ConfigError(
                "Flower runs with TLS, so clients that stay need it too: give tls=TLS.from_files(...), or set "
                f"{ENVIRONMENT}CERTIFICATE, {ENVIRONMENT}KEY and {ENVIRONMENT}CA where the SuperLink is started"
            )
        listen = listen or os.environ.get(f"{ENVIRONMENT}LISTEN") or "127.0.0.1:0"
        host = _host(listen, advertise or os.environ.get(f"{ENVIRONMENT}ADVERTISE"))
        super().__init__(listen, self._tls, config or LinkConfig())
        self.address = host if _has_port(host) else f"{host}:{self.port}"
        self._invitations: dict[str, int] = {}  # Flower's message id -> node
        threading.Thread(target=self._watch, name="fl_edge-watch", daemon=True).start()
        log.info("clients stay connected: listening on port %d as %s", self.port, self.address)

    # --- Flower's Grid ---

    def set_run(self, run: Any) -> None:
        """Set the run, in Flower's grid."""
        self._flower.set_run(run)

    @property
    def run(self) -> Any:
        """The run, as Flower's grid has it."""
        return self._flower.run

    def get_node_ids(self) -> list[int]:
        """Return the ids of the nodes that Flower counts as connected."""
        with self._lock:
            return list(self._flower.get_node_ids())

    def get_nodes(self) -> Iterable[Any]:
        """Return what Flower knows of the nodes that are connected."""
        with self._lock:
            return self._flower.get_nodes()

    # --- nodes that come and go ---

    def _call(self, nodes: Collection[int]) -> None:
        """Ask nodes that are not there, by Flower's own way, to come."""
        absent = [node for node in nodes if self._server.state(node) == "absent"]
        if not absent:
            return
        authority = self._tls.authority if self._tls else b""
        try:
            tokens = [self._server.admit(node) for node in absent]
            invitations = [
                make_invitation(node, token, self.address, authority, self._config)
                for node, token in zip(absent, tokens, strict=True)
            ]
            self._invitations.update(zip(self._flower.push_messages(invitations), absent, strict=True))
        except BaseException:
            for node in absent:
                self._server.release(node, "it could not be invited")
            raise

    def _on_end(self, node_id: int, reason: str) -> None:
        owed = len(self._inbox.owed_by(node_id))
        log.warning("node %d is no longer connected: %s; it owes %d replies", node_id, reason, owed)
        super()._on_end(node_id, reason)

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
