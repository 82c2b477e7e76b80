"""IMB-NAS's messages as plain values and tensors, and back; what comes in is checked, not trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from fl_edge.config import check
from fl_edge.errors import ConfigError, ReplyError
from fl_edge.imbnas.adaptation import SCORES
from fl_edge.imbnas.config import BatchNormConfig, LossConfig
from fl_edge.imbnas.federation import (
    KINDS,
    Calibration,
    Named,
    Place,
    Question,
    read_statistics,
    write_statistics,
)
from fl_edge.imbnas.heads import Objective, make_objective
from fl_edge.imbnas.space import Architecture, Space, Stage
from fl_edge.imbnas.supernet import Supernet

T = TypeVar("T")
Config = dict[str, Any]


@dataclass(frozen=True)
class Aim:
    """A loss with the *global* class counts: what every device trains by.

    Attributes
    ----------
    loss
        See :func:`fl_edge.imbnas.losses.make_loss`.
    counts
        n_c over all devices.
    config
        Constants.
    """

    loss: str
    counts: tuple[int, ...]
    config: LossConfig

    def to_config(self) -> Config:
        """Return it as plain values."""
        return {"loss": self.loss, "counts": list(self.counts), **plain("loss", self.config)}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Aim:
        """Undo :meth:`to_config`."""
        return cls(str(config["loss"]), read_counts(config, "counts"), read(LossConfig, "loss", config))

    def objective(self) -> Objective:
        """Return what it means for a candidate's own head."""
        return make_objective(self.loss, torch.tensor(self.counts), self.config)


def plain(prefix: str, config: Any) -> Config:
    """Return a configuration dataclass as plain values, each under a prefix."""
    return {f"{prefix}.{name}": value for name, value in asdict(config).items()}


def read(kind: type[T], prefix: str, config: Mapping[str, Any]) -> T:
    """Undo :func:`plain`.

    Raises
    ------
    ReplyError
        A value is missing or out of range.
    """
    try:
        found = kind(**{field.name: config[f"{prefix}.{field.name}"] for field in fields(kind)})  # type: ignore[arg-type]
        check(found, f"{prefix}.")
    except (KeyError, ConfigError) as error:
        raise ReplyError(f"settings that cannot be used: {error}") from None
    return found


def read_counts(config: Mapping[str, Any], name: str, classes: int | None = None) -> tuple[int, ...]:
    """Return numbers of images by class.

    Raises
    ------
    ReplyError
        They are none, or not of so many classes.
    """
    value = config.get(name)
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < 2**40 for one in value):
        raise ReplyError(f"{name}={str(value)[:80]} must be whole numbers from 0 on, one a class")
    if classes is not None and len(value) != classes:
        raise ReplyError(f"{name} of {len(value)} classes; the task has {classes}")
    return tuple(value)


def write_space(space: Space) -> str:
    """Return a search space as text."""
    return json.dumps(asdict(space))


def read_space(text: str) -> Space:
    """Undo :func:`write_space`.

    Raises
    ------
    ReplyError
        A text that is no space.
    ConfigError
        A space that cannot be.
    """
    try:
        said = json.loads(text)
        stages = tuple(Stage(int(one["channels"]), int(one["blocks"]), int(one["stride"])) for one in said["stages"])
        return Space(int(said["stem"]), stages, tuple(map(str, said["options"])))
    except (ValueError, KeyError, TypeError):
        raise ReplyError(f"{text[:80]} is no search space") from None


def write_architectures(architectures: Sequence[Architecture]) -> str:
    """Return architectures as text."""
    return json.dumps([list(each) for each in architectures])


def read_architectures(text: str, space: Space) -> list[Architecture]:
    """Undo :func:`write_architectures`.

    Raises
    ------
    ReplyError
        A text that is none.
    ConfigError
        An architecture that the space does not have.
    """
    try:
        said = [[int(one) for one in each] for each in json.loads(text)]
    except (ValueError, TypeError):
        raise ReplyError(f"{text[:80]} are no architectures") from None
    return [space.check(each) for each in said]


def write_question(question: Question, calibration: Calibration) -> tuple[Config, Named]:
    """Return a question as plain values and tensors; each device's :class:`Place` is to be added."""
    tensors = {f"common.{name}": value for name, value in question.common.items()}
    for number, (known, given) in enumerate(zip(question.known, question.given, strict=True)):
        tensors[f"{number}.known"] = write_statistics(known)
        tensors |= {f"{number}.{name}": value for name, value in given.items()}
    config: Config = {
        "kind": question.kind,
        "architectures": write_architectures(question.architectures),
        "seed": calibration.seed,
        **plain("batchnorm", calibration.config),
    }
    return config, tensors


def read_question(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], supernet: Supernet
) -> tuple[Question, Calibration, Place]:
    """Undo :func:`write_question`.

    Raises
    ------
    ReplyError, ConfigError
        A question that is none, or is about another space.
    """
    if config.get("kind") not in KINDS:
        raise ReplyError(f"{config.get('kind')} is no question about a search; it must be one of {', '.join(KINDS)}")
    architectures = read_architectures(str(config["architectures"]), supernet.space)
    known, given = [], []
    for number, architecture in enumerate(architectures):
        own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{number}.")}
        if "known" not in own:
            raise ReplyError(f"candidate {number} of the question came without statistics")
        known.append(read_statistics(own.pop("known"), supernet, architecture))
        given.append(own)
    common = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith("common.")}
    question = Question(str(config["kind"]), architectures, known, given, common)
    calibration = Calibration(int(config["seed"]), read(BatchNormConfig, "batchnorm", config))
    return question, calibration, Place(int(config["first"]), int(config["total"]))


def write_answers(answers: Sequence[Tensor]) -> Named:
    """Return answers as tensors by the number of their candidate."""
    return {str(number): answer.cpu() for number, answer in enumerate(answers)}


def read_answers(
    tensors: Mapping[str, Tensor], like: Sequence[int], kind: str, validation: Sequence[int]
) -> list[Tensor]:
    """Undo :func:`write_answers`, for answers of given lengths.

    Parameters
    ----------
    kind
        Of the question.
    validation
        The validation images that the device said it has, by class.

    Raises
    ------
    ReplyError
        Another number of answers, another length, what is not finite, a tally of other images.
    """
    if len(tensors) != len(like):
        raise ReplyError(f"answers about {len(tensors)} candidates; {len(like)} were asked about")
    found = []
    for number, length in enumerate(like):
        answer = tensors.get(str(number))
        if answer is None or answer.shape != (length,):
            raise ReplyError(f"the answer about candidate {number} has not the {length} numbers that are due")
        if not bool(torch.isfinite(answer).all()):
            raise ReplyError(f"the answer about candidate {number} is not all finite numbers")
        if answer.dtype != (torch.int64 if kind == "accuracy" else torch.float64):
            raise ReplyError(f"the answer about candidate {number} is of {answer.dtype}")
        if kind in SCORES:
            correct, total = torch.chunk(answer, 2)
            if total.tolist() != list(validation) or bool(((correct < 0) | (correct > total)).any()):
                raise ReplyError(f"the tally of candidate {number} is not one of the {sum(validation)} images it has")
        found.append(answer)
    return found
