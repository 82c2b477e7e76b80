"""IMB-NAS over devices: what each of them can say of its own images, and how what they say is put together.

Source: the specification, section 14 (its own inference; the papers know no devices). *Ours*: the forms. Everything
that a search needs is a sum over images: BatchNorm's sums of one layer, features' sums for a candidate's own head, and
right answers by class, or the probabilities of those. Devices send sums, never images, labels or features; over any
number of devices they come to what one process finds that has all images.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fl_edge.data.images import ImageSet
from fl_edge.errors import ReplyError
from fl_edge.imbnas.adaptation import SCORES
from fl_edge.imbnas.batchnorm import Moments, Statistics, next_moments, norms, statistics, store
from fl_edge.imbnas.config import BatchNormConfig
from fl_edge.imbnas.heads import Objective, gram_sums, loss_sums, standardised
from fl_edge.imbnas.scoring import count, features, on_device
from fl_edge.imbnas.space import Architecture
from fl_edge.imbnas.supernet import Supernet
from fl_edge.models.averaging import check_weights
from fl_edge.seeding import torch_rng

Named = dict[str, Tensor]
KINDS = ("moments", "mean", "deviation", "gram", "slope", *SCORES)


@dataclass(frozen=True)
class Place:
    """Where a device's training images stand in the union of all: that of ``first`` is its own first one."""

    first: int = 0
    total: int = 0


@dataclass(frozen=True, eq=False)
class Question:
    """What devices are asked about some candidates, all of them at once.

    Attributes
    ----------
    kind
        ``moments``: BatchNorm's sums in front of the first norm that is not known. ``mean``: how many training images,
        and the sum of their features. ``deviation``: the sum of squared differences from ``mean``. ``gram``: see
        :func:`fl_edge.imbnas.heads.gram_sums`. ``slope``: :func:`fl_edge.imbnas.heads.loss_sums` at ``point``.
        ``accuracy``, ``probability``: right answers, or expected ones, and validation images by class.
    architectures
        The candidates.
    known
        Pooled statistics of each: of its first norms, or of all but for ``moments``.
    given
        What else is known of each: ``mean``, ``std`` (d,), ``point`` (C, d + 1), ``weight`` (C, d), ``bias`` (C,).
    common
        The same for all of them.
    """

    kind: str
    architectures: Sequence[Architecture]
    known: Sequence[Statistics]
    given: Sequence[Mapping[str, Tensor]]
    common: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """Which images BatchNorm's statistics take: the same draw from the union as one process would make."""

    seed: int
    config: BatchNormConfig

    def own(self, images: ImageSet, place: Place) -> Tensor:
        """Return a device's part of the drawn images, (b, c, h, w); maybe none."""
        drawn = torch.randperm(place.total, generator=torch_rng(self.seed, "batchnorm"))[: self.config.images]
        rows = drawn[(drawn >= place.first) & (drawn < place.first + len(images))] - place.first
        return images.batch(rows.to(images.labels.device))[0]


@dataclass(eq=False)
class Shard:
    """One device's images behind a super-network: answers questions.

    Features that were computed are remembered; computed again they have the same bits.

    Parameters
    ----------
    supernet
        On the device that computes.
    train, validation
        The device's own; either may be empty.
    keep
        Candidates whose features are remembered.
    """

    supernet: Supernet
    train: ImageSet
    validation: ImageSet
    keep: int = 64
    _features: OrderedDict[tuple[object, ...], Tensor] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        device = next(self.supernet.parameters()).device
        self.train, self.validation = on_device(self.train, device), on_device(self.validation, device)

    @torch.no_grad()
    def answer(
        self, question: Question, objective: Objective | None, calibration: Calibration, place: Place
    ) -> list[Tensor]:
        """Return one flat vector of sums for each candidate; sums of several devices add up.

        Raises
        ------
        ReplyError
            A question that is none, or lacks what it takes.
        """
        answers = []
        for architecture, known, given in zip(question.architectures, question.known, question.given, strict=True):
            try:
                named = {name: value.to(self.device) for name, value in {**question.common, **given}.items()}
                answers.append(self._one(question.kind, architecture, known, named, objective, calibration, place))
            except KeyError as error:
                raise ReplyError(f"the question {question.kind} came without {error}") from None
        return answers

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.supernet.parameters()).device

    def _one(
        self,
        kind: str,
        architecture: Architecture,
        known: Statistics,
        named: Named,
        objective: Objective | None,
        calibration: Calibration,
        place: Place,
    ) -> Tensor:
        if kind == "moments":
            images = calibration.own(self.train, place)
            if calibration.config.layerwise:
                return write_statistics((next_moments(self.supernet, architecture, [images], known),))
            batches = list(torch.split(images, calibration.config.batch_size)) if len(images) else []
            return write_statistics(statistics(self.supernet, architecture, batches, layerwise=False))
        if kind in SCORES:
            store(self.supernet, architecture, known)
            tally = count(self.supernet, read_head(named), architecture, self.validation, kind)
            return torch.cat([tally.correct, tally.total])
        return self._of_features(kind, self._cached(architecture, known), named, objective)

    def _of_features(self, kind: str, found: Tensor, named: Named, objective: Objective | None) -> Tensor:
        if kind == "mean":
            return torch.cat([found.new_tensor([len(found)]), found.sum(0)])
        if kind == "deviation":
            return (found - named["mean"]).square().sum(0)
        if objective is None or kind not in KINDS:
            raise ReplyError(f"{kind} is no question about a search; it must be one of {', '.join(KINDS)}")
        inputs = standardised(found, named["mean"], named["std"])
        if kind == "gram":
            return gram_sums(inputs, self.train.labels, objective).flatten()
        loss, gradient = loss_sums(named["point"], inputs, self.train.labels, objective)
        return torch.cat([loss[None], gradient.flatten()])

    def _cached(self, architecture: Architecture, known: Statistics) -> Tensor:
        """Return a candidate's features of all training images, float64 (n, d)."""
        key = (architecture, write_statistics(known).cpu().numpy().tobytes())
        if key not in self._features:
            store(self.supernet, architecture, known)
            self._features[key] = features(self.supernet, architecture, self.train).double()
            if len(self._features) > self.keep:
                self._features.popitem(last=False)
        return self._features[key]


