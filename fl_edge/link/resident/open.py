"""OpenGrid: a Flower grid without Flower's SuperLink, to which whoever has the token comes, and leaves at will."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection
from typing import Any

from fl_edge.errors import ConfigError
from fl_edge.link.flower import identify_process
from fl_edge.link.local import LocalRun
from fl_edge.link.resident.config import OPEN, TLS, LinkConfig
from fl_edge.link.resident.streams import StreamGrid

_RUN = 1  # there is only one


class OpenGrid(StreamGrid):
    """Flower's ``Grid``, over one stream for each device that has come by itself.

    Its nodes are the devices that have come and not gone. A message to another is answered by Flower's error 5.

    ::

        with OpenGrid("0.0.0.0:9095", tls, token) as grid:
            strategy.start(grid)

    Parameters
    ----------
    listen
        ``host:port`` to listen on; port 0 takes a free one.
    tls
        The server's certificate; nothing: in the clear.
    token
        What a device must know to come.
    config
        Limits and time-outs; `frame_kib` and `max_message_mib` must be those of the devices.

    Raises
    ------
    ConfigError
        An address that cannot be used, or that other machines reach though there is no token or no certificate.
    """

    def __init__(
        self, listen: str, tls: TLS | None = None, token: bytes = b"", config: LinkConfig | None = None
    ) -> None:
        host = listen.rpartition(":")[0].strip("[]")
        if not (tls and token) and not _is_loopback(host):
            raise ConfigError(
                f"{listen} can be reached from other machines; that needs a token and a certificate, "
                "without them only 127.0.0.1 is allowed"
            )
        identify_process(_RUN)
        self._run: Any = LocalRun(_RUN, {})
        self._secret = hashlib.sha256(token).digest()
        super().__init__(listen, tls, config or OPEN, self._opens)

    def set_run(self, run: Any) -> None:
        """Set what :attr:`run` returns."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run: the object given to :meth:`set_run`, else one that has ``run_id`` and ``override_config``."""
        return self._run

    def get_node_ids(self) -> list[int]:
        """Return the numbers of the devices that have come and not gone; one that is cut may come back."""
        return self._server.nodes()

    def _call(self, nodes: Collection[int]) -> None:
        """Devices come by themselves."""

    def _opens(self, token: bytes) -> bool:
        return hmac.compare_digest(hashlib.sha256(token).digest(), self._secret)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
