"""Settings of FedSpine. The paper's text could not be had: of what stands here only tau is known from it, second-hand.

Source: FedSpine (arXiv 2501.02438), its abstract and notes on it. Every other default is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from fl_edge.config import setting
from fl_edge.fedspine.aggregation import Rule
from fl_edge.fedspine.bandit import BanditConfig, Space
from fl_edge.fedspine.reward import RewardConfig
from fl_edge.fedspine.schedule import ScheduleConfig
from fl_edge.fedspine.selection import Guards
from fl_edge.fedspine.weighting import WeightRule


@dataclass
class FedSpineConfig:
    """Pruning, tuning, deciding and aggregating."""

    # tuning
    tau: int = setting(20, "iterations of a device between two aggregations", low=1)
    batch_size: int = setting(16, "samples of an iteration", low=1)
    learning_rate: float = setting(1e-3, "of AdamW in the first round", low=0.0)
    lr_decay: float = setting(0.97, "factor a round", low=0.0, high=1.0)
    weight_decay: float = setting(0.01, "of AdamW", low=0.0)
    clip_norm: float = setting(1.0, "gradients are cut to this length; 0: never", low=0.0)
    dropout: float = setting(0.05, "on the way into the LoRA factors", low=0.0, high=0.95)
    scale: float = setting(2.0, "s = alpha / r, the same for every rank", low=1e-3)
    probe_batches: int = setting(2, "batches on which a device measures its loss, the same in every round", low=1)

    # deciding
    ranks: str = setting("4 8 12 16 24 32", "LoRA ranks to choose from, ascending")
    choice: str = setting(
        "bandit", "who chooses ratio and rank: each device's bandit, or nobody (even steps, one rank)",
        choices=("bandit", "fixed"),
    )  # fmt: skip
    fixed_rank: int = setting(8, "with choice=fixed, the rank of every device", low=1)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    bandit: BanditConfig = field(default_factory=BanditConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    # pruning
    importance: str = setting(
        "consensus", "units go by their mean importance over devices, which nests the masks, or by each device's own",
        choices=("consensus", "own"),
    )  # fmt: skip
    smoothing: float = setting(0.9, "lambda: share of the past in a unit's importance (LoRAPrune)", low=0.0, high=1.0)
    normalise: bool = setting(True, "scores of each linear map are scaled to length 1 (LoRAPrune)")
    scope: str = setting(
        "layer", "every layer loses the same share (LoRAPrune), or units of all layers are compared",
        choices=("layer", "global"),
    )  # fmt: skip
    min_heads: int = setting(1, "heads that every layer keeps", low=1)
    min_channels: float = setting(0.1, "share of its FFN channels that every layer keeps", low=0.0, high=1.0)
    freeze_ends: bool = setting(False, "the first tenth of the layers and the last one are not pruned (LoRAPrune)")

    # aggregating
    aggregation: str = setting("flexlora", "see fl_edge.fedspine.aggregation", choices=get_args(Rule))
    weighting: str = setting("sparsity", "h_i, see fl_edge.fedspine.weighting", choices=get_args(WeightRule))

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        words = self.ranks.replace(",", " ").split()
        if not all(word.isdecimal() for word in words) or not self.rank_set or 0 in self.rank_set:
            return f"ranks={self.ranks} must be whole numbers of at least 1 with spaces between"
        if list(self.rank_set) != sorted(set(self.rank_set)):
            return f"ranks={self.ranks} must be ascending"
        if self.choice == "fixed" and self.fixed_rank > self.max_rank:
            return f"fixed_rank={self.fixed_rank} is above the largest of ranks={self.ranks}"
        return None

    @property
    def rank_set(self) -> tuple[int, ...]:
        """The ranks to choose from."""
        return tuple(int(word) for word in self.ranks.replace(",", " ").split() if word.isdecimal())

    @property
    def max_rank(self) -> int:
        """r_max: rank of the global factors."""
        return self.rank_set[-1]

    @property
    def space(self) -> Space:
        """What a bandit chooses from."""
        return Space(self.schedule.largest, self.rank_set)

    def guards(self, layers: int) -> Guards:
        """Return what pruning must leave in a model of so many layers."""
        frozen = frozenset({*range(-(-layers // 10)), layers - 1}) if self.freeze_ends else frozenset()
        return Guards(self.min_heads, self.min_channels, frozen)

    def learning_rate_at(self, server_round: int) -> float:
        """Return the learning rate of a round, counted from 1: geometric decay."""
        return self.learning_rate * self.lr_decay ** (server_round - 1)
