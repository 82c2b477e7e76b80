"""What a search finds, what its network gets right by class, and the same search by devices.

* *search*: evolution, or random search of as many candidates, on the scores of an adaptation; *chosen* is what the
  architecture found is worth, the mean over seeds of :mod:`benchmarks.imbnas_truth`. Beside it the small ResNet, a path
  at random (the mean of all), and the best there is.
* *loss*: one architecture, found with own heads, trained from scratch by :mod:`fl_edge.imbnas.retraining` with every
  loss, by class group.
* *federated*: eight devices, Dirichlet(0.5) on top of the tail, against one machine that has all their images.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.clientapp import ClientApp

from benchmarks.imbnas_ranks import adapting, scores, worth_of
from benchmarks.imbnas_tasks import PAIRS, architectures, fixed, make_source, make_target, tail
from fl_edge.clients.cache import WeightCache
from fl_edge.clients.imbnas import ImbNasClient, ImbNasWorkload
from fl_edge.data.config import PartitionConfig
from fl_edge.data.images import ImageSet
from fl_edge.imbnas.adaptation import PROCEDURES, adapt
from fl_edge.imbnas.config import FederatedConfig, LossConfig, SearchConfig
from fl_edge.imbnas.retraining import retrain
from fl_edge.imbnas.scoring import Scorer
from fl_edge.imbnas.search import evolve, random_search, winner
from fl_edge.imbnas.source import device_shards
from fl_edge.imbnas.space import Architecture
from fl_edge.imbnas.tally import Tally, group_accuracies
from fl_edge.link import LocalGrid
from fl_edge.strategies.imbnas import ImbNas

SEARCH = SearchConfig(population=8, top=3, generations=4, mutants=3, crosses=3)
QUICK_SEARCH = SearchConfig(population=4, top=2, generations=1, mutants=1, crosses=1)
BUDGET = SEARCH.population * (SEARCH.generations + 1)
DEVICES = 8
RESNET, RANDOM_PATH, BEST = "the small ResNet", "a path at random", "the best path"
RANDOM = ", random search"
SEARCHES = ("P0", "P1", f"P1{RANDOM}", "own", f"own{RANDOM}")


def compared(pair: str) -> tuple[str, ...]:
    """Return what is compared on a pair; of a draw of paths, a search has nothing to choose by."""
    searches = [who for who in SEARCHES if PAIRS[pair].all_paths or RANDOM not in who]
    return (*searches, RESNET, RANDOM_PATH, BEST)


def found_case(pair: str, ratio: int, who: str) -> str:
    """Return what the table calls a search."""
    return f"found, {pair}, ratio {ratio}: {who}"


def loss_case(pair: str, loss: str) -> str:
    """Return what the table calls a final training."""
    return f"trained, {pair}, ratio 100: {loss}"


def federated_case(pair: str) -> str:
    """Return what the table calls the search by devices."""
    return f"federated, {pair}, ratio 100"


def measure_found(pair: str, ratio: int, who: str, seeds: Sequence[int], seed: int, quick: bool) -> Mapping[str, Any]:
    """Search, and look up what was found."""
    worth = dict(zip(architectures(pair, quick), worth_of(pair, ratio, seeds, quick).tolist(), strict=True))
    if who == RANDOM_PATH:
        chosen = math.fsum(worth.values()) / len(worth)
    elif who == BEST:
        chosen = max(worth.values())
    else:
        chosen = worth[fixed(pair) if who == RESNET else search(pair, ratio, who, seed, quick)]
    return {"chosen": chosen, "regret": max(worth.values()) - chosen}


def search(pair: str, ratio: int, who: str, seed: int, quick: bool) -> Architecture:
    """Return what a search finds; where not all paths are looked at, the best of those that are."""
    space, (procedure, _, rest) = PAIRS[pair].space, who.partition(", ")
    known = dict(zip(architectures(pair, quick), scores(pair, ratio, procedure, seed, quick)[0].tolist(), strict=True))
    if len(known) < space.size:
        return max(known, key=known.__getitem__)
    if rest:
        return winner(random_search(space, known.__getitem__, SEARCH, seed, BUDGET)).architecture
    return winner(evolve(space, known.__getitem__, SEARCH, seed)).architecture


def measure_loss(pair: str, loss: str, seeds: Sequence[int], seed: int, quick: bool) -> Mapping[str, Any]:  # noqa: ARG001
    """Train what own heads find with one loss."""
    task, recipe = make_target(pair, 100, seed), PAIRS[pair].final
    recipe = replace(recipe, epochs=recipe.epochs // 8) if quick else recipe
    architecture = search(pair, 100, "own", seed, quick)
    tally = Tally.from_confusion(retrain(PAIRS[pair].space, architecture, task, loss, LossConfig(), recipe, seed))
    return {"chosen": tally.balanced, **group_accuracies(tally, task.counts, tail(100))}


def measure_federated(pair: str, seeds: Sequence[int], seed: int, quick: bool) -> Mapping[str, Any]:  # noqa: ARG001
    """Search on devices and on one machine; say whether scores, in their order, and winner are the same."""
    task, source, config = make_target(pair, 100, seed), make_source(pair, seed, quick), adapting(pair, 100, quick)
    settings = FederatedConfig(
        procedure="own", final_rounds=0, compare=False, head=config.head, loss=config.loss,
        batchnorm=config.batchnorm, search=QUICK_SEARCH if quick else SEARCH,
    )  # fmt: skip
    shards = device_shards(task, DEVICES, PartitionConfig(partition="dirichlet", alpha=0.5), seed)
    work = [ImbNasWorkload(f"device-{number}", *own) for number, own in enumerate(shards)]
    app = ClientApp()
    with tempfile.TemporaryDirectory() as folder:
        cache = WeightCache(Path(folder))
        ImbNasClient(lambda context: work[int(context.node_config["partition-id"])], cache=cache).register(app)
        strategy = ImbNas(source, task.test, settings, seed=seed, min_devices=DEVICES)
        report = strategy.start(LocalGrid(app, DEVICES))
    score = Scorer(adapt(PROCEDURES["own"], source, replace(task, train=_union(shards)), config, seed), config, seed)
    central = evolve(PAIRS[pair].space, score.on(task.validation), settings.search, seed)
    together = report.histories["search"]
    return {
        "same_winner": float(winner(together).architecture == winner(central).architecture),
        "same_scores": float([each.score for each in together] == [each.score for each in central]),
        "lost": float(len(report.lost)),
        "traffic_mb": (report.up_bytes + report.down_bytes) / 1e6,
    }


def _union(shards: Sequence[tuple[ImageSet, ImageSet]]) -> ImageSet:
    """Return all devices' training images, device after device: in another order another draw estimates BatchNorm's."""
    sets = [train for train, _ in shards]
    images, labels = (torch.cat([getattr(each, name) for each in sets]) for name in ("images", "labels"))
    return replace(sets[0], images=images, labels=labels)
