"""Draft trees: what each row follows, and which trees are worth their rows.

A tree is the number of the row that each row follows, smaller than its own; row 0 is the newest token of the text and
follows -1. Source: Medusa (arXiv 2401.10774) for trees that are built of measured accuracies, node by node.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def depths(parents: Sequence[int]) -> list[int]:
    """Return for each row how many rows it follows, directly or not."""
    found: list[int] = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return found


def tree_attention(
    config: Any, parents: Sequence[int], count: int, before: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return positions and masks with which a model of transformers runs the newest rows of a tree.

    Parameters
    ----------
    config
        Of the model, for its windows.
    parents
        As in the module's text, of all r rows of the tree.
    count
        n, how many of them are run; the others are in the cache already.
    before
        Tokens in the cache before the tree.

    Returns
    -------
    dict
        ``position_ids`` (1, n), and ``attention_mask`` (1, 1, n, before + r), 0 or -inf, by kind of layer where the
        model has several.
    """
    rows, first = len(parents), len(parents) - count
    own = torch.zeros(count, rows, dtype=torch.bool)
    for place in range(count):
        row = first + place
        while row >= 0:
            own[place, row] = True
            row = parents[row]
    seen = torch.cat((own.new_ones(count, before), own), 1)
    depth = before + torch.tensor(depths(parents))
    positions = torch.cat((torch.arange(before), depth))
    near = depth[first:, None] - positions

    def mask(window: int | None) -> Tensor:
        visible = seen if window is None else seen & (near < window)
        return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)[None, None].to(device)

    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    masks: Any = {"full_attention": mask(None), "sliding_attention": mask(window)} if kinds else mask(window)
    return {"position_ids": depth[None, first:].to(device), "attention_mask": masks}


@dataclass(frozen=True)
class Tree:
    """The shape of a draft tree.

    Attributes
    ----------
    parents
        As in the module's text.
    ranks
        For each row the rank of its token among those that its depth's head finds likely, 0 for the likeliest; of row 0
        it means nothing.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def depths(self) -> list[int]:
        """For each row how many rows it follows."""
        return depths(self.parents)

    def cut(self, most: int) -> Tree:
        """Return the tree without rows that are deeper than ``most``."""
        kept = [row for row, depth in enumerate(self.depths) if depth <= most]
        new = {row: place for place, row in enumerate(kept)} | {-1: -1}
        return Tree(tuple(new[self.parents[row]] for row in kept), tuple(self.ranks[row] for row in kept))


def best_tree(accuracies: Sequence[Sequence[float]], rows: int) -> Tree:
    """Return the tree of so many rows that most drafts of are expected to hold (Medusa).

    A node's chance is the product of the accuracies on its way from the root, as if these were independent. Chances
    fall along each way, so the likeliest nodes form a tree, and are found one after another.

    Parameters
    ----------
    accuracies
        For each depth from 1 on, and each rank, the share of tokens of which the head finds this one; falling by rank.
    rows
        At least 1, the newest token's own among them; there may be fewer than so many nodes.
    """
    parents, ranks = [-1], [0]
    waiting: list[tuple[float, int, int, int]] = []  # -chance, depth, parent, rank

    def offer(chance: float, depth: int, parent: int) -> None:
        if depth <= len(accuracies):
            for rank, accuracy in enumerate(accuracies[depth - 1]):
                if accuracy > 0:
                    heapq.heappush(waiting, (-chance * accuracy, depth, parent, rank))

    offer(1.0, 1, 0)
    while waiting and len(parents) < rows:
        chance, depth, parent, rank = heapq.heappop(waiting)
        parents.append(parent)
        ranks.append(rank)
        offer(-chance, depth + 1, len(parents) - 1)
    return Tree(tuple(parents), tuple(ranks))
