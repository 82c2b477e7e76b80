"""Settings of MergeSFL: what the paper names, and each choice of ours that the paper leaves open.

Source: MergeSFL (ICDE 2024, arXiv 2311.13348). *Ours* marks what the paper and its released code do not state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fl_edge.config import setting


@dataclass
class MergeSFLConfig:
    """Training and control module of MergeSFL. Defaults are the released code's where it has one."""

    # training module
    tau: int = setting(42, "iterations a round, between two aggregations of the bottoms", low=1)
    batch_size: int = setting(64, "D: the largest batch, that of the fastest worker", low=1)
    learning_rate: float = setting(0.1, "of the first round", low=0.0)
    lr_decay: float = setting(0.993, "factor a round", low=0.0, high=1.0)
    lr_floor: float = setting(0.005, "the learning rate never falls below", low=0.0)
    scale: str = setting(
        "batch", "bottom learning rate: eta * d_i / D (ours for the normaliser), or eta", choices=("batch", "none")
    )
    aggregation: str = setting(
        "batch", "bottoms weighted by batch size (eq. 17), or their plain mean", choices=("batch", "uniform")
    )
    lost: str = setting(
        "drop",
        "a worker lost inside a round: go on without it (ours), or no top update in that iteration",
        choices=("drop", "abort"),
    )

    # control module
    batches: str = setting("regulated", "batch sizes by eq. 9, or D for every worker", choices=("regulated", "equal"))
    selection: str = setting(
        "genetic", "who takes part (greedy, all: ours)", choices=("genetic", "greedy", "random", "all")
    )
    ingress_batches: float = setting(
        10.0, "B^h: the server takes so many full batches of features an iteration (ours)", low=0.0
    )
    min_workers: int = setting(1, "smallest cohort (ours)", low=1)
    max_workers: int = setting(0, "largest cohort, 0 for no limit (ours)", low=0)
    smoothing: float = setting(0.8, "a: weight of the past in the state estimates (eqs. 5-6)", low=0.0, high=1.0)
    unselected: str = setting(
        "keep", "workers left out keep their estimate, or are asked again every round (ours)", choices=("keep", "probe")
    )
    kl_target: float = setting(0.05, "epsilon: batches are tuned when KL is above it", low=0.0)
    tuning: str = setting(
        "greedy", "solver of eq. 14: one sample at a time, the dual, or none (ours)", choices=("greedy", "dual", "none")
    )
    fill: bool = setting(True, "scale the batches up to the server's budget")
    memory_batch: int = setting(0, "no batch ever grows beyond so many samples; 0 for 2 D (ours)", low=0)

    # genetic algorithm (operators are ours: the paper does not publish them)
    population: int = setting(20, "individuals", low=2)
    generations: int = setting(20, "generations", low=0)
    tournament: int = setting(3, "individuals a tournament", low=1)
    mutation: float = setting(0.05, "probability that a bit flips", low=0.0, high=1.0)
    greedy_seed: bool = setting(True, "the first population holds the greedy cohort")
    polish: bool = setting(True, "the best individual is improved by swaps of workers")

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        if self.max_workers and self.max_workers < self.min_workers:
            return f"max_workers={self.max_workers} is below min_workers={self.min_workers}"
        if self.batch_size * self.ingress_batches < self.min_workers:
            return f"ingress_batches={self.ingress_batches} leaves no room for {self.min_workers} workers of one sample"
        if self.lr_floor > self.learning_rate:
            return f"lr_floor={self.lr_floor} is above learning_rate={self.learning_rate}"
        return None

    @property
    def ingress_samples(self) -> int:
        """B^h / c: samples of features that the server takes in one iteration."""
        return int(self.batch_size * self.ingress_batches)

    @property
    def largest_batch(self) -> int:
        """Memory cap of one worker's batch, in samples."""
        return self.memory_batch or 2 * self.batch_size

    def learning_rate_at(self, server_round: int) -> float:
        """Return eta of a round, counted from 1: geometric decay with a floor (released code)."""
        return max(self.learning_rate * self.lr_decay ** (server_round - 1), self.lr_floor)


def released(config: MergeSFLConfig) -> MergeSFLConfig:
    """Return the authors' released variant: random cohort, equal batches, plain mean, no learning-rate scaling.

    Their code has the training module only; the control module of the paper is switched off, and with it what we added.
    """
    return replace(
        config,
        selection="random",
        batches="equal",
        aggregation="uniform",
        scale="none",
        tuning="none",
        fill=False,
        min_workers=1,
    )
