"""Flower clients that stay warm: one gRPC stream a node, for any strategy and any ClientApp."""

from typing import TYPE_CHECKING

from fl_edge.lazy import lazy_exports

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from fl_edge.link.resident.clientapp import ClientApp
    from fl_edge.link.resident.config import TLS, LinkConfig
    from fl_edge.link.resident.grid import ResidentGrid
    from fl_edge.link.resident.serverapp import ServerApp

__all__ = ["TLS", "ClientApp", "Grid", "LinkConfig", "ResidentGrid", "ServerApp"]
__getattr__ = lazy_exports(
    __name__,
    {
        "TLS": "fl_edge.link.resident.config",
        "ClientApp": "fl_edge.link.resident.clientapp",
        "Grid": "flwr.serverapp",
        "LinkConfig": "fl_edge.link.resident.config",
        "ResidentGrid": "fl_edge.link.resident.grid",
        "ServerApp": "fl_edge.link.resident.serverapp",
    },
)
