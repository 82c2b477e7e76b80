"""Tokens that are drawn: the target's distribution exactly, and the same tokens whatever was drafted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare  # type: ignore[import-untyped]
from torch import Tensor
from transformers import DynamicCache

from fl_edge.hat.chains import Chains
from fl_edge.hat.generation import Generation, Rules, generate
from fl_edge.hat.pace import FixedPace
from fl_edge.hat.sampling import Sampler
from fl_edge.hat.verification import accept
from fl_edge.seeding import torch_rng
from tests.stub_hat import StubAdapter, StubDevice, StubLink

LOGITS = torch.tensor([1.5, -0.5, 0.2, 0.9, -2.0], dtype=torch.float64)
MOST_UNLIKELY = 1e-4  # of a chi-square test that should pass


def likely(counts: Sequence[int], probabilities: Tensor) -> bool:
    expected = sum(counts) * probabilities / probabilities.sum()
    found = [(count, float(wanted)) for count, wanted in zip(counts, expected, strict=True) if wanted > 0]
    assert all(count == 0 for count, wanted in zip(counts, expected, strict=True) if wanted == 0)
    return len(found) == 1 or bool(chisquare(*map(list, zip(*found, strict=True))).pvalue > MOST_UNLIKELY)


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Top-p by its definition."""
    probabilities = torch.softmax(logits / temperature, -1)
    kept, total = torch.zeros_like(probabilities), 0.0
    for token in sorted(range(len(logits)), key=lambda each: -float(logits[each])):
        if total >= top_p and kept.any():
            break
        kept[token] = probabilities[token]
        total += float(probabilities[token])
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8), (0.7, 0.0)])
def test_tokens_have_the_probabilities_of_the_target(temperature: float, top_p: float) -> None:
    sampler, draws = Sampler(temperature, top_p, seed=3), 6000
    chosen = Counter(sampler.choose(LOGITS.expand(draws, -1), range(draws)))
    assert likely([chosen[token] for token in range(len(LOGITS))], nucleus(LOGITS, temperature, top_p))


def test_greedy_is_the_largest_logit() -> None:
    assert Sampler(top_p=0.1).choose(torch.stack([LOGITS, -LOGITS]), [4, 5]) == [0, 4]


def test_a_position_draws_the_same_in_any_order_and_type_of_call() -> None:
    logits = torch.randn(100, 20, generator=torch_rng(0, "logits"), dtype=torch.float64)
    at_once = Sampler(1.0, seed=5).choose(logits, range(100))
    one_by_one = Sampler(1.0, seed=5)
    backwards = [one_by_one.choose(logits[place, None], [place])[0] for place in reversed(range(100))]
    assert backwards[::-1] == at_once
    assert Sampler(1.0, seed=5).choose(logits.float(), range(100)) == at_once
    assert Sampler(1.0, seed=6).choose(logits, range(100)) != at_once


def test_confidence_is_the_largest_probability_of_what_is_drawn_from() -> None:
    whole = torch.softmax(LOGITS, -1)
    assert float(Sampler().confidence(LOGITS[None])) == pytest.approx(float(whole.max()))
    narrow = nucleus(LOGITS, 0.5, 0.7)
    assert float(Sampler(0.5, 0.7).confidence(LOGITS[None])) == pytest.approx(float(narrow.max()))


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_draft_and_target_agree_as_often_as_the_coupling_promises(spread: float) -> None:
    other = LOGITS + spread * torch.randn(5, generator=torch_rng(1, "draft"), dtype=torch.float64)
    draws = 4000
    drafted = Sampler(1.0, seed=2).choose(other.expand(draws, -1), range(draws))
    target = Sampler(1.0, seed=2).choose(LOGITS.expand(draws, -1), range(draws))
    agreed = sum(map(int.__eq__, drafted, target)) / draws
    variation = float((torch.softmax(LOGITS, -1) - torch.softmax(other, -1)).abs().sum()) / 2
    slack = 3 * math.sqrt(0.25 / draws)
    assert (1 - variation) / (1 + variation) - slack <= agreed <= 1 - variation + slack


