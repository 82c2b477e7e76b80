"""HAT's cloud for devices that come by themselves, without Flower's SuperLink, until somebody stops it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fl_edge.hat.config import CloudConfig
from fl_edge.link.resident.config import TLS
from fl_edge.link.resident.open import OpenGrid
from fl_edge.strategies.hat import Hat

log = logging.getLogger("flwr.fl_edge")


@dataclass(frozen=True)
class Place:
    """Where devices come to, and what they must know; as :class:`~fl_edge.link.resident.open.OpenGrid` has it.

    Attributes
    ----------
    listen
        ``host:port``.
    tls
        The server's certificate; nothing: in the clear.
    token
        That lets devices in; never shown.
    """

    listen: str
    tls: TLS | None
    token: bytes = field(repr=False)


def serve(
    folder: Path,
    shallow: int,
    config: CloudConfig,
    place: Place,
    begin: Callable[[], Callable[[], bool]],
    *,
    accelerator: str = "cpu",
    threads: int = 1,
) -> None:
    """Serve a model's middle submodel to whoever has the token.

    Parameters
    ----------
    folder, shallow, config, accelerator, threads
        As :class:`~fl_edge.strategies.hat.Hat` has them.
    place
        Where.
    begin
        Called when the model is there; returns what is asked again and again whether this is the end.

    Raises
    ------
    FlEdgeError
        A model that cannot be served, or an address that cannot be used.
    """
    # before the model is read, which may take long: the address may be in use; who comes meanwhile waits
    with OpenGrid(place.listen, place.tls, place.token) as grid:
        try:
            hat = Hat(folder, shallow, config, min_devices=0, accelerator=accelerator, threads=threads)
            kept, layers = hat.identity["shallow"], hat.identity["layers"]
            log.info("%s: layers %d to %d of %d, on %s", folder, kept + 1, layers, layers, accelerator)
            room = config.cache_tokens // hat.capacity
            log.info("at most %d requests at once, of at most %d tokens each", room, hat.capacity)
            host, security = place.listen.rpartition(":")[0], "with TLS" if place.tls else "in the clear"
            log.info("listening on %s:%d, %s; Ctrl-C ends", host, grid.port, security)
            hat.start(grid, None, until=begin())
            log.info("stopped")
        finally:
            grid.close("the server was stopped")
