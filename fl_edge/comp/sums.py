"""What a device tells of a dense layer: sums over its tokens, in as few numbers as a decision needs.

Of the Gram matrix X^T X only a triangle. Of X^T Y* only what does not follow from it: with E = Y* - X W^T, what the
weights fall short of the wanted output, nothing where that is the layer's own; where a mask is tuned, the n numbers
<(X^T E)_i, w_i>; all of X^T E only where whole weights are. E is the smaller the less went before, and rounding it to
float32 moves an ill-conditioned solution less than rounding Y*. That such sums of devices add up to those of their
texts together is plain algebra; what to send is *ours*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fl_edge.comp.config import CompConfig
from fl_edge.comp.statistics import Statistics

Form = Literal["own", "mask", "weights"]
_EXACT = 4096  # inputs up to which the matrices are made in float64, as on the device


def form_of(config: CompConfig) -> Form:
    """Return what of the statistics a configuration's decisions depend on."""
    if config.target == "own":
        return "own"
    return "weights" if config.restore == "weights" else "mask"


@dataclass(frozen=True, eq=False)
class Sums:
    """Statistics of a layer on their way; those of two texts add up.

    Attributes
    ----------
    tokens
        T.
    tensors
        ``gram`` (n (n + 1) / 2,), lower triangle of X^T X row by row; ``inputs`` (n,) column sums of X. But for the own
        output, ``targets`` (o,) column sums of Y* and ``energy`` (1,) ||Y*||_F^2; for a mask ``matched`` (n,)
        <(X^T E)_i, w_i>, for weights ``cross`` (n, o) X^T E.
    """

    tokens: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, statistics: Statistics, weight: Tensor, form: Form) -> Sums:
        """Return what is to be sent of some statistics; ``weight`` (o, n) of the layer as it was then."""
        gram = statistics.gram
        rows, columns = torch.tril_indices(len(gram), len(gram), device=gram.device)
        tensors = {"gram": gram[rows, columns], "inputs": statistics.inputs}
        if form != "own":
            tensors["targets"] = statistics.targets
            tensors["energy"] = statistics.targets.new_tensor([statistics.energy])
            w = weight.to(gram)
            short = statistics.cross - gram @ w.T
            tensors |= {"matched": (short * w.T).sum(1)} if form == "mask" else {"cross": short}
        return cls(statistics.tokens, tensors)

    def __add__(self, other: Sums) -> Sums:
        """Return the sums of both texts."""
        together = {name: tensor + other.tensors[name] for name, tensor in self.tensors.items()}
        return Sums(self.tokens + other.tokens, together)

    def expand(self, weight: Tensor, bias: Tensor | None) -> Statistics:
        """Return the statistics of a layer, on its device.

        Where X^T Y* did not travel as a whole, it is one that gives the same mask, errors and bias.

        Parameters
        ----------
        weight, bias
            (o, n) and (o,), or None, of the layer as it was when the sums were made.
        """
        size = weight.shape[1]
        exact = torch.float64 if size <= _EXACT else torch.float32
        there = {name: tensor.to(weight.device, exact) for name, tensor in self.tensors.items()}
        rows, columns = torch.tril_indices(size, size, device=weight.device)
        gram = there["gram"].new_empty(size, size)
        gram[rows, columns] = there["gram"]
        gram[columns, rows] = there["gram"]
        w, inputs = weight.to(exact), there["inputs"]
        cross = gram @ w.T
        if "targets" not in there:
            b = w.new_zeros(len(w)) if bias is None else bias.to(exact)
            plain = w @ inputs
            energy = float((cross * w.T).sum() + b @ (2 * plain + self.tokens * b))
            return Statistics(
                self.tokens, gram, cross + torch.outer(inputs, b), inputs, plain + self.tokens * b, energy
            )
        cross += there["cross"] if "cross" in there else _along(there["matched"], w)
        return Statistics(self.tokens, gram, cross, inputs, there["targets"], float(there["energy"]))


def _along(matched: Tensor, weight: Tensor) -> Tensor:
    """Return (n, o) rows along the columns of a weight that have given inner products with them."""
    lengths = weight.square().sum(0).clamp_min(torch.finfo(weight.dtype).tiny)
    return (matched / lengths)[:, None] * weight.T
