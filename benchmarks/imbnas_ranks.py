"""Scores of all paths by each way to adapt a super-network, and how they rank what paths are worth.

Truth is :mod:`benchmarks.imbnas_truth`'s, of one seed: one training on one draw of the tail. *balanced truth* ranks by
the accuracy of the same seed's training on the balanced set, *another seed* by another training on another draw of the
tail: what the truth's own noise leaves. Own heads are scored by the probability of the right class, everything else by
accuracy; P1 and own heads stand there the other way round, too. What a path is worth (``chosen``, ``regret``) is the
mean over all seeds' truths: the best of 192 single trainings is the luckiest one.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Results
from benchmarks.imbnas_tasks import BALANCED, PAIRS, architectures, make_source, make_target
from benchmarks.imbnas_truth import truths
from fl_edge.imbnas.adaptation import PROCEDURES, adapt
from fl_edge.imbnas.config import AdaptConfig, SuperConfig
from fl_edge.imbnas.ranking import Interval, kendall, regret, spearman, tau_difference
from fl_edge.imbnas.scoring import Scorer

Floats = NDArray[np.float64]

BALANCED_TRUTH, ANOTHER = "balanced truth", "another seed"
_ADAPTED = PROCEDURES | {
    "P1 by probability": replace(PROCEDURES["P1"], score="probability"),
    "own by accuracy": replace(PROCEDURES["own"], score="accuracy"),
}
RANKERS = (*_ADAPTED, BALANCED_TRUTH, ANOTHER)
_QUICK = 8  # times fewer epochs


def rank_case(pair: str, ratio: int, ranker: str) -> str:
    """Return what the table calls a way to rank."""
    return f"{pair}, ratio {ratio}: {ranker}"


def truth_of(pair: str, ratio: int, seeds: Sequence[int], seed: int, quick: bool) -> Floats:
    """Return what each path is worth, (paths,)."""
    found: Floats = truths(pair, seeds, quick)[ratio][list(seeds).index(seed)]
    return found


def worth_of(pair: str, ratio: int, seeds: Sequence[int], quick: bool) -> Floats:
    """Return the mean over seeds of each path's truth, (paths,)."""
    found: Floats = truths(pair, seeds, quick)[ratio].mean(axis=0)
    return found


def measure_rank(pair: str, ratio: int, ranker: str, seeds: Sequence[int], seed: int, quick: bool) -> Mapping[str, Any]:
    """Rank all paths one way."""
    truth = truth_of(pair, ratio, seeds, seed, quick)
    seconds: dict[str, float] = {}
    if ranker == BALANCED_TRUTH:
        found = truth_of(pair, BALANCED, seeds, seed, quick)
    elif ranker == ANOTHER:
        if len(seeds) < 2:
            return {}
        found = truth_of(pair, ratio, seeds, seeds[(list(seeds).index(seed) + 1) % len(seeds)], quick)
    else:
        found, adapting, scoring = scores(pair, ratio, ranker, seed, quick)
        seconds = {"adapt_s": adapting, "score_s": scoring}
    tau, rho, worth = kendall(found, truth), spearman(found, truth), worth_of(pair, ratio, seeds, quick)
    return {
        **({} if math.isnan(tau) else {"tau": tau, "rho": rho}),  # of equal scores there is no order
        "regret": regret(found, worth),
        "chosen": float(worth.max()) - regret(found, worth),
        **seconds,
        "scores": " ".join(f"{each:.5f}" for each in found),
        "truth": " ".join(f"{each:.5f}" for each in truth),
    }


@functools.lru_cache(maxsize=64)
def scores(pair: str, ratio: int, procedure: str, seed: int, quick: bool) -> tuple[Floats, float, float]:
    """Return the score of every path after an adaptation, and the seconds of adapting and of scoring."""
    task, source, config = make_target(pair, ratio, seed), make_source(pair, seed, quick), adapting(pair, ratio, quick)
    started = time.perf_counter()
    adapted = adapt(_ADAPTED[procedure], source, task, config, seed)
    between = time.perf_counter()
    score = Scorer(adapted, config, seed).on(task.validation)
    found = np.array([score(path) for path in architectures(pair, quick)])
    return found, between - started, time.perf_counter() - between


def adapting(pair: str, ratio: int, quick: bool) -> AdaptConfig:
    """Return the settings of all adaptations; a search from scratch has as many steps as the source's training had."""
    recipe, head = PAIRS[pair].supernet, PAIRS[pair].head
    if quick:
        recipe = replace(recipe, epochs=recipe.epochs // _QUICK)
        head = replace(head, epochs=head.epochs // _QUICK)
    sizes = [len(make_target(pair, each, 0).train) for each in (BALANCED, ratio)]
    before, after = (math.ceil(size / recipe.batch_size) for size in sizes)
    scratch: SuperConfig = replace(recipe, epochs=math.ceil(recipe.epochs * before / after))
    return AdaptConfig(head=head, scratch=scratch)


def difference(results: Results, pair: str, ratio: int, better: str, worse: str) -> Interval | None:
    """Return by how much one ranker's tau is above another's over all seeds, with its 95 % interval."""
    one, two = (_texts(results, rank_case(pair, ratio, ranker), "scores") for ranker in (better, worse))
    truth = _texts(results, rank_case(pair, ratio, better), "truth")
    if one is None or two is None or truth is None or len(one) != len(two):
        return None
    return tau_difference(one, two, truth)


def _texts(results: Results, case: str, key: str) -> Floats | None:
    found = [np.array(each.split(), float) for each in results.values(case, key)]
    return np.array(found) if found else None


def one_thread() -> None:
    """Networks this small gain nothing by a second."""
    torch.set_num_threads(1)
