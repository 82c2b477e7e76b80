"""Settings of IMB-NAS: what could be read of the papers and of the methods they build on, and our own choices.

Sources: IMB-NAS (arXiv 2210.00136) and its restatement (arXiv 2406.16972), of which only abstracts and reviews could be
read; the released code of LDAM-DRW (Cao et al., NeurIPS 2019) and of Single Path One-Shot (Guo et al., ECCV 2020).
*Ours* marks what none of them states.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fl_edge.config import setting

PROFILES = ("exponential", "step", "natural")
LOSSES = ("ce", "drw", "cb", "ldam", "ldam_drw", "balanced_softmax", "focal")


@dataclass
class TailConfig:
    """How a long-tailed task is made of an image set, and how its classes are grouped in a report."""

    profile: str = setting(
        "exponential",
        "sizes of the classes: falling exponentially, the second half small, or as the set has them (ours)",
        choices=PROFILES,
    )
    ratio: float = setting(100.0, "rho: images of the largest class for one of the smallest", low=1.0)
    validation_per_class: int = setting(
        10, "images of every class that are held out for the search before the tail is cut (5 to 10: ours)", low=0
    )
    validation_ratio: float = setting(
        2.0, "a validation split that comes with the data may be so unequal, largest to smallest class (ours)", low=1.0
    )
    many: float = setting(100.0, "classes of more training images are many-shot", low=0.0)
    few: float = setting(20.0, "classes of fewer training images are few-shot", low=0.0)
    group_scale: int = setting(
        0,
        "many and few are meant for a largest class of so many images and shrink with it; 0: they stay as they are "
        "(ours; 500 gives CIFAR-100's shares to a small set)",
        low=0,
    )

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        if self.few > self.many:
            return f"few={self.few} is above many={self.many}"
        return None


@dataclass
class LossConfig:
    """Losses for long-tailed classification. Defaults are those of LDAM-DRW's released code where it has one."""

    beta: float = setting(0.9999, "of the effective number; 0: equal weights, 1: inverse frequency", low=0.0, high=1.0)
    drw_start: float = setting(
        0.8, "share of the training after which deferred re-weighting begins (160 of 200 epochs)", low=0.0, high=1.0
    )
    margin: float = setting(0.5, "LDAM's largest margin, that of the smallest class", low=0.0)
    scale: float = setting(30.0, "s: LDAM multiplies cosines by it", low=1e-6)
    gamma: float = setting(2.0, "exponent of the focal loss (Lin et al., ICCV 2017)", low=0.0)


@dataclass
class SearchConfig:
    """Evolution and its peers. Sizes are the specification's for two cores (ours); SPOS has 50, 10, 20, 25 and 25."""

    population: int = setting(16, "architectures of a generation, and of a batch of random search", low=1)
    top: int = setting(5, "the best so many have children", low=1)
    generations: int = setting(5, "generations behind the first population", low=0)
    mutants: int = setting(6, "children of a generation by mutation", low=0)
    crosses: int = setting(6, "children of a generation by crossover", low=0)
    mutation: float = setting(0.1, "probability that a gene is drawn anew", low=0.0, high=1.0)
    tries: int = setting(10, "tries for every wanted child", low=1)

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        if self.mutants + self.crosses > self.population:
            return f"mutants={self.mutants} and crosses={self.crosses} are more than population={self.population}"
        return None


@dataclass
class HeadConfig:
    """Heads on a trained backbone: one for all paths by SGD (specification, section 6), or one for each (ours)."""

    epochs: int = setting(20, "epochs of the shared head, in 10 to 30", low=1)
    batch_size: int = setting(128, "images of a step, of one random path", low=1)
    learning_rate: float = setting(0.1, "of the shared head at the start, cosine to 0", low=0.0)
    momentum: float = setting(0.9, "of SGD", low=0.0, high=1.0)
    weight_decay: float = setting(5e-4, "of the shared head", low=0.0)
    backbone_rate: float = setting(
        0.1, "where the backbone is tuned as well (P2), its learning rate by so much", low=0.0
    )
    ridge: float = setting(1e-3, "of a candidate's own head, on standardised features (ours)", low=1e-9)
    iterations: int = setting(200, "steps of L-BFGS at most (ours)", low=1)
    tolerance: float = setting(1e-5, "L-BFGS ends where no slope is steeper (ours)", low=0.0)


