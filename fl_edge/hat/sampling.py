"""Which token comes next, such that drafts change how fast it is known and never which it is.

Greedy decoding takes the largest logit. With a temperature the token is drawn by Gumbel's trick: the largest of logit
and noise, and the noise depends on (seed, position) alone. Draft and target use the same noise, so they agree often,
and what is accepted is always the token that the full model draws: exact sampling, with one rule for both modes, and
the same text whatever was drafted, however long an answer took. Acceptance is at least (1 - t) / (1 + t) for a total
variation t between draft and target, where the usual accept-or-redraw rule has 1 - t.

HAT does not say how it samples; the coupling is *ours*, after Daliri, Musco and Suresh 2024 (arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fl_edge.seeding import torch_rng

_NOISES = 64  # positions whose noise is kept: drafts and their verification share it


@dataclass
class Sampler:
    """Chooses tokens for one generation.

    Attributes
    ----------
    temperature
        0: the largest logit.
    top_p
        Only the likeliest tokens whose probabilities reach this sum, at least one, are drawn.
    seed
        Of this generation; the noise of a position follows from it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    _noises: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def scores(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        """Return what is largest for the token that is chosen.

        Parameters
        ----------
        logits
            (n, v).
        positions
            n places in the text, of the tokens to choose.

        Returns
        -------
        Tensor
            (n, v) float32 or wider.
        """
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if self.temperature == 0:
            return logits
        return self._filtered(logits) + torch.stack([self._noise(place, logits) for place in positions])

    def choose(self, logits: Tensor, positions: Sequence[int]) -> list[int]:
        """Return the tokens for positions, from logits (n, v)."""
        chosen: list[int] = self.scores(logits, positions).argmax(-1).tolist()
        return chosen

    def confidence(self, logits: Tensor) -> Tensor:
        """Return the largest probability (n,) of what is drawn from, for logits (n, v); greedily, at temperature 1."""
        return torch.softmax(self._filtered(logits.float()), -1).amax(-1)

    def _filtered(self, logits: Tensor) -> Tensor:
        logits = logits / (self.temperature or 1.0)
        if self.temperature == 0 or self.top_p >= 1:
            return logits
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # what likelier tokens sum to
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
        dropped.scatter_(-1, order[..., :1], value=False)
        return logits.masked_fill(dropped, -torch.inf)

    def _noise(self, position: int, like: Tensor) -> Tensor:
        """Return the Gumbel noise (v,) of a position, drawn on the CPU: the same on every device."""
        if position not in self._noises:
            while len(self._noises) >= _NOISES:
                del self._noises[next(iter(self._noises))]
            drawn = torch.empty(like.shape[-1], dtype=torch.float64)
            drawn.exponential_(generator=torch_rng(self.seed, "token", position))
            self._noises[position] = -drawn.clamp_min_(torch.finfo(torch.float64).tiny).log_().to(like)
        return self._noises[position]
