"""IMB-NAS over Flower: a search for an architecture on the long tail of many devices, driven by the server.

Source: IMB-NAS (arXiv 2210.00136) for what is adapted, a linear head on a frozen super-network; *ours*: that devices do
it. What crosses is in `fl_edge.imbnas.federation`; here stands in which order. The client is `fl_edge.clients.imbnas`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from fl_edge.config import check
from fl_edge.data.images import ImageSet
from fl_edge.errors import DataError, TrainingError
from fl_edge.imbnas.adaptation import PROCEDURES, Source
from fl_edge.imbnas.batchnorm import statistics
from fl_edge.imbnas.config import FederatedConfig
from fl_edge.imbnas.extraction import Network
from fl_edge.imbnas.federation import Calibration, Named, put, trained_part
from fl_edge.imbnas.losses import make_head
from fl_edge.imbnas.messages import Aim, plain, write_architectures, write_space
from fl_edge.imbnas.pooled import Own, pooled_tallies, tallies
from fl_edge.imbnas.report import (
    FIXED,
    FOUND,
    UNADAPTED,
    ImbNasReport,
    ImbNasRound,
    PhaseLines,
    read_history,
    write_history,
)
from fl_edge.imbnas.retraining import confusion, make_network
from fl_edge.imbnas.scoring import calibration, on_device
from fl_edge.imbnas.search import Scored, propose_evolution, winner
from fl_edge.imbnas.space import Architecture, Limit
from fl_edge.imbnas.tally import Tally
from fl_edge.seeding import torch_rng
from fl_edge.strategies.exchange import wait_for_nodes
from fl_edge.strategies.fleet import Fleet, Lost

Observer = Callable[[ImbNasRound], None]
Scores = Callable[[list[Architecture]], list[float]]

_EMPTY_ROUNDS = 3  # so many rounds in a row without a single reply that can be used end the run

log = logging.getLogger("flwr.fl_edge")


class ImbNas:
    """A search on many devices, with the scores that one process would find that has all of their images.

    Parameters
    ----------
    source
        The super-network as it was trained on balanced data, its head, and those images.
    test
        Balanced, the server's own: what the final networks are measured on. Without it nothing is measured.
    config
        Settings.
    classes
        Names of the target's classes; those of ``test``, or of the source, if not given.
    seed
        Of all draws.
    min_devices, patience_s
        Devices to wait for, and for how many seconds.
    threads
        Of torch, in the server.
    observers
        Called with every round and every generation; without any, a line is logged.

    Attributes
    ----------
    server_round
        Rounds and generations that are complete.
    networks
        Weights in the final training, in the order of :attr:`architectures`.

    Examples
    --------
    In a Flower project of one's own::

        report = ImbNas(source, test).start(grid)
    """

    def __init__(
        self,
        source: Source,
        test: ImageSet | None = None,
        config: FederatedConfig | None = None,
        *,
        classes: Sequence[str] | None = None,
        seed: int = 0,
        min_devices: int = 1,
        patience_s: float = 60.0,
        threads: int = 1,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.config = config or FederatedConfig()
        check(self.config)
        self.source, self.test, self.seed = source, test, seed
        self.space, self.shape = source.supernet.space, source.images.shape
        self.classes = list(classes or (test or source.images).classes)
        self.min_devices, self.patience_s, self.threads = min_devices, patience_s, threads
        self.observers = list(observers)
        self.procedure = PROCEDURES[self.config.procedure]
        image_shape = (self.shape[0], self.shape[1], self.shape[2])
        self._limit = Limit(self.config.limit, image_shape) if self.config.limit else None
        if self._limit is not None:
            self._limit.check(self.space)
        self._place = next(source.head.parameters()).device
        self._fleet = Fleet(source.supernet, self.classes, self.shape, self.config.fewest)
        self._calibration = Calibration(seed, self.config.batchnorm)
        self.server_round = 0
        self.head: Named = {}
        self.networks: list[Named] = []
        self._done = {"head": 0, "training": 0}
        self._scored: dict[str, list[Scored]] = {}
        self._timeout: float | None = None
        self._grid: Grid | None = None
        self.report = ImbNasReport(self.classes, torch.zeros(len(self.classes), dtype=torch.int64))

    # --- what must survive a crash ---

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, plain record): all that the next round depends on."""
        tensors = {f"head.{name}": value for name, value in self.head.items()}
        for number, network in enumerate(self.networks):
            tensors |= {f"{number}.{name}": value for name, value in network.items()}
        scored = {name: write_history(entries) for name, entries in self._scored.items()}
        traffic = self._fleet.traffic
        record = {"round": self.server_round, "done": dict(self._done), "scored": scored, "lost": self._fleet.lost}
        return tensors, {**record, "up_bytes": traffic.up_bytes, "down_bytes": traffic.down_bytes}

    def restore(self, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go back to a snapshot; :meth:`start` then takes up with the round after it."""
        parts: dict[str, Named] = {}
        for name, value in weights.items():
            first, _, own = name.partition(".")
            parts.setdefault(first, {})[own] = value
        self.head = parts.pop("head", {})
        self.networks = [parts[str(number)] for number in range(len(parts))]
        self.server_round, self._done = int(record["round"]), dict(record["done"])
        self._scored = {name: read_history(entries) for name, entries in record["scored"].items()}
        self._fleet.lost = dict(record["lost"])
        self._fleet.traffic.add(int(record["up_bytes"]), int(record["down_bytes"]))

    @property
    def rounds(self) -> int:
        """Rounds and generations at most, over all phases."""
        searches = 2 if self._compares else 1
        return self._head_rounds + searches * (self.config.search.generations + 1) + self.config.final_rounds

    # --- the phases ---

    def start(self, grid: Grid, timeout: float | None = 600) -> ImbNasReport:
        """Adapt, search, and train what was found, from the beginning or from where a :meth:`restore` stands.

        Parameters
        ----------
        grid
            Flower's, or one that behaves like it.
        timeout
            Seconds that a device has for an answer. One that takes longer misses a round of training; it is left out of
            the rest of a search, and the generation is scored again without it.

        Raises
        ------
        DataError
            The devices have no training or no validation images.
        TrainingError
            Too few devices, or three rounds in a row without a reply that can be used.
        """
        torch.set_num_threads(self.threads)
        self._grid, self._timeout = grid, timeout
        wait_for_nodes(grid, self.min_devices, self.patience_s)
        self._fleet.meet(grid, self.server_round, timeout)
        devices = self._with_data()
        self.report.counts = self._fleet.counts(devices)
        if self._head_rounds:
            self._train_head()
        self.report.histories["search"] = self._search("search", self._adapted_scores)
        if self._compares:
            self.report.histories["search P0"] = self._search("search P0", self._source_scores)
        self._enter_contenders()
        if self.config.final_rounds:
            self._train_networks()
        self._fleet.forget()
        self.report.lost = self._fleet.lost
        self.report.up_bytes, self.report.down_bytes = self._fleet.moved
        return self.report

    def _with_data(self) -> list[str]:
        """Return the devices that are left; together they must have images to train on and to score on."""
        devices = self._fleet.enough()
        images = {"training": self._fleet.counts(devices), "validation": self._fleet.validation(devices)}
        for name, counts in images.items():
            if not int(counts.sum()):
                raise DataError(f"none of {len(devices)} devices has {name} images; a search needs some")
        return devices

    @property
    def _head_rounds(self) -> int:
        return self.config.head_rounds if self.procedure.head == "shared" else 0

    @property
    def _compares(self) -> bool:
        """Whether the choice without adaptation can be made: the source's head must be one for these classes."""
        head = self.source.head
        same = list(self.source.images.classes) == self.classes and isinstance(head, torch.nn.Linear)
        return self.config.compare and same

    def _train_head(self) -> None:
        if not self.head:
            generator = torch_rng(self.seed, "head")
            head = make_head(self.procedure.loss, self.space.features, len(self.classes), generator)
            self.head = trained_part(head)
        epochs = _share(self.config.head.epochs, self.config.head_rounds)
        said = {"digest": self._fleet.digest, **plain("head", replace(self.config.head, epochs=epochs))}

        def keep(weights: Named) -> None:
            self.head = weights

        self._rounds("head", self.config.head_rounds, self.procedure.loss, said, lambda: self.head, keep, least=1)

    def _search(self, phase: str, scores: Scores) -> tuple[Scored, ...]:
        """Run evolution on scores from the devices; generations that were scored before a :meth:`restore` are not."""
        entries = self._scored.setdefault(phase, [])
        known = {entry.architecture: entry.score for entry in entries}
        search, generation = propose_evolution(self.space, self.config.search, self.seed, self._limit), 0
        try:
            wanted = next(search)
            while True:
                if any(each not in known for each in wanted):
                    started, before = time.perf_counter(), self._fleet.moved
                    known |= dict(zip(wanted, scores(wanted), strict=True))
                    entries += [Scored(each, known[each], generation) for each in wanted]
                    best = winner(entries)
                    self._tell(
                        *(phase, generation + 1, self.config.search.generations + 1, started, before),
                        devices=len(self._fleet.present), candidates=len(wanted), score=best.score,
                        best=self.space.describe(best.architecture), absent=dict(self._fleet.lost),
                    )  # fmt: skip
                generation += 1
                wanted = search.send([known[each] for each in wanted])
        except StopIteration as end:
            found: tuple[Scored, ...] = end.value
            return found

    def _adapted_scores(self, architectures: list[Architecture]) -> list[float]:
        def tally(devices: list[str]) -> list[Tally]:
            aim = self._aim(self.procedure.loss, devices)
            head = self.head if self._head_rounds else Own(aim.objective(), self.config.head)
            ask = partial(self._fleet.sums, calibration=self._calibration, devices=devices, aim=aim)
            return pooled_tallies(self.source.supernet, architectures, head, self.procedure.score, ask)

        return self._until_all_answer(tally)

    def _source_scores(self, architectures: list[Architecture]) -> list[float]:
        """Score as on the source: its statistics and head, so that devices only count right answers."""
        supernet, config = self.source.supernet, self.config.batchnorm
        batches = calibration(on_device(self.source.images, self._place), config, self.seed)
        known = [statistics(supernet, each, batches, layerwise=config.layerwise) for each in architectures]

        def tally(devices: list[str]) -> list[Tally]:
            aim = self._aim(self.procedure.loss, devices)
            ask = partial(self._fleet.sums, calibration=self._calibration, devices=devices, aim=aim)
            none: list[Named] = [{} for _ in architectures]
            return tallies(architectures, known, none, trained_part(self.source.head), PROCEDURES["P0"].score, ask)

        return self._until_all_answer(tally)

    def _until_all_answer(self, tally: Callable[[list[str]], list[Tally]]) -> list[float]:
        """Score with all devices that are left, again if one is lost on the way."""
        assert self._grid is not None
        while True:
            self._fleet.meet(self._grid, self.server_round, self._timeout)
            try:
                return [each.balanced for each in tally(self._with_data())]
            except Lost:
                continue

    def _enter_contenders(self) -> None:
        """Set who is trained in the end: what was found, and what it is compared with."""
        report = self.report
        report.contenders = {FOUND: report.winner.architecture}
        if self._compares:
            report.contenders[UNADAPTED] = winner(report.histories["search P0"]).architecture
        if self.config.compare and all("conv3" in options for options in self.space.choices):
            report.contenders[FIXED] = tuple(options.index("conv3") for options in self.space.choices)
        shape = (self.shape[0], self.shape[1], self.shape[2])
        report.names = {each: self.space.describe(each) for each in report.contenders.values()}
        report.costs = {name: self.space.cost(each, shape) for name, each in report.contenders.items()}

    @property
    def architectures(self) -> list[Architecture]:
        """What the final training trains, each once."""
        return list(dict.fromkeys(self.report.contenders.values()))

    def network(self, number: int) -> Network:
        """Return a network of the final training as it is."""
        images = replace(self.source.images, classes=self.classes)
        made = make_network(self.space, self.architectures[number], images, self.config.final_loss, self.seed)
        if self.networks:
            put(made, self.networks[number])
        return made.to(self._place)

    def _train_networks(self) -> None:
        if not self.networks:
            self.networks = [trained_part(self.network(number)) for number in range(len(self.architectures))]
        epochs = _share(self.config.final.epochs, self.config.final_rounds)
        said = {
            "space": write_space(self.space),
            "architectures": write_architectures(self.architectures),
            **plain("final", replace(self.config.final, epochs=epochs)),
        }

        def all_of_them() -> Named:
            return {f"{n}.{name}": value for n, each in enumerate(self.networks) for name, value in each.items()}

        def keep(weights: Named) -> None:
            self.networks = [
                {name: weights[f"{number}.{name}"] for name in network} for number, network in enumerate(self.networks)
            ]

        loss, rounds = self.config.final_loss, self.config.final_rounds
        self._rounds("training", rounds, loss, said, all_of_them, keep, least=2)
        if self.test is not None:
            tested = {each: confusion(self.network(n), self.test) for n, each in enumerate(self.architectures)}
            self.report.confusions = {name: tested[each] for name, each in self.report.contenders.items()}

    # --- rounds of federated averaging ---

    def _rounds(
        self,
        phase: str,
        rounds: int,
        loss: str,
        said: Mapping[str, Any],
        weights: Callable[[], Named],
        keep: Callable[[Named], None],
        *,
        least: int,
    ) -> None:
        """Average over the devices that have so many training images, for so many rounds."""
        assert self._grid is not None
        empty = 0
        for number in range(self._done[phase], rounds):
            started, before = time.perf_counter(), self._fleet.moved
            self._fleet.meet(self._grid, self.server_round, self._timeout)
            order = {**said, **self._aim(loss, self._fleet.present).to_config()}
            order |= {"seed": self.seed, "turn": number, "turns": rounds}
            kind = "train.imbnas_head" if phase == "head" else "train.imbnas_networks"
            found = self._fleet.average(kind, order, weights(), least)
            empty = 0 if found.devices else empty + 1
            if empty == _EMPTY_ROUNDS:
                why = next(iter(found.absent.values()), f"none has {least} training images")
                raise TrainingError(f"no device trained in {empty} rounds of phase {phase}; the last: {why}")
            keep(found.weights)
            self._done[phase] = number + 1
            self._tell(
                *(phase, number + 1, rounds, started, before), devices=found.devices, absent=found.absent,
                loss=found.loss, accuracy=self._accuracy() if phase == "training" else None,
            )  # fmt: skip

    def _accuracy(self) -> float | None:
        """Return the class-mean accuracy of what was found, as it is now."""
        if self.test is None:
            return None
        return Tally.from_confusion(confusion(self.network(0), self.test)).balanced

    def _aim(self, loss: str, devices: Sequence[str]) -> Aim:
        return Aim(loss, tuple(self._fleet.counts(devices).tolist()), self.config.loss)

    def _tell(self, phase: str, number: int, of: int, started: float, before: tuple[int, int], **figures: Any) -> None:
        self.server_round += 1
        up, down = self._fleet.moved
        row = ImbNasRound(
            *(self.server_round, phase, number, of), **figures, up_bytes=up - before[0], down_bytes=down - before[1],
            real_s=time.perf_counter() - started,
        )  # fmt: skip
        self.observers = self.observers or [PhaseLines(self.rounds, log.info)]
        for observer in self.observers:
            observer(row)


def _share(epochs: int, rounds: int) -> int:
    """Return the epochs of one round, at least 1."""
    return max(1, round(epochs / rounds))
