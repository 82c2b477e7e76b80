"""The methods that :mod:`benchmarks.comp` compares COMP with, each with the variants that it is tuned over.

A variant is called with a model, calibration sequences (s, n) int64 and the share of the blocks' prunable parameters
that must go, and returns a physically pruned copy whose size is as asked within 1 %. Nothing is fine-tuned. The
benchmark tries all variants of a peer on validation text and reports the test text's figure for the best one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from benchmarks.comp_peers_depgraph import INSTALL, DepGraph
from benchmarks.comp_peers_flap import Flap
from benchmarks.comp_peers_layers import LayerDrop
from benchmarks.comp_peers_scores import Magnitude, WandaSp
from benchmarks.comp_peers_taylor import Taylor

PruneCopy = Callable[[nn.Module, Tensor, float], nn.Module]

# The first variant of each is what its source does.
PEERS: Mapping[str, Mapping[str, PruneCopy]] = {
    "magnitude": {
        "columns": Magnitude(),
        "columns, heads to the nearest": Magnitude(heads="nearest"),
        "columns, MLP only": Magnitude(heads="none"),
        "columns, across layers": Magnitude(across_layers=True),
        "groups": Magnitude(group=True),
        "groups, MLP only": Magnitude(group=True, heads="none"),
        "groups, across layers": Magnitude(group=True, across_layers=True),
    },
    "Wanda-sp": {
        "sequential": WandaSp(),
        "sequential, heads to the nearest": WandaSp(heads="nearest"),
        "sequential, MLP only": WandaSp(heads="none"),
        "dense": WandaSp(sequential=False),
        "dense, across layers": WandaSp(sequential=False, across_layers=True),
        "dense, across layers, MLP only": WandaSp(sequential=False, across_layers=True, heads="none"),
    },
    "FLAP": {
        "WIFV, AL-AM": Flap(),
        "WIFV, AL-MM": Flap(heads="floor"),
        "WIFV, AL-MM, heads to the nearest": Flap(heads="nearest"),
        "WIFV, AL, MLP only": Flap(heads="none"),
        "WIFV, UL-UM": Flap(across_layers=False, heads="floor"),
        "WIFV, UL, MLP only": Flap(across_layers=False, heads="none"),
        "WIFN, AL-AM": Flap(metric="WIFN"),
        "WIFN, UL-UM": Flap(metric="WIFN", across_layers=False, heads="floor"),
        "IFV, AL-AM": Flap(metric="IFV"),
    },
    "layer drop": {
        "influence": LayerDrop(),
        "influence, measured again": LayerDrop(choice="again"),
        "stretch": LayerDrop(choice="stretch"),
        "influence, rest spread": LayerDrop(spread=True, heads="floor"),
        "influence, rest spread, MLP only": LayerDrop(spread=True, heads="none"),
    },
    "LLM-Pruner": {
        "param_first, 10 x 64": Taylor(examples=10, length=64),
        "param_first": Taylor(),
        "param_first, unprotected": Taylor(protect=0),
        "param_first, unprotected, MLP only": Taylor(protect=0, heads="none"),
        "vectorize": Taylor(order="vectorize"),
        "vectorize, unprotected": Taylor(order="vectorize", protect=0),
        "param_mix, unprotected": Taylor(order="param_mix", protect=0),
        "param_second, unprotected": Taylor(order="param_second", protect=0),
        "param_first, across layers": Taylor(protect=0, across_layers=True, heads="pooled"),
        "param_first, across layers per parameter": Taylor(
            protect=0, across_layers=True, heads="pooled", per_parameter=True
        ),
        "param_first, across layers per parameter, 5 steps": Taylor(
            protect=0, across_layers=True, heads="pooled", per_parameter=True, steps=5
        ),
        "vectorize, across layers per parameter, 5 steps": Taylor(
            "vectorize", protect=0, across_layers=True, heads="pooled", per_parameter=True, steps=5
        ),
    },
    "Torch-Pruning": {
        "magnitude": DepGraph("magnitude"),
        "magnitude, MLP only": DepGraph("magnitude", heads="none"),
        "magnitude, global": DepGraph("magnitude", across_layers=True),
        "Taylor": DepGraph("taylor"),
        "Taylor, MLP only": DepGraph("taylor", heads="none"),
        "Taylor, global": DepGraph("taylor", across_layers=True),
        "Taylor, global, MLP only": DepGraph("taylor", across_layers=True, heads="none"),
        "Taylor, global, not normalised": DepGraph("taylor", across_layers=True, normalizer=None),
        "Taylor, global, not normalised, MLP only": DepGraph("taylor", True, "none", normalizer=None),
    },
}


def missing(peer: str) -> str:
    """Return the command that installs what a peer needs and is not there, else nothing."""
    return INSTALL if peer == "Torch-Pruning" and importlib.util.find_spec("torch_pruning") is None else ""
