"""Scores of candidates by sums over devices: the server's part, with whoever asks the devices passed in.

*Ours*. A generation goes together through one exchange a norm, and one for the tallies. Candidates' own heads take a
dozen more and one for each step of the solver, which is the one of :mod:`fl_edge.imbnas.heads`: its loss and gradient
come from the devices.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_edge.imbnas.batchnorm import Statistics, norms
from fl_edge.imbnas.config import HeadConfig
from fl_edge.imbnas.federation import Named, Question, read_statistics
from fl_edge.imbnas.heads import Objective, deviation_of, linear_head, mean_of, solve
from fl_edge.imbnas.space import Architecture
from fl_edge.imbnas.supernet import Supernet
from fl_edge.imbnas.tally import Tally

Ask = Callable[[Question], list[Tensor]]
"""Puts a question to all devices and returns their answers' sums, one for each candidate."""

Points = dict[int, Tensor]  # candidate -> where its loss is wanted


@dataclass(frozen=True, eq=False)
class Own:
    """Each candidate gets a head of its own: by what objective, and how it is solved."""

    objective: Objective
    config: HeadConfig


def pooled_tallies(
    supernet: Supernet, architectures: Sequence[Architecture], head: Own | Mapping[str, Tensor], score: str, ask: Ask
) -> list[Tally]:
    """Return right answers by class, counted or expected, of some candidates on the validation images of all devices.

    Parameters
    ----------
    head
        ``weight`` and ``bias`` of one for all, or how each gets its own.
    score
        What counts as right, see :class:`fl_edge.imbnas.adaptation.Adaptation`.
    """
    known = pooled_statistics(supernet, architectures, ask)
    if isinstance(head, Own):
        given, common = pooled_heads(architectures, known, head, ask), {}
    else:
        given, common = [{} for _ in architectures], dict(head)
    return tallies(architectures, known, given, common, score, ask)


def tallies(
    architectures: Sequence[Architecture],
    known: Sequence[Statistics],
    given: Sequence[Named],
    common: Mapping[str, Tensor],
    score: str,
    ask: Ask,
) -> list[Tally]:
    """Return right answers by class, counted or expected, of candidates with given statistics and heads."""
    sums = ask(Question(score, architectures, known, given, common))
    return [Tally(correct, total.long()) for correct, total in (torch.chunk(each, 2) for each in sums)]


def pooled_statistics(supernet: Supernet, architectures: Sequence[Architecture], ask: Ask) -> list[Statistics]:
    """Return BatchNorm's statistics of some paths over the drawn images of all devices, one exchange a norm."""
    known: list[Statistics] = [() for _ in architectures]
    lengths = [len(norms(supernet, each)) for each in architectures]
    while missing := [place for place, found in enumerate(known) if len(found) < lengths[place]]:
        asked = [architectures[place] for place in missing]
        sums = ask(Question("moments", asked, [known[place] for place in missing], [{} for _ in missing]))
        for place, flat in zip(missing, sums, strict=True):
            known[place] += read_statistics(flat, supernet, architectures[place], len(known[place]))
    return known


def pooled_heads(architectures: Sequence[Architecture], known: Sequence[Statistics], own: Own, ask: Ask) -> list[Named]:
    """Return the best head of each candidate, ``weight`` (C, d) and ``bias`` (C,), over the images of all devices."""
    none: list[Named] = [{} for _ in architectures]
    sums = ask(Question("mean", architectures, known, none))
    counts = [float(each[0]) for each in sums]
    means = [mean_of(each[1:], count) for each, count in zip(sums, counts, strict=True)]
    squares = ask(Question("deviation", architectures, known, [{"mean": each} for each in means]))
    stds = [deviation_of(each, count) for each, count in zip(squares, counts, strict=True)]
    scales: list[Named] = [{"mean": mean, "std": std} for mean, std in zip(means, stds, strict=True)]
    grams = [_square(each) for each in ask(Question("gram", architectures, known, scales))]
    classes = len(own.objective.weights)

    def slopes(points: Points) -> dict[int, tuple[Tensor, Tensor]]:
        places = sorted(points)
        given = [{**scales[place], "point": points[place]} for place in places]
        asked = Question("slope", [architectures[p] for p in places], [known[p] for p in places], given)
        return {place: (each[0], each[1:].reshape(classes, -1)) for place, each in zip(places, ask(asked), strict=True)}

    found = solve_together(grams, own, slopes)
    heads = [linear_head(point, mean, std, mean) for point, mean, std in zip(found, means, stds, strict=True)]
    return [_weights(head) for head in heads]


def solve_together(
    grams: Sequence[Tensor], own: Own, slopes: Callable[[Points], dict[int, tuple[Tensor, Tensor]]]
) -> list[Tensor]:
    """Run :func:`fl_edge.imbnas.heads.solve` for several candidates in step, so that a step is one question for all.

    Each runs in a thread of its own and waits there for what ``slopes``, called in this one, has to say.
    """
    asked: queue.SimpleQueue[tuple[int, Tensor | None]] = queue.SimpleQueue()
    told: list[queue.SimpleQueue[tuple[Tensor, Tensor] | None]] = [queue.SimpleQueue() for _ in grams]

    def run(place: int) -> Tensor:
        def measure(point: Tensor) -> tuple[Tensor, Tensor]:
            asked.put((place, point))
            if (found := told[place].get()) is None:
                raise _Ended
            return found

        try:
            return solve(measure, grams[place], own.objective, own.config)
        finally:
            asked.put((place, None))

    with ThreadPoolExecutor(len(grams)) as pool:
        futures = [pool.submit(run, place) for place in range(len(grams))]
        running, waiting = set(range(len(grams))), Points()
        try:
            while running:
                place, point = asked.get()
                if point is None:
                    running.remove(place)
                else:
                    waiting[place] = point
                if waiting and waiting.keys() == running:
                    found, waiting = slopes(waiting), {}
                    for one, answer in found.items():
                        told[one].put(answer)
        finally:
            for each in told:  # whoever still waits, because asking failed
                each.put(None)
    return [future.result() for future in futures]


class _Ended(Exception):  # noqa: N818 - ends a thread, is no error
    """The devices can no longer be asked."""


def _square(flat: Tensor) -> Tensor:
    side = round(len(flat) ** 0.5)
    return flat.reshape(side, side)


def _weights(head: nn.Linear) -> Named:
    return {"weight": head.weight.detach().float(), "bias": head.bias.detach().float()}
