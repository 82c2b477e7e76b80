"""Search: what is proposed, what is never proposed, and that it finds what is there to be found."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.config import check
from fl_edge.errors import ConfigError, TrainingError
from fl_edge.imbnas.config import SearchConfig
from fl_edge.imbnas.search import (
    History,
    Scored,
    best_so_far,
    evolve,
    exhaustive,
    propose_evolution,
    random_search,
    ranked,
    run,
    winner,
)
from fl_edge.imbnas.space import Architecture, Limit, Space, Stage, cifar_space, digits_space

seeds = st.integers(0, 2**32 - 1)
DIGITS, CIFAR = digits_space(), cifar_space()
SHAPE, CIFAR_SHAPE = (1, 8, 8), (3, 32, 32)
SMALL = Space(2, (Stage(2, 1, 1), Stage(4, 2, 2)), ("conv3", "sep3", "identity"))


def bumpy(space: Space, seed: int) -> Callable[[Architecture], float]:
    """Return a score that is a sum over blocks, with noise by architecture."""
    rng = np.random.default_rng(seed)
    worth = [rng.normal(size=len(options)) for options in space.choices]

    def score(architecture: Architecture) -> float:
        noise = np.random.default_rng([seed, *architecture]).normal() * 0.05
        return float(sum(values[one] for values, one in zip(worth, architecture, strict=True)) + noise)

    return score


def limit_of(space: Space, shape: tuple[int, int, int], share: float) -> Limit:
    """Return a limit between the cheapest and the dearest architecture."""
    ends = []
    for pick in (min, max):
        genes = []
        for block, options in enumerate(space.choices):
            here = [tuple(i if b == block else 0 for b in range(len(space.choices))) for i in range(len(options))]
            costs = [space.cost(one, shape) for one in here]
            genes.append(costs.index(pick(costs)))
        ends.append(space.cost(tuple(genes), shape))
    return Limit(int(ends[0] + share * (ends[1] - ends[0])), shape)


class Witness:
    """A score that notes whom it was asked for."""

    def __init__(self, score: Callable[[Architecture], float]) -> None:
        self.score = score
        self.asked: list[Architecture] = []

    def __call__(self, architecture: Architecture) -> float:
        self.asked.append(architecture)
        return self.score(architecture)


@given(
    seed=seeds,
    share=st.floats(0, 1),
    population=st.integers(1, 20),
    generations=st.integers(0, 6),
    top=st.integers(1, 30),
    mutation=st.floats(0, 1),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_evolution_scores_nothing_twice_and_nothing_above_the_limit(
    seed: int, share: float, population: int, generations: int, top: int, mutation: float, data: st.DataObject
) -> None:
    space, shape = data.draw(st.sampled_from([(DIGITS, SHAPE), (SMALL, SHAPE), (CIFAR, CIFAR_SHAPE)]))
    mutants = data.draw(st.integers(0, population))
    config = SearchConfig(population, top, generations, mutants, population - mutants, mutation)
    limit = limit_of(space, shape, share)
    score = Witness(bumpy(space, seed))
    history = evolve(space, score, config, seed, limit)
    assert len(set(score.asked)) == len(score.asked)
    assert all(space.cost(architecture, shape) <= limit.multiply_adds for architecture in score.asked)
    assert all(space.check(architecture) == architecture for architecture in score.asked)
    assert [entry.architecture for entry in history] == score.asked
    assert all(entry.score == score.score(entry.architecture) for entry in history)
    sizes = [sum(entry.generation == g for entry in history) for g in range(generations + 1)]
    allowed = space.size if space is CIFAR else sum(limit.allows(space, one) for one in space.all())
    assert sum(sizes) == min(allowed, population * (generations + 1)) or space is CIFAR
    assert max(sizes) <= population


@given(seed=seeds, share=st.floats(0, 1), budget=st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_random_search_has_its_budget_or_all_there_is(seed: int, share: float, budget: int) -> None:
    limit = limit_of(DIGITS, SHAPE, share)
    score = Witness(bumpy(DIGITS, seed))
    history = random_search(DIGITS, score, SearchConfig(), seed, budget, limit)
    allowed = {one for one in DIGITS.all() if limit.allows(DIGITS, one)}
    assert len(score.asked) == len(set(score.asked)) == len(history) == min(budget, len(allowed))
    assert set(score.asked) <= allowed


def test_random_search_draws_every_architecture_equally_often() -> None:
    found = [random_search(SMALL, lambda _: 0.0, SearchConfig(), seed, 1)[0].architecture for seed in range(4000)]
    counts = np.array([found.count(one) for one in SMALL.all()])
    expected = 4000 / SMALL.size
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < SMALL.size - 1 + 4 * np.sqrt(2 * SMALL.size)


def test_exhaustive_search_finds_the_best_within_the_limit() -> None:
    score, limit = bumpy(DIGITS, 3), limit_of(DIGITS, SHAPE, 0.4)
    history = exhaustive(DIGITS, score, SearchConfig(), limit)
    allowed = [one for one in DIGITS.all() if limit.allows(DIGITS, one)]
    assert [entry.architecture for entry in history] == allowed
    assert 1 < len(allowed) < DIGITS.size
    assert winner(history).architecture == max(allowed, key=score)


def test_evolution_beats_random_search_at_the_same_budget_in_a_large_space() -> None:
    gains = []
    for seed in range(8):
        score = bumpy(CIFAR, seed)
        history = evolve(CIFAR, score, SearchConfig(), seed)
        drawn = random_search(CIFAR, score, SearchConfig(), seed, len(history))
        assert len(drawn) == len(history) == 96
        gains.append(winner(history).score - winner(drawn).score)
    assert min(np.mean(gains), np.median(gains)) > 0


def test_search_avoids_a_useless_option() -> None:
    """The zero block lets nothing through: its score is chance, whatever stands in the other blocks (test 9)."""
    space = Space(16, (Stage(16, 3, 1), Stage(32, 3, 2), Stage(64, 3, 2)), ("conv3", "sep3", "sep5", "zero"))
    zero = [options.index("zero") for options in space.choices]

    def score(architecture: Architecture) -> float:
        dead = any(one == useless for one, useless in zip(architecture, zero, strict=True))
        return 0.1 if dead else 0.5 + bumpy(space, 1)(architecture) / 100

    history = evolve(space, score, SearchConfig(), seed=5)
    alive = [entry.score > 0.1 for entry in history]
    first = [entry.score > 0.1 for entry in history if entry.generation == 0]
    last = [entry.score > 0.1 for entry in history if entry.generation == 5]
    assert any(alive)
    assert np.mean(last) > np.mean(first)
    assert winner(history).score > 0.1


def test_children_resemble_the_best() -> None:
    """Without mutation and random ones, every gene of a child is one of the parents' genes in that block."""
    config = replace(SearchConfig(), population=12, top=2, generations=1, mutants=0, crosses=12)
    history = evolve(CIFAR, bumpy(CIFAR, 0), config, seed=0)
    parents = [entry.architecture for entry in ranked([e for e in history if e.generation == 0])[:2]]
    genes = [set(block) for block in zip(*parents, strict=True)]
    crossed = [e.architecture for e in history if e.generation == 1][: 2 ** sum(len(g) > 1 for g in genes) - 2]
    children = [one for one in crossed if all(gene in block for gene, block in zip(one, genes, strict=True))]
    assert len(children) >= 10  # the rest fills up what ten tries a child did not find