class RandomDevice(StubDevice):
    """Logits that are drawn for each text; the adapter's are near them."""

    def __init__(self, spread: float = 1.0) -> None:
        super().__init__()
        self.spread = spread

    def embed_and_run(self, tokens: Tensor, cache: DynamicCache, parents: Sequence[int] | None = None) -> Tensor:
        states = super().embed_and_run(tokens, cache, parents)
        texts = cache.layers[0].keys[:, 0, :, 0].long().tolist()  # type: ignore[index,union-attr]
        ends = states[..., 1].long().tolist()
        drawn = [[logits_after(tuple(text[:end])) for end in row] for text, row in zip(texts, ends, strict=True)]
        return torch.cat([torch.stack([torch.stack(row) for row in drawn]), states[..., 1:]], -1)

    def head(self, rows: Tensor) -> Tensor:
        return rows[..., :-1]

    def draft_head(self, features: Tensor) -> Tensor:
        return features[..., :-1] + self.spread * torch.sin(7 * features[..., :-1])


@cache
def logits_after(text: tuple[int, ...]) -> Tensor:
    return torch.randn(4, generator=torch_rng(0, *text), dtype=torch.float64)


class RandomLink(StubLink):
    def send(self, upload: object) -> None:
        self.uploads.append(upload)  # type: ignore[arg-type]
        self._answer = upload.rows if upload.verify else upload.rows[-1:]  # type: ignore[attr-defined]


def sample(seed: int, most: int, guesses: int, new_tokens: int = 3, spread: float = 1.0) -> tuple[int, ...]:
    device, sampler = RandomDevice(spread), Sampler(1.3, 0.9, seed)
    pace = FixedPace(most_drafts=most, threshold=0.4)
    proposer = Chains(device, StubAdapter(), sampler, pace, guesses)
    generation = Generation(device, proposer, sampler, pace, Rules(new_tokens, 32), 0, torch.tensor([2, 1]))
    return tuple(token for each in generate(generation, RandomLink()) for token in each.tokens)


@given(
    seed=st.integers(0, 10**6), most=st.integers(1, 5), guesses=st.integers(0, 3), spread=st.sampled_from([0.0, 1.0])
)
@settings(max_examples=40, deadline=None)
def test_what_is_sampled_does_not_depend_on_drafts(seed: int, most: int, guesses: int, spread: float) -> None:
    assert sample(seed, most, guesses, 12, spread) == sample(seed, 0, 0, 12)


@pytest.mark.parametrize(("most", "guesses"), [(3, 0), (3, 2)])
def test_sampled_texts_have_the_probabilities_of_the_target(most: int, guesses: int) -> None:
    counts = Counter(sample(seed, most, guesses, 2) for seed in range(1500))
    pairs = [(first, second) for first in range(4) for second in range(4)]
    first = nucleus(logits_after((2, 1)), 1.3, 0.9)
    expected = [first[a] * nucleus(logits_after((2, 1, a)), 1.3, 0.9)[b] for a, b in pairs]
    assert likely([counts[pair] for pair in pairs], torch.stack(expected))


def test_a_chain_is_accepted_up_to_its_first_mismatch() -> None:
    assert accept([9, 1, 2, 3], [-1, 0, 1, 2], [1, 2, 3, 4]) == [0, 1, 2, 3]
    assert accept([9, 1, 2, 3], [-1, 0, 1, 2], [1, 5, 3, 4]) == [0, 1]
    assert accept([9, 1, 2, 3], [-1, 0, 1, 2], [8, 2, 3, 4]) == [0]


def test_of_a_tree_one_path_is_accepted() -> None:
    tokens, parents = [9, 1, 2, 3, 4], [-1, 0, 0, 1, 2]
    assert accept(tokens, parents, [2, 3, 4, 0, 7]) == [0, 2, 4]
    assert accept(tokens, parents, [1, 3, 4, 0, 7]) == [0, 1, 3]
    assert accept(tokens, parents, [1, 4, 4, 0, 7]) == [0, 1]  # 4 follows 2 here, not 1
