"""Client side of Flower: one thin module for each workload."""

from typing import TYPE_CHECKING

from fl_edge.lazy import lazy_exports

if TYPE_CHECKING:
    from fl_edge.clients.fedspine import FedSpineClient, FedSpineWorkload
    from fl_edge.clients.mergesfl import MergeSFLClient, Workload

__all__ = ["FedSpineClient", "FedSpineWorkload", "MergeSFLClient", "Workload"]
_HOMES = {
    "FedSpineClient": "fedspine",
    "FedSpineWorkload": "fedspine",
    "MergeSFLClient": "mergesfl",
    "Workload": "mergesfl",
}
__getattr__ = lazy_exports(__name__, {name: f"fl_edge.clients.{home}" for name, home in _HOMES.items()})
