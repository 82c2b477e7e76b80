"""IMB-NAS: how adaptations rank paths for a long tail, what searches find, few-shot classes, a search by devices.

Parts, each in a module of its own that says what is compared with what, and how:

* sources, targets and search spaces (:mod:`benchmarks.imbnas_tasks`);
* what every path is worth, by training it (:mod:`benchmarks.imbnas_truth`): some four hours of one core, kept on disk;
* ranks by P0 to P4 and own heads (:mod:`benchmarks.imbnas_ranks`);
* searches, losses of the final training, and devices (:mod:`benchmarks.imbnas_found`).

The quick variant has digits at ratio 100 alone, a draw of their paths, and shorter trainings of everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import Benchmark, Case, Column, Results, Target
from benchmarks.imbnas_figure import figure
from benchmarks.imbnas_found import (
    RANDOM,
    RESNET,
    compared,
    federated_case,
    found_case,
    loss_case,
    measure_federated,
    measure_found,
    measure_loss,
)
from benchmarks.imbnas_ranks import BALANCED_TRUTH, RANKERS, difference, measure_rank, one_thread, rank_case
from benchmarks.imbnas_tasks import OTHER, PAIRS, RATIOS, SAME, make_source
from benchmarks.imbnas_truth import truths
from fl_edge.imbnas.config import LOSSES
from fl_edge.imbnas.tally import GROUPS

SEEDS, QUICK_SEEDS = (0, 1, 2), (0, 1)
_DIGITS = (SAME, OTHER)
_run: dict[str, tuple[int, ...]] = {"seeds": SEEDS}  # truth of all seeds is found together

MEASURES: dict[str, Callable[[Sequence[int], int, bool], Mapping[str, Any]]] = {
    **{
        rank_case(pair, ratio, ranker): partial(measure_rank, pair, ratio, ranker)
        for pair in PAIRS
        for ratio in PAIRS[pair].ratios
        for ranker in RANKERS
    },
    **{
        found_case(pair, ratio, who): partial(measure_found, pair, ratio, who)
        for pair in PAIRS
        for ratio in PAIRS[pair].ratios
        for who in compared(pair)
    },
    **{loss_case(pair, loss): partial(measure_loss, pair, loss) for pair in PAIRS for loss in LOSSES},
    **{federated_case(pair): partial(measure_federated, pair) for pair in _DIGITS},
}
QUICK = {
    *(rank_case(SAME, 100, ranker) for ranker in RANKERS),
    *(found_case(SAME, 100, who) for who in compared(SAME)),
    *(loss_case(SAME, loss) for loss in LOSSES),
    federated_case(SAME),
}


def measure(case: str, seed: int, quick: bool) -> Mapping[str, Any]:
    """Measure one case with one seed."""
    return MEASURES[case](_run["seeds"], seed, quick)


def prepare(seeds: Sequence[int], quick: bool) -> None:
    """Train super-networks and every path, where that has not been done on this machine."""
    one_thread()
    _run["seeds"] = tuple(seeds)
    for pair in (SAME,) if quick else PAIRS:
        truths(pair, seeds, quick)
        for seed in seeds:
            make_source(pair, seed, quick)


def targets(results: Results) -> list[Target]:
    """Return the issue's lines, of all pairs that were measured."""
    asked = {record["case"] for record in results.raw}
    lines = [_falls(results)] if rank_case(SAME, RATIOS[0], BALANCED_TRUTH) in asked else []
    for pair in PAIRS:
        if loss_case(pair, "ce") not in asked:
            continue
        lines += [_better(results, pair), _cost(results, pair), _recommended(results, pair), _few(results, pair)]
        lines += [
            _above_other(results, pair, other) for other in ("P0", f"P1{RANDOM}", RESNET) if other in compared(pair)
        ]
    for pair in _DIGITS:
        if federated_case(pair) in asked:
            same = results.values(federated_case(pair), "same_winner")
            measure = f"{federated_case(pair)}: same winner as one machine, least of all seeds"
            lines.append(Target.at_least(measure, min(same, default=None), 1))
    return lines


def _falls(results: Results) -> Target:
    taus = [results.center(rank_case(SAME, ratio, BALANCED_TRUTH), "tau") for ratio in (100, 10)]
    value = _less(taus[0], taus[1])
    holds = value is not None and value < 0
    return Target(f"{SAME}: tau of balanced truth, at ratio 100 less at 10", value, "below 0", holds)


def _better(results: Results, pair: str) -> Target:
    found = difference(results, pair, 100, "P1", "P0")
    measure = f"{pair}, ratio 100: tau of P1 less that of P0, lower end of its 95 % interval"
    # of a proxy whose scores are all equal there is no tau
    return _above(measure, None if found is None or math.isnan(found.low) else found.low)


def _above_other(results: Results, pair: str, other: str) -> Target:
    chosen, less = (results.center(found_case(pair, 100, who), "chosen") for who in ("P1", other))
    return _above(f"{found_case(pair, 100, 'P1')}, above {other}", _less(chosen, less))


def _cost(results: Results, pair: str) -> Target:
    cost = results.ratio(rank_case(pair, 100, "P1"), rank_case(pair, 100, "P3"), "adapt_s")
    return Target.at_most(f"{pair}, ratio 100: seconds of P1 / of P3", cost, 0.1)


def _recommended(results: Results, pair: str) -> Target:
    own, p1 = (rank_case(pair, 100, procedure) for procedure in ("own", "P1"))
    gain = _less(results.center(own, "tau"), results.center(p1, "tau"))
    share = results.ratio(own, p1, "regret")
    holds = (gain is not None and gain >= 0.1) or (share is not None and share <= 0.5)
    said = "" if share is None else f" ({share:.2f})"
    target = f"at least 0.1, or regret at most 0.5 of P1's{said}"
    return Target(f"{pair}, ratio 100: tau of own heads less that of P1", gain, target, holds)


def _few(results: Results, pair: str) -> Target:
    few = [results.center(loss_case(pair, loss), "few") for loss in ("balanced_softmax", "ce")]
    return Target.at_least(
        f"{pair}, ratio 100: few-shot accuracy of balanced softmax less that of cross-entropy", _less(*few), 0.05
    )


def _above(measure: str, value: float | None) -> Target:
    return Target(measure, value, "above 0", value is not None and value > 0)


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


BENCHMARK = Benchmark(
    cases=tuple(Case(name, quick_repetitions=int(name in QUICK)) for name in MEASURES),
    columns={
        "tau": Column("Kendall's tau"),
        "rho": Column("Spearman's rho"),
        "regret": Column("regret"),
        "chosen": Column("balanced accuracy"),
        **{group: Column(f"{group}-shot") for group in GROUPS},
        "adapt_s": Column("adapting", "real_s", 2),
        "score_s": Column("scoring", "real_s", 1),
        "same_winner": Column("same winner", digits=0),
        "same_scores": Column("same scores", digits=0),
        "lost": Column("devices lost", digits=0),
        "traffic_mb": Column("MB", digits=1),
    },
    measure=measure,
    targets=targets,
    figure=figure,
    prepare=prepare,
    seeds=SEEDS,
    quick_seeds=QUICK_SEEDS,
    settings={"pairs": {name: repr(pair) for name, pair in PAIRS.items()}},
    packages=("scipy",),
)
