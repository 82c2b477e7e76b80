"""Search in a space of architectures: evolution, random search, and all of it.

    a* = argmax_{a in A, cost(a) <= B} score(a)

Source: the operators of evolution are those of SPOS's released code, as section 7 of the specification has them.
*Ours*: that random architectures are drawn without replacement, so that in a space of a few hundred none is drawn in
vain; that of equal scores the first counts; the small default budget.

A search is a generator. It yields the architectures whose scores it wants and is sent their scores, so that the same
code runs over a function in this process (:func:`evolve`) and over devices that a server asks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite

import numpy as np

from fl_edge.errors import TrainingError
from fl_edge.imbnas.config import SearchConfig
from fl_edge.imbnas.space import Architecture, Limit, Space, random
from fl_edge.seeding import numpy_rng

_LISTED = 2**20  # spaces up to this size are shuffled whole: 8 bytes an architecture


@dataclass(frozen=True)
class Scored:
    """An architecture, its score, and the generation that proposed it (0 is the first population)."""

    architecture: Architecture
    score: float
    generation: int


History = tuple[Scored, ...]
Search = Generator[list[Architecture], Sequence[float], History]
Score = Callable[[Architecture], float]


def propose_evolution(space: Space, config: SearchConfig, seed: int, limit: Limit | None = None) -> Search:
    """Yield one population after another, each built on the scores of those before (specification, section 7).

    A generation has ``config.mutants`` children by mutation and ``config.crosses`` by crossover of the ``config.top``
    best so far, and is filled up to ``config.population`` with random architectures. None is proposed twice, none costs
    more than the limit. The search ends early where the space has nothing new.

    Parameters
    ----------
    config
        Sizes of the population and of its parts.
    seed
        Of the experiment.
    limit
        The most that an architecture may cost, checked before it is proposed.

    Returns
    -------
    History
        Every scored architecture, in the order of the proposals.

    Raises
    ------
    ConfigError
        A limit below the cheapest architecture.
    TrainingError
        A score that is not a finite number.
    """
    history: list[Scored] = []
    novelty = _Novelty(space, limit)
    untried = _shuffled(space, numpy_rng(seed, "search", "untried"), limit)
    for generation in range(config.generations + 1):
        rng = numpy_rng(seed, "search", generation)
        parents = [entry.architecture for entry in ranked(history)[: config.top]]
        children: list[Architecture] = []
        if parents:
            mutants = (_mutate(space, parents, config, rng) for _ in range(config.tries * config.mutants))
            children += novelty.take(mutants, config.mutants)
            crosses = (_cross(parents, rng) for _ in range(config.tries * config.crosses))
            children += novelty.take(crosses, config.crosses)
        children += novelty.take(untried, config.population - len(children))
        if not children:
            break
        scores = yield children
        history += _recorded(children, scores, generation)
    return tuple(history)


def propose_random(space: Space, config: SearchConfig, seed: int, budget: int, limit: Limit | None = None) -> Search:
    """Yield ``budget`` random architectures within the limit, or all there are, ``config.population`` at a time.

    Uniform, without replacement: the peer of :func:`propose_evolution` at as many scored candidates. Raises as it does.
    """
    architectures = _shuffled(space, numpy_rng(seed, "search", "random"), limit)
    return (yield from _in_order(architectures, space, config, limit, budget))


def propose_all(space: Space, config: SearchConfig, limit: Limit | None = None) -> Search:
    """Yield every architecture within the limit, in lexical order, ``config.population`` at a time.

    Raises as :func:`propose_evolution` does.
    """
    return (yield from _in_order(space.all(), space, config, limit, space.size))


def run(search: Search, score: Score) -> History:
    """Answer a search with a function until it ends, and return what it scored. Raises as the search does."""
    try:
        wanted = next(search)
        while True:
            wanted = search.send([score(architecture) for architecture in wanted])
    except StopIteration as end:
        history: History = end.value
        return history


def evolve(space: Space, score: Score, config: SearchConfig, seed: int, limit: Limit | None = None) -> History:
    """Run :func:`propose_evolution` over a function."""
    return run(propose_evolution(space, config, seed, limit), score)


def random_search(
    space: Space, score: Score, config: SearchConfig, seed: int, budget: int, limit: Limit | None = None
) -> History:
    """Run :func:`propose_random` over a function."""
    return run(propose_random(space, config, seed, budget, limit), score)


def exhaustive(space: Space, score: Score, config: SearchConfig, limit: Limit | None = None) -> History:
    """Run :func:`propose_all` over a function."""
    return run(propose_all(space, config, limit), score)


def ranked(history: Sequence[Scored]) -> list[Scored]:
    """Return the entries by falling score; of equal ones, the one scored first comes first."""
    return sorted(history, key=lambda entry: -entry.score)  # sorted() is stable


def winner(history: Sequence[Scored]) -> Scored:
    """Return the first of :func:`ranked`; the history must not be empty."""
    return max(history, key=lambda entry: entry.score)  # max() keeps the first of equals


def best_so_far(history: Sequence[Scored]) -> list[float]:
    """Return the best score after 1, 2, ... scored architectures, as long as the history."""
    return list(accumulate((entry.score for entry in history), max))


class _Novelty:
    """Lets an architecture pass once, and only if it is cheap enough."""

    def __init__(self, space: Space, limit: Limit | None) -> None:
        self._space, self._limit = space, limit
        self._seen: set[Architecture] = set()

    def take(self, source: Iterator[Architecture], count: int) -> list[Architecture]:
        """Return the next ``count`` that pass, fewer where the source ends."""
        chosen: list[Architecture] = []
        while len(chosen) < count and (architecture := next(source, None)) is not None:
            cheap = self._limit is None or self._limit.allows(self._space, architecture)
            if cheap and architecture not in self._seen:
                self._seen.add(architecture)
                chosen.append(architecture)
        return chosen


def _in_order(
    source: Iterable[Architecture], space: Space, config: SearchConfig, limit: Limit | None, budget: int
) -> Search:
    if limit is not None:
        limit.check(space)
    history: list[Scored] = []
    architectures, novelty = iter(source), _Novelty(space, limit)
    while chosen := novelty.take(architectures, min(config.population, budget - len(history))):
        scores = yield chosen
        history += _recorded(chosen, scores, 0)
    return tuple(history)


def _mutate(
    space: Space, parents: Sequence[Architecture], config: SearchConfig, rng: np.random.Generator
) -> Architecture:
    """Draw a parent and draw each of its genes anew with probability ``config.mutation``."""
    parent, fresh = parents[int(rng.integers(len(parents)))], random(space, rng)
    anew = rng.random(len(parent)) < config.mutation
    return tuple(new if drawn else old for old, new, drawn in zip(parent, fresh, anew, strict=True))


def _cross(parents: Sequence[Architecture], rng: np.random.Generator) -> Architecture:
    """Draw two parents and take each gene from one of them, by a fair coin."""
    first, second = (parents[index] for index in rng.integers(len(parents), size=2))
    heads = rng.random(len(first)) < 0.5
    return tuple(one if head else other for one, other, head in zip(first, second, heads, strict=True))


def _shuffled(space: Space, rng: np.random.Generator, limit: Limit | None) -> Iterator[Architecture]:
    """Yield architectures in a random order: each once in a space that can be listed, else drawn under the limit."""
    if limit is not None:
        limit.check(space)
    if space.size > _LISTED:
        for _ in range(_LISTED):  # an end: a tight limit may leave fewer than are wanted
            yield random(space, rng, limit)
        return
    sizes = [len(options) for options in space.choices]
    for index in rng.permutation(space.size):
        yield tuple(int(place) for place in np.unravel_index(index, sizes))


def _recorded(architectures: Sequence[Architecture], scores: Sequence[float], generation: int) -> list[Scored]:
    entries = [Scored(a, float(score), generation) for a, score in zip(architectures, scores, strict=True)]
    for entry in entries:
        if not isfinite(entry.score):
            raise TrainingError(f"the score of architecture {entry.architecture} is {entry.score}, not a finite number")
    return entries
