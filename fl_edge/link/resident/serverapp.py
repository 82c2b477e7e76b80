"""Flower's ServerApp whose clients stay: the same name from another module.

::

    from fl_edge.link.resident import Grid, ServerApp  # was: from flwr.serverapp import Grid, ServerApp
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flwr.serverapp
from flwr.app import Context
from flwr.serverapp import Grid

from fl_edge.link.resident.config import TLS, LinkConfig
from fl_edge.link.resident.grid import ResidentGrid, flower_security


class ServerApp(flwr.serverapp.ServerApp):
    """Flower's ServerApp, whose grid keeps clients connected from the first message to the end of the run.

    In Flower's simulation, where processes last anyway, the grid remains Flower's own.

    Parameters
    ----------
    listen, advertise, tls, config
        As :class:`ResidentGrid` has them.
    """

    def __init__(
        self,
        *args: Any,
        listen: str | None = None,
        advertise: str | None = None,
        tls: TLS | None = None,
        config: LinkConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._link = {"listen": listen, "advertise": advertise, "tls": tls, "config": config}

    def __call__(self, grid: Grid, context: Context) -> None:
        """Run the app; called by Flower."""
        with resident_where_possible(grid, **self._link) as chosen:
            super().__call__(chosen, context)


@contextmanager
def resident_where_possible(grid: Grid, **settings: Any) -> Iterator[Grid]:
    """Open a ResidentGrid over a SuperLink's grid; leave that of a simulation, or a LocalGrid, as it is."""
    if flower_security(grid) == "in-process":
        yield grid
        return
    with ResidentGrid(grid, **settings) as resident:
        yield resident
