"""Client side of Flower: one thin module for each workload."""

from typing import TYPE_CHECKING

from fl_edge.lazy import lazy_exports

if TYPE_CHECKING:
    from fl_edge.clients.mergesfl import MergeSFLClient, Workload

__all__ = ["MergeSFLClient", "Workload"]
__getattr__ = lazy_exports(__name__, dict.fromkeys(__all__, "fl_edge.clients.mergesfl"))
