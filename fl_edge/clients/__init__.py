"""Client side of Flower: one thin module for each workload."""

from typing import TYPE_CHECKING

from fl_edge.lazy import lazy_exports

if TYPE_CHECKING:
    from fl_edge.clients.comp import CompClient, CompWorkload
    from fl_edge.clients.fedspine import FedSpineClient, FedSpineWorkload
    from fl_edge.clients.hat import HatClient, HatWorkload
    from fl_edge.clients.imbnas import ImbNasClient, ImbNasWorkload
    from fl_edge.clients.mergesfl import MergeSFLClient, Workload

__all__ = [
    "CompClient",
    "CompWorkload",
    "FedSpineClient",
    "FedSpineWorkload",
    "HatClient",
    "HatWorkload",
    "ImbNasClient",
    "ImbNasWorkload",
    "MergeSFLClient",
    "Workload",
]
_HOMES = {
    "CompClient": "comp",
    "CompWorkload": "comp",
    "FedSpineClient": "fedspine",
    "FedSpineWorkload": "fedspine",
    "HatClient": "hat",
    "HatWorkload": "hat",
    "ImbNasClient": "imbnas",
    "ImbNasWorkload": "imbnas",
    "MergeSFLClient": "mergesfl",
    "Workload": "mergesfl",
}
__getattr__ = lazy_exports(__name__, {name: f"fl_edge.clients.{home}" for name, home in _HOMES.items()})
