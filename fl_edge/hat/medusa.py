"""Medusa's heads on the device, and the trees that they propose: the baseline U-Medusa.

Source: Medusa (arXiv 2401.10774): each head is a residual block with SiLU and an LM head of its own, on the full
model's last hidden state, and tells the token that is so many places further on. HAT's U-Medusa puts them into the
U-shaped split; its 591 and 760 million trained weights are those of four such heads. *Ours*: the heads stand on the
device behind the rows that the cloud answers, and share the sampler's noise with the full model, so that drawn text is
exact, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from fl_edge.errors import DataError
from fl_edge.hat.caches import keep_rows
from fl_edge.hat.fitted import fill_fitted, read_fitted, save_fitted
from fl_edge.hat.proposing import DevicePart, Proposal
from fl_edge.hat.sampling import Sampler
from fl_edge.hat.split import DeviceModel
from fl_edge.hat.trees import best_tree

HEADS = 4  # by the number of weights that HAT states
RANKS = 10  # of a head's tokens that a tree may take: Medusa's trees have no more
_WHAT = "a set of Medusa heads"


class MedusaHeads(nn.Module):
    """Heads 1, 2, ..: normed last hidden states in, logits of the tokens after the next out.

    Parameters
    ----------
    width, vocabulary
        d and v, of the model.
    heads
        How many.

    Attributes
    ----------
    accuracies
        (heads, ranks): of the tokens of a text, the share that a head finds, by rank; from these trees are made. See
        :func:`fl_edge.hat.medusa_training.measure`.
    """

    accuracies: Tensor

    def __init__(self, width: int, vocabulary: int, heads: int = HEADS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(heads))
        self.heads = nn.ModuleList(nn.Linear(width, vocabulary, bias=False) for _ in range(heads))
        self.register_buffer("accuracies", torch.zeros(heads, min(RANKS, vocabulary)))

    def __len__(self) -> int:
        return len(self.heads)

    def logits(self, head: int, features: Tensor) -> Tensor:
        """Return (..., v) of one head, counted from 0, for features (..., d)."""
        found: Tensor = self.heads[head](features + silu(self.blocks[head](features)))
        return found

    def forward(self, features: Tensor) -> Tensor:
        """Return (heads, ..., v) for features (..., d)."""
        return torch.stack([self.logits(head, features) for head in range(len(self))])


def new_heads(device: DeviceModel, heads: int = HEADS) -> MedusaHeads:
    """Return heads to be trained, in float32, where the device model is: each begins as the model's own head (Medusa).

    Parameters
    ----------
    device
        The model that they are for.
    heads
        How many.
    """
    vocabulary, width = device.lm_head.weight.shape
    made = MedusaHeads(width, vocabulary, heads)
    with torch.no_grad():
        for block, head in zip(made.blocks, made.heads, strict=True):
            for parameter in block.parameters():
                parameter.zero_()
            head.get_parameter("weight").copy_(device.lm_head.weight)
    return made.to(device.device)


def save_heads(heads: MedusaHeads, device: DeviceModel, file: Path) -> None:
    """Write heads and what they fit; see :func:`~fl_edge.hat.fitted.save_fitted`."""
    save_fitted(heads, device, file)


def load_heads(file: Path, device: DeviceModel) -> MedusaHeads:
    """Return heads to draft with: frozen, where the device model is and of its type.

    Raises
    ------
    DataError
        No heads there, damaged ones, or ones for another model or another cut of it.
    """
    tensors = read_fitted(file, device, _WHAT)
    count = len(tensors.get("accuracies", ()))
    if not count:
        raise DataError(f"{file} does not hold the tensors of {_WHAT} of {device.identity['family']}")
    vocabulary, width = device.lm_head.weight.shape
    heads = MedusaHeads(width, vocabulary, count)
    fill_fitted(heads, tensors, device, file, _WHAT)
    return heads


class MedusaTrees:
    """A :class:`~fl_edge.hat.proposing.Proposer`: the tree of Medusa's heads that most is expected of.

    Parameters
    ----------
    model
        The device's part.
    heads
        With their measured accuracies.
    sampler
        That of the generation.
    rows
        Of a tree, the newest token's own among them.
    """

    def __init__(self, model: DevicePart, heads: MedusaHeads, sampler: Sampler, rows: int) -> None:
        self._model, self._heads, self._sampler = model, heads, sampler
        self._tree = best_tree(heads.accuracies.tolist(), rows)
        self._cache = model.new_cache()
        self._held: Sequence[int] = ()
        self._last: Tensor | None = None  # the cloud's row (1, d) of the last token that holds

    def read(self, tokens: Tensor) -> Tensor:
        """Take in a piece of the text (n,) and return its shallow states (n, d)."""
        return self._model.embed_and_run(tokens[None], self._cache)[0]

    def restore(self, tokens: Sequence[int], parents: tuple[int, ...] | None) -> None:
        """Take in what another process has proposed."""
        self._run(tokens, parents)

    def look_ahead(self, most: int, ready: Callable[[], bool]) -> int:  # noqa: ARG002 - the protocol's
        """Do nothing: without the cloud's answer the heads have nothing to stand on."""
        return 0

    def take_in(self, rows: Tensor, held: Sequence[int], following: int) -> bool:  # noqa: ARG002 - the protocol's
        """Remember what holds, and the full model's state there."""
        self._held, self._last = held, rows[held[-1]][None]
        return False

    @torch.no_grad()
    def propose(self, newest: int, base: int, most: int) -> Proposal:
        """Return the newest token with the tree that the heads put behind it."""
        assert self._last is not None, "nothing was answered yet"
        keep_rows(self._cache, base - len(self._held), self._held)
        tree = self._tree.cut(most)
        logits = self._heads(self._model.norm(self._last))[:, 0]
        places = range(base + 1, base + 1 + len(self._heads))
        found = self._sampler.scores(logits, places).topk(self._heads.accuracies.shape[1]).indices.tolist()
        drafts = zip(tree.depths[1:], tree.ranks[1:], strict=True)
        tokens = (newest, *(found[depth - 1][rank] for depth, rank in drafts))
        return Proposal(tokens, self._run(tokens, tree.parents), tree.parents)

    def _run(self, tokens: Sequence[int], parents: tuple[int, ...] | None) -> Tensor:
        line = torch.tensor([tokens], device=self._model.device)
        return self._model.embed_and_run(line, self._cache, parents)[0]