@dataclass
class SuperConfig:
    """Training of a super-network. SPOS: 0.5 linearly to 0 at batch 1024, weight decay 4e-5; values here are ours."""

    epochs: int = setting(120, "passes over the images (digits: ranks are still better than at 60)", low=1)
    batch_size: int = setting(
        64, "images a step, at most; an epoch's batches are of equal size, one more or less", low=1
    )
    learning_rate: float = setting(0.1, "of the first step; cosine to 0", low=0.0)
    momentum: float = setting(0.9, "of SGD", low=0.0, high=1.0)
    weight_decay: float = setting(5e-4, "of all weights that the step has gradients for", low=0.0)
    sampling: str = setting(
        "uniform",
        "one random path a step (SPOS), or as many on one batch as a block has options, each of them once (FairNAS)",
        choices=("uniform", "fair"),
    )
    crop_padding: int = setting(0, "random crops of images padded by so many pixels; 4 for CIFAR", low=0)
    flip: bool = setting(False, "random horizontal flips")


@dataclass
class BatchNormConfig:
    """Re-estimation of a path's BatchNorm statistics, from target training images."""

    images: int = setting(256, "how many images (SPOS: up to 200 batches)", low=1)
    batch_size: int = setting(256, "images in one forward pass", low=1)
    layerwise: bool = setting(
        True, "pool one norm after another, exactly (ours), or normalise every batch by itself and pool once (SPOS)"
    )


@dataclass
class AdaptConfig:
    """Everything that adapting a super-network to a target and scoring its paths takes."""

    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    scratch: SuperConfig = field(default_factory=SuperConfig)
    batchnorm: BatchNormConfig = field(default_factory=BatchNormConfig)


@dataclass
class RetrainConfig:
    """Training of one architecture from scratch: LDAM-DRW's trainer (specification, section 4), epochs as shares."""

    epochs: int = setting(200, "passes over the training images", low=1)
    batch_size: int = setting(128, "images a step", low=2)
    learning_rate: float = setting(0.1, "of SGD, behind the warm-up", low=0.0)
    momentum: float = setting(0.9, "of SGD", low=0.0, high=1.0)
    weight_decay: float = setting(2e-4, "of all weights", low=0.0)
    warmup: float = setting(0.025, "share of the training in which the rate rises linearly (5 of 200 epochs)", low=0.0)
    first_drop: float = setting(0.8, "share after which the rate is dropped (160 of 200 epochs)", low=0.0, high=1.0)
    first_factor: float = setting(0.01, "of the rate from then on", low=0.0, high=1.0)
    second_drop: float = setting(0.9, "share after which it is dropped again (180 of 200 epochs)", low=0.0, high=1.0)
    second_factor: float = setting(1e-4, "of the rate from then on", low=0.0, high=1.0)
    crop_padding: int = setting(4, "random crops of images padded by so many pixels; 4 for 32x32", low=0)
    flip: bool = setting(True, "random horizontal flips; not for digits")

    def contradictions(self) -> str | None:
        """Return what cannot hold together, or nothing."""
        if not self.warmup <= self.first_drop <= self.second_drop:
            return f"warmup={self.warmup}, first_drop={self.first_drop}, second_drop={self.second_drop} must not fall"
        return None

    def learning_rate_at(self, progress: float) -> float:
        """Return the rate when a share of the training, in [0, 1), is done."""
        if progress >= self.second_drop:
            return self.learning_rate * self.second_factor
        if progress >= self.first_drop:
            return self.learning_rate * self.first_factor
        return self.learning_rate * min(1.0, progress / self.warmup) if self.warmup else self.learning_rate


@dataclass
class FederatedConfig:
    """IMB-NAS over devices (ours: the papers know none). Rounds share out the epochs of the central trainings."""

    procedure: str = setting(
        "own",
        "heads on the frozen super-network: one for each candidate, fitted to sums over devices, or one for all, by "
        "federated averaging, re-weighted late (P1) or not (P1-CE)",
        choices=("own", "P1", "P1-CE"),
    )
    head_rounds: int = setting(10, "rounds that share out head.epochs", low=1)
    final_loss: str = setting("balanced_softmax", "loss of the final training", choices=LOSSES)
    final_rounds: int = setting(40, "rounds that share out final.epochs; 0: it ends with the search", low=0)
    compare: bool = setting(
        True, "also search without adaptation (P0), and train its choice and a small ResNet in the same final rounds"
    )
    limit: int = setting(0, "most multiply-adds of an architecture; 0: no limit", low=0)
    fewest: int = setting(1, "devices that must be left for the search to go on", low=1)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batchnorm: BatchNormConfig = field(default_factory=BatchNormConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    final: RetrainConfig = field(default_factory=RetrainConfig)
