"""Settings of COMP. The paper's text could not be had: its order of steps is known second-hand, every number is ours.

Source: COMP (arXiv 2501.15255), its abstract and notes on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fl_edge.config import setting


@dataclass
class CompConfig:
    """Which layers go, which neurons go in those that stay, and how what stays is tuned."""

    ratio: float = setting(0.2, "part of the decoder layers' parameters to remove", low=0.0, high=0.95)

    # layers
    layer_share: float = setting(0.0, "c: part of the ratio that whole layers take, rounded down", low=0.0, high=1.0)
    layer_rule: str = setting(
        "similarity", "layers matter by how far they turn the hidden states, or by the loss when they are skipped",
        choices=("similarity", "loss"),
    )  # fmt: skip
    similarity: str = setting(
        "mean", "of the tokens' cosines, or the ratio of summed products and norms", choices=("mean", "ratio")
    )
    iterative_layers: bool = setting(False, "measure again after each removed layer")
    protect_first: int = setting(2, "layers at the start that are never removed", low=0)
    protect_last: int = setting(1, "layers at the end that are never removed", low=0)
    repair: bool = setting(False, "after a removed layer, make up for the growth that it gave the hidden states")

    # what each of the layers that stay loses
    allocation: str = setting(
        "curves", "as much as turns the hidden states least, all layers' heads and channels compared, or by a ratio "
        "that follows the layer's importance",
        choices=("curves", "importance"),
    )  # fmt: skip
    alpha: float = setting(1.0, "of allocation=importance: how strongly ratios follow it; 0: all the same", low=0.0)
    max_layer_ratio: float = setting(
        0.95, "largest part of a layer's heads, and of its channels, that may go", low=0.0, high=0.99
    )
    prune_attention: bool = setting(True, "heads go too; else channels alone")

    # neurons
    score: str = setting(
        "conditioning", "neurons matter by the error that is left when the others are tuned again, by the output's "
        "sensitivity to them, or by a perturbation bound",
        choices=("conditioning", "sensitivity", "perturbation"),
    )  # fmt: skip
    restore: str = setting(
        "weights", "what makes up for removed neurons: a factor for each that stays, all their weights, or nothing",
        choices=("mask", "weights", "none"),
    )  # fmt: skip
    target: str = setting(
        "stream", "output to come close to: the layer's own on the same input, the dense model's, or the dense model's "
        "hidden states after it",
        choices=("own", "dense", "stream"),
    )  # fmt: skip
    bias: bool = setting(False, "a bias makes up for the mean of what is gone")
    damping: float = setting(1e-3, "lambda: pull to the unpruned values, as a part of the mean diagonal", low=1e-9)
    steps: int = setting(10, "K: steps in which a layer's neurons go", low=1)
    max_variance: float = setting(0.5, "tau: a step after which the mask varies more is undone", low=0.0)
    block: int = setting(2048, "neurons whose least-squares system is solved at once", low=16)


_LAYER_SHARE = 0.25


def faithful(config: CompConfig) -> CompConfig:
    """Return the configuration with nothing in it that goes beyond what is known of the paper's method.

    Layers by cosine similarity, then neurons by a score of conditioning, in steps, with a mask tuned under a guard.
    What the paper leaves open, such as the share of the layers, is as everywhere *ours*.
    """
    return replace(
        config,
        layer_share=_LAYER_SHARE,
        layer_rule="similarity",
        iterative_layers=False,
        repair=False,
        prune_attention=True,
        restore="mask",
        bias=False,
    )
