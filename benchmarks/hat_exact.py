"""Exactness, of :mod:`benchmarks.hat`: the split model's text against ``generate`` of the unsplit one, token for token.

Modes are chains of drafts, with and without chunks and look-ahead, trees of Medusa's heads, and HAT+, whose trees grow
while they pay.

In float64, where sums in another order do not decide which token is largest. A case in float32 says how often they do
there, and by how much the two tokens' logits differ where they did.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.hat_heads import heads_for
from benchmarks.hat_models import FAMILIES, adapter_for, device_model, middle_model, prompts, whole_model
from benchmarks.hat_rooms import CAPACITY, accept_length, greedy, make_cloud, serve
from fl_edge.hat.config import HatConfig
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.session import DeviceSession

PROMPTS, TOKENS, QUICK_PROMPTS, QUICK_TOKENS = 20, 128, 3, 24
SHORTEST, LONGEST = 24, 200  # tokens of a prompt
BUDGET = Limits(tokens=64)  # so small that prompts and verifications of all devices share many batches
WHOLE = HatConfig(chunking="none", guesses=0)
CHUNKS = HatConfig(shortest_chunk=16, longest_chunk=16, guesses=0)
MODES: Mapping[str, HatConfig] = {
    "no drafts": replace(WHOLE, max_drafts=0),
    "no drafts, chunks": replace(CHUNKS, max_drafts=0),
    "drafts": WHOLE,
    "drafts, chunks": CHUNKS,
    "every draft": replace(WHOLE, threshold=0.0),
    "parallel drafts, chunks": replace(CHUNKS, guesses=2),
    "every draft, parallel": replace(WHOLE, threshold=0.0, guesses=4),
    "HAT+": replace(WHOLE, adaptive=True),
    "HAT+, chunks": replace(CHUNKS, adaptive=True, draft_width=3),
    "U-Medusa, trees": replace(WHOLE, tree_rows=9),
    "U-Medusa, trees, chunks": replace(CHUNKS, tree_rows=16),
}
_HEADS = "U-Medusa"  # what modes of Medusa's heads begin with; the others have the adapter
SINGLE = "parallel drafts, chunks"  # the mode that is run in float32, too


def exact_case(family: str, mode: str) -> str:
    """Return what the table calls a comparison."""
    return f"exact: {family}, {mode}"


def single_case(family: str) -> str:
    """Return what the table calls a comparison in float32."""
    return f"float32: {family}, {SINGLE}"


def measure_exact(family: str, mode: str, quick: bool) -> dict[str, Any]:
    """Return shares of tokens that are identical in float64, with each prompt alone and with all at once."""
    asked, expected = _asked(family, quick), _expected(family, quick, torch.float64)
    (alone, _), (together, accepted) = (
        _texts(family, mode, quick, torch.float64, asked, each) for each in (False, True)
    )
    tokens = sum(map(len, expected))
    return {
        "tokens": tokens,
        "alone": _same(alone, expected) / tokens,
        "together": _same(together, expected) / tokens,
        "texts": sum(found == wanted for found, wanted in zip([*alone, *together], expected * 2, strict=True)),
        "accept_length": accepted,
    }


def measure_single(family: str, quick: bool) -> dict[str, Any]:
    """Return the share of identical texts in float32, and the widest gap of logits where one goes another way."""
    asked, expected = _asked(family, quick), _expected(family, quick, torch.float32)
    found, _ = _texts(family, SINGLE, quick, torch.float32, asked, together=True)
    whole = _whole(family, quick, torch.float64)
    gaps = [
        _gap(whole, prompt, ours, theirs)
        for prompt, ours, theirs in zip(asked, found, expected, strict=True)
        if ours != theirs
    ]
    return {"tokens": sum(map(len, expected)), "same_texts": 1 - len(gaps) / len(asked), "gap": max(gaps, default=0.0)}


def _asked(family: str, quick: bool) -> list[Tensor]:
    return prompts(QUICK_PROMPTS if quick else PROMPTS, SHORTEST, LONGEST, seed=list(FAMILIES).index(family))


def _new(quick: bool) -> int:
    return QUICK_TOKENS if quick else TOKENS


@functools.lru_cache(1)
def _whole(family: str, quick: bool, dtype: torch.dtype) -> Any:
    return whole_model(family, quick, dtype)


@functools.cache
def _expected(family: str, quick: bool, dtype: torch.dtype) -> list[list[int]]:
    whole = _whole(family, quick, dtype)
    return [greedy(whole, prompt, _new(quick)) for prompt in _asked(family, quick)]


def _texts(
    family: str, mode: str, quick: bool, dtype: torch.dtype, asked: Sequence[Tensor], together: bool
) -> tuple[list[list[int]], float]:
    """Return each prompt's text, and the accept length."""
    device = device_model(family, quick, dtype)
    drafter = (heads_for if mode.startswith(_HEADS) else adapter_for)(family, device, quick)
    cloud = make_cloud(middle_model(family, quick, dtype), len(asked), BUDGET if together else None)
    found: list[list[int]] = [[] for _ in asked]

    def session() -> DeviceSession:
        config = replace(MODES[mode], new_tokens=_new(quick))
        return DeviceSession(device, drafter, config, CAPACITY, 0, (), lambda at, new: found[at].extend(new))

    jobs = list(enumerate(asked))
    if together:
        accounts = serve(cloud, [session() for _ in asked], [[job] for job in jobs])
    else:
        accounts = serve(cloud, [session()], [jobs])
    return found, accept_length(accounts)


def _same(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> int:
    """Return how many tokens stand at the same place in both; each of ``wanted`` that is missing is another one."""
    pairs = (pair for mine, their in zip(found, wanted, strict=True) for pair in zip(mine, their, strict=False))
    return sum(ours == theirs for ours, theirs in pairs)


@torch.no_grad()
def _gap(whole: Any, prompt: Tensor, ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Return by how much two tokens' logits differ in the unsplit model, where two texts part."""
    place = next(place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    text = torch.cat([prompt, prompt.new_tensor(ours[:place])])
    logits = whole(input_ids=text[None], use_cache=False).logits[0, -1]
    return float((logits[ours[place]] - logits[theirs[place]]).abs())
