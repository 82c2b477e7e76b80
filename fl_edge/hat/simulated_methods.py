"""The methods that are compared on the virtual clock: HAT with its parts, and the baselines of its paper."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fl_edge.hat.scheduling import Limits

BUDGET = 512  # tokens a batch (ours)
TREE_ROWS = 5  # of U-Medusa's verification (ours)


@dataclass(frozen=True)
class Method:
    """What a device and the cloud do.

    Attributes
    ----------
    name
        As in the paper.
    chunks
        Rule of the prompt's chunks, see :data:`fl_edge.hat.chunking.RULES`.
    drafts
        Speculative decoding with the adapter (SD).
    ahead
        Parallel drafting while the cloud verifies (PD).
    tree_rows
        Rows of a tree of Medusa's heads; 0: no such heads.
    limits
        Of the cloud's batches.
    """

    name: str
    chunks: str = "none"
    drafts: bool = False
    ahead: bool = False
    tree_rows: int = 0
    limits: Limits = field(default_factory=Limits)


U_SHAPE = Method("U-shape")
U_MEDUSA = Method("U-Medusa", tree_rows=TREE_ROWS)
U_SARATHI = Method("U-Sarathi", limits=Limits(BUDGET))
HAT = Method("HAT", chunks="r1", drafts=True, ahead=True, limits=Limits(BUDGET))
PC = replace(HAT, name="PC", drafts=False, ahead=False)
SD = replace(U_SHAPE, name="SD", drafts=True)
SD_PC = replace(HAT, name="SD+PC", ahead=False)
METHODS = (HAT, U_SARATHI, U_MEDUSA, U_SHAPE)
ABLATION = (U_SHAPE, PC, SD, SD_PC, HAT)
