"""Structured pruning of Hugging Face transformers: prunable units, plans of what stays, and physical slicing."""

from fl_edge.pruning.costs import Costs, count_costs, count_lora, sparsity
from fl_edge.pruning.loading import load_pruned, read_plan
from fl_edge.pruning.plan import LayerPlan, PruningPlan, Unit
from fl_edge.pruning.saving import save_pruned
from fl_edge.pruning.shards import ShardWriter
from fl_edge.pruning.slicing import prune
from fl_edge.pruning.units import Member, full_plan, kept_indices, members, plain, unit_params

__all__ = [
    "Costs",
    "LayerPlan",
    "Member",
    "PruningPlan",
    "ShardWriter",
    "Unit",
    "count_costs",
    "count_lora",
    "full_plan",
    "kept_indices",
    "load_pruned",
    "members",
    "plain",
    "prune",
    "read_plan",
    "save_pruned",
    "sparsity",
    "unit_params",
]