def test_mutation_draws_a_tenth_of_the_genes_anew() -> None:
    config = SearchConfig(population=400, top=1, generations=1, mutants=400, crosses=0, mutation=0.1, tries=1)
    history = evolve(CIFAR, bumpy(CIFAR, 0), config, seed=0)
    parent = winner([e for e in history if e.generation == 0]).architecture
    distances = [
        sum(one != two for one, two in zip(e.architecture, parent, strict=True)) for e in history if e.generation == 1
    ]
    near = [distance for distance in distances if distance <= 3]
    # of 400 tries 1 - (1 - 0.1 * 3 / 4)^9 change something; most of these are one of 27 neighbours, each let in once
    assert 30 <= len(near) <= 140
    assert distances.count(1) >= 20


def test_a_search_that_is_answered_from_elsewhere_is_the_same() -> None:
    score = bumpy(DIGITS, 7)
    search = propose_evolution(DIGITS, SearchConfig(), seed=11)
    wanted = next(search)
    history: History = ()
    while not history:
        answers = {architecture: score(architecture) for architecture in reversed(wanted)}  # in any order
        try:
            wanted = search.send([answers[architecture] for architecture in wanted])
        except StopIteration as end:
            history = end.value
    assert history == evolve(DIGITS, score, SearchConfig(), 11)
    assert history != evolve(DIGITS, score, SearchConfig(), 12)


def test_of_equal_scores_the_first_counts() -> None:
    history = evolve(DIGITS, lambda _: 0.5, SearchConfig(), 0)
    assert winner(history) == ranked(history)[0] == history[0]
    entries = [Scored((0,), 1.0, 0), Scored((1,), 3.0, 0), Scored((2,), 2.0, 0), Scored((3,), 3.0, 0)]
    assert [entry.architecture for entry in ranked(entries)] == [(1,), (3,), (2,), (0,)]
    assert best_so_far(entries) == [1.0, 3.0, 3.0, 3.0]


def test_an_impossible_limit_is_one_line_with_the_cheapest_cost() -> None:
    limit = Limit(10, SHAPE)
    searches: list[Callable[[], History]] = [
        lambda: evolve(DIGITS, lambda _: 0.0, SearchConfig(), 0, limit),
        lambda: random_search(DIGITS, lambda _: 0.0, SearchConfig(), 0, 5, limit),
        lambda: exhaustive(DIGITS, lambda _: 0.0, SearchConfig(), limit),
    ]
    cheapest = min(DIGITS.cost(one, SHAPE) for one in DIGITS.all())
    for search in searches:
        with pytest.raises(ConfigError, match=str(cheapest)) as caught:
            search()
        assert "\n" not in str(caught.value)


def test_a_score_that_is_no_number_ends_the_search() -> None:
    scores = itertools.chain([0.5] * 3, itertools.repeat(float("nan")))
    with pytest.raises(TrainingError, match="nan, not a finite number"):
        evolve(DIGITS, lambda _: next(scores), SearchConfig(), 0)


def test_a_space_too_large_to_list_is_searched_as_well() -> None:
    space = Space(4, (Stage(4, 12, 1),), ("conv3", "sep3", "sep5", "identity"))
    assert space.size > 2**20
    limit = limit_of(space, SHAPE, 0.3)
    history = run(propose_evolution(space, SearchConfig(), 0, limit), bumpy(space, 0))
    assert len({entry.architecture for entry in history}) == len(history) == 96
    assert all(limit.allows(space, entry.architecture) for entry in history)


def test_more_children_than_places_contradict() -> None:
    with pytest.raises(ConfigError, match="more than population=10"):
        check(SearchConfig(population=10))