def write_statistics(found: Statistics) -> Tensor:
    """Return statistics as one flat vector, float64: of each norm how many values, their sums, their squares'."""
    parts = [torch.cat([each.total.new_tensor([each.count]), each.total, each.squares]) for each in found]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def read_statistics(flat: Tensor, supernet: Supernet, architecture: Architecture, skip: int = 0) -> Statistics:
    """Undo :func:`write_statistics` for a path's norms from ``skip`` on.

    Raises
    ------
    ReplyError
        A vector that is not that of some norms, or sums that cannot be.
    """
    found: list[Moments] = []
    if flat.dtype != torch.float64 or flat.ndim != 1 or not bool(torch.isfinite(flat).all()):
        raise ReplyError("BatchNorm statistics that are not all finite float64 numbers")
    for norm in norms(supernet, architecture)[skip:]:
        if not len(flat):
            break
        width = len(norm.mean)
        if len(flat) < 1 + 2 * width:
            raise ReplyError(f"BatchNorm statistics of {len(flat)} numbers; {1 + 2 * width} were due")
        size, total, squares = flat[0], flat[1 : 1 + width], flat[1 + width : 1 + 2 * width]
        if size < 0 or size != size.round() or bool((squares < 0).any()):
            raise ReplyError("BatchNorm statistics that no images have: a count or a sum of squares below 0")
        found.append(Moments(int(size), total.to(norm.mean.device), squares.to(norm.mean.device)))
        flat = flat[1 + 2 * width :]
    if len(flat):
        raise ReplyError(f"BatchNorm statistics with {len(flat)} numbers too many")
    return tuple(found)


def read_head(named: Mapping[str, Tensor]) -> nn.Linear:
    """Return a linear head of given ``weight`` (C, d) and ``bias`` (C,), where they are."""
    weight, bias = named["weight"], named["bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ReplyError(f"a head of shapes {tuple(weight.shape)} and {tuple(bias.shape)}; (C, d) and (C,) were due")
    head = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device=weight.device)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head.requires_grad_(requires_grad=False)


def trained_part(module: nn.Module) -> Named:
    """Return what federated averaging averages of a module: all of its state that is not a counter."""
    state = module.state_dict()
    return {name: value.detach().cpu().clone() for name, value in state.items() if value.is_floating_point()}


def put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Undo :func:`trained_part`, in place.

    Raises
    ------
    ReplyError
        Names or shapes are not the module's.
    """
    check_weights(weights, trained_part(module))
    module.load_state_dict({**module.state_dict(), **weights})


def lengths(question: Question, supernet: Supernet, classes: int, *, layerwise: bool) -> list[int]:
    """Return how many numbers each candidate's answer has."""
    d = supernet.space.features
    fixed = {"mean": 1 + d, "deviation": d, "gram": (d + 1) ** 2, "slope": 1 + classes * (d + 1)}
    fixed |= dict.fromkeys(SCORES, 2 * classes)
    if question.kind in fixed:
        return [fixed[question.kind]] * len(question.architectures)
    found = []
    for architecture, known in zip(question.architectures, question.known, strict=True):
        missing = norms(supernet, architecture)[len(known) :]
        found.append(sum(1 + 2 * len(norm.mean) for norm in (missing[:1] if layerwise else missing)))
    return found
