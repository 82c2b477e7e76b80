"""Grids that carry Flower messages, and how tensors are packed into them."""

from typing import TYPE_CHECKING

from fl_edge.lazy import lazy_exports

if TYPE_CHECKING:
    from fl_edge.link.faults import Fault, random_faults
    from fl_edge.link.local import LocalGrid

__all__ = ["Fault", "LocalGrid", "random_faults"]
__getattr__ = lazy_exports(
    __name__,
    {
        "Fault": "fl_edge.link.faults",
        "LocalGrid": "fl_edge.link.local",
        "random_faults": "fl_edge.link.faults",
    },
)
