"""Structured pruning of Hugging Face transformers: prunable units, plans of what stays, and physical slicing."""

from fl_edge.pruning.plan import LayerPlan, PruningPlan, Unit
from fl_edge.pruning.slicing import prune
from fl_edge.pruning.units import Member, full_plan, kept_indices, members, plain, unit_params

__all__ = [
    "LayerPlan",
    "Member",
    "PruningPlan",
    "Unit",
    "full_plan",
    "kept_indices",
    "members",
    "plain",
    "prune",
    "unit_params",
]
