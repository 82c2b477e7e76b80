"""Server side of Flower: strategies."""

from typing import TYPE_CHECKING

from fl_edge.lazy import lazy_exports

if TYPE_CHECKING:
    from fl_edge.strategies.mergesfl import MergeSFL

__all__ = ["MergeSFL"]
__getattr__ = lazy_exports(__name__, {"MergeSFL": "fl_edge.strategies.mergesfl"})
