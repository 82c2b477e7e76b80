"""Server side of Flower: strategies."""

from typing import TYPE_CHECKING

from fl_edge.lazy import lazy_exports

if TYPE_CHECKING:
    from fl_edge.strategies.fedspine import FedSpine
    from fl_edge.strategies.mergesfl import MergeSFL

__all__ = ["FedSpine", "MergeSFL"]
__getattr__ = lazy_exports(
    __name__, {"FedSpine": "fl_edge.strategies.fedspine", "MergeSFL": "fl_edge.strategies.mergesfl"}
)
