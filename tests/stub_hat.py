"""A language model whose every draft is right or wrong, sure or unsure, as a test says, and a cloud that keeps count.

The next token follows from all tokens before it, so a cache that was not rolled back, or a branch that was mixed up
with another, gives another text. A hidden state is (next token, position of the next token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from fl_edge.hat.admission import check_place
from fl_edge.hat.attention import Span
from fl_edge.hat.messages import Answer, Upload
from fl_edge.hat.trees import depths

CPU = torch.device("cpu")
VOCABULARY = 11
LARGE = 50.0  # a logit that leaves nothing to the others


def following(prefix: Sequence[int]) -> int:
    """The token that the full model chooses after others."""
    return (sum((place + 3) * token for place, token in enumerate(prefix)) * 5 + len(prefix)) % VOCABULARY


def text_after(prompt: Sequence[int], count: int) -> list[int]:
    """What greedy decoding of the whole model gives."""
    text = list(prompt)
    for _ in range(count):
        text.append(following(text))
    return text[len(prompt) :]


def lines(parents: Sequence[int]) -> list[list[bool]]:
    """For each row of a tree which of the rows it follows, itself among them."""
    found: list[list[bool]] = []
    for row, parent in enumerate(parents):
        found.append(list(found[parent]) if parent >= 0 else [False] * len(parents))
        found[-1][row] = True
    return found


@dataclass(frozen=True)
class Draft:
    """What the adapter says of one position."""

    right: bool = True
    sure: bool = True


@dataclass
class StubDevice:
    """Input and output submodel; ``drafts`` is what the adapter says of each position, by turns."""

    drafts: Sequence[Draft] = (Draft(),)
    device: torch.device = CPU
    dtype: torch.dtype = torch.float64
    steps: int = 0  # calls, one token each and more

    def new_cache(self) -> DynamicCache:
        return DynamicCache()

    def embed_and_run(self, tokens: Tensor, cache: DynamicCache, parents: Sequence[int] | None = None) -> Tensor:
        self.steps += 1
        before, count = cache.get_seq_length(), tokens.shape[1]
        kept = tokens[:, None, :, None].double()
        cache.update(kept, kept, 0)
        tree = range(-1, count - 1) if parents is None else parents
        before -= len(tree) - count
        rows = []
        for sequence in cache.layers[0].keys[:, 0, :, 0].long().tolist():  # type: ignore[index,union-attr]
            own = [[at for at, there in enumerate(line) if there] for line in lines(tree)[-count:]]
            texts = [sequence[:before] + [sequence[before + at] for at in line] for line in own]
            rows.append([[float(following(text)), float(len(text))] for text in texts])
        return torch.tensor(rows, dtype=torch.float64)

    def norm(self, rows: Tensor) -> Tensor:
        return rows

    def head(self, rows: Tensor) -> Tensor:
        return LARGE * torch.nn.functional.one_hot(rows[..., 0].long(), VOCABULARY).double()

    def draft_head(self, features: Tensor) -> Tensor:
        says = [self.drafts[place % len(self.drafts)] for place in features[..., 1].long().flatten().tolist()]
        right = features[..., 0].long().flatten()
        first = torch.tensor([int(token) + (not each.right) for token, each in zip(right, says, strict=True)])
        scale = torch.tensor([LARGE if each.sure else 0.1 for each in says])[:, None]
        logits = torch.nn.functional.one_hot(first % VOCABULARY, VOCABULARY).double() * scale
        logits += 0.01 * torch.nn.functional.one_hot(right, VOCABULARY)  # a wrong guess has the right one after it
        return logits.view(*features.shape[:-1], VOCABULARY)


class StubAdapter:
    """Hands states on, and sees to it that none is left out or comes twice."""

    def new_cache(self) -> DynamicCache:
        return DynamicCache()

    def __call__(self, states: Tensor, cache: DynamicCache, parents: Sequence[int] | None = None) -> Tensor:
        before, count = cache.get_seq_length(), states.shape[1]
        places = torch.arange(before + 1, before + 1 + count)
        if parents is not None:
            places = before + 1 - (len(parents) - count) + torch.tensor(depths(parents)[-count:])
        assert (states[..., -1] == places).all()
        cache.update(states[:, None], states[:, None], 0)
        return states


@dataclass
class StubLink:
    """A cloud behind no network: what it was sent, and whether an answer is there when it is asked."""

    ready_at: Sequence[bool] = (False,)
    uploads: list[Upload] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    _cached: list[list[float]] = field(default_factory=list)  # rows of the request
    _span: Span | None = None
    _asked: int = 0
    _answer: Tensor | None = None

    def send(self, upload: Upload) -> None:
        assert self._answer is None, "the answer before was not taken"
        check_place(upload, self._span, (), 999)
        if upload.kept is not None:
            assert self._span is not None
            sent = self._cached[self._span.base :]
            self._cached[self._span.base :] = [sent[row] for row in upload.kept]
        self._span = Span(0, upload.base, len(upload.rows), upload.parents)
        line = depths(range(-1, len(upload.rows) - 1) if upload.parents is None else upload.parents)
        assert upload.rows[:, 1].tolist() == [upload.base + 1 + depth for depth in line]
        self._cached[upload.base :] = upload.rows.tolist()
        self.uploads.append(upload)
        if upload.last:
            self._answer = upload.rows if upload.verify else upload.rows[-1:]

    def ready(self) -> bool:
        self._asked += 1
        return self.ready_at[self._asked % len(self.ready_at)]

    def receive(self) -> Answer:
        assert self._answer is not None, "nothing was asked"
        rows, self._answer = self._answer, None
        return Answer(self.uploads[-1].request, rows)

    def holds(self, text: Sequence[int]) -> None:
        """See that all that is cached before the last upload is of this text."""
        assert self._span is not None
        assert self._cached[: self._span.base] == [
            [float(following(text[:end])), float(end)] for end in range(1, self._span.base + 1)
        ]

    def end(self, request: int) -> None:
        self.ended.append(request)
