"""Server side of Flower: strategies."""

from typing import TYPE_CHECKING

from fl_edge.lazy import lazy_exports

if TYPE_CHECKING:
    from fl_edge.strategies.comp import Comp
    from fl_edge.strategies.fedspine import FedSpine
    from fl_edge.strategies.hat import Hat
    from fl_edge.strategies.hat_training import HatTraining
    from fl_edge.strategies.imbnas import ImbNas
    from fl_edge.strategies.mergesfl import MergeSFL

__all__ = ["Comp", "FedSpine", "Hat", "HatTraining", "ImbNas", "MergeSFL"]
_HOMES = {
    "Comp": "comp",
    "FedSpine": "fedspine",
    "Hat": "hat",
    "HatTraining": "hat_training",
    "ImbNas": "imbnas",
    "MergeSFL": "mergesfl",
}
__getattr__ = lazy_exports(__name__, {name: f"fl_edge.strategies.{home}" for name, home in _HOMES.items()})
