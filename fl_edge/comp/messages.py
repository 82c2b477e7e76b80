"""What goes to a device and what comes back, as plain values and named tensors, and the check of what comes back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fl_edge.comp.config import CompConfig
from fl_edge.comp.history import Step
from fl_edge.comp.pooled import Answer, Dense, Measure, Question, Similar, Skipped
from fl_edge.comp.similarity import Similarity
from fl_edge.comp.sums import Form, Sums
from fl_edge.comp.survey import NONE, Loss
from fl_edge.errors import ConfigError, ReplyError
from fl_edge.pruning import PruningPlan
from fl_edge.pruning.plan import UNITS, Unit

_KINDS: dict[str, type[Question]] = {each.__name__: each for each in (Similar, Skipped, Measure, Dense)}
_SLACK = 1e-3  # of inequalities that hold exactly for true sums, which float32 has rounded
_LARGEST = 1e30  # of a sum; what is larger drowns the others'

Shape = Callable[[int, Unit], tuple[int, int]]


@dataclass(frozen=True)
class Order:
    """A question to a device, with the steps that it may not have followed yet.

    Attributes
    ----------
    question
        None: only follow.
    first
        Number of the first step that is sent.
    steps
        In order.
    form, wire
        What of the statistics is to come back, and as which type: float32 or float64.
    session
        Names the pruned model that the device makes by the way.
    measures
        Whether the device takes its text along when it follows.
    """

    session: str
    measures: bool
    config: CompConfig
    question: Question | None
    first: int
    steps: Sequence[Step]
    form: Form
    wire: str

    def to_config(self) -> dict[str, Any]:
        """Return plain values that a ConfigRecord takes."""
        asked = None if self.question is None else {"kind": type(self.question).__name__, **asdict(self.question)}
        steps = [{"layer": step.layer, "unit": step.unit, "growth": step.growth} for step in self.steps]
        return {
            "session": self.session, "measures": self.measures, "config": config_text(self.config),
            "question": json.dumps(asked), "first": self.first, "steps": json.dumps(steps), "form": self.form,
            "wire": self.wire,
        }  # fmt: skip

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the steps by name."""
        return {
            f"{number}.{name}": tensor
            for number, step in enumerate(self.steps)
            for name, tensor in step.to_tensors().items()
        }

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Order:
        """Undo :meth:`to_config` and :meth:`to_tensors`."""
        asked = json.loads(config["question"])
        about = json.loads(config["steps"])
        parts: list[dict[str, Tensor]] = [{} for _ in about]
        for name, tensor in tensors.items():
            number, _, key = name.partition(".")
            parts[int(number)][key] = tensor
        steps = [
            Step.from_tensors(each["layer"], each["unit"], each["growth"], part)
            for each, part in zip(about, parts, strict=True)
        ]
        question = None if asked is None else _question(asked)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", session := str(config["session"])):
            raise ReplyError(f"session {session!r} is not a name of letters, digits, dashes and underscores")
        first, form, wire = int(config["first"]), config["form"], str(config["wire"])
        return cls(session, bool(config["measures"]), read_config(config), question, first, steps, form, wire)


def config_text(config: CompConfig) -> str:
    """Return the settings of the method as text, those of a run left out."""
    return json.dumps({name: getattr(config, name) for name in CompConfig.__dataclass_fields__})


def read_config(config: Mapping[str, Any]) -> CompConfig:
    """Return the settings in an order."""
    return CompConfig(**json.loads(config["config"]))


def plan_text(plan: PruningPlan) -> str:
    """Return a plan as text."""
    return json.dumps(plan.to_record())


def read_plan_record(config: Mapping[str, Any]) -> PruningPlan:
    """Return the plan in an order or a reply.

    Raises
    ------
    ReplyError
        None there, or one that is no plan.
    """
    try:
        return PruningPlan.from_record(json.loads(config["plan"]))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise ReplyError(f"it sends no pruning plan: {error}") from None


def answer_config(answer: Answer) -> dict[str, Any]:
    """Return the plain values of an answer."""
    plain = [
        [*_key(key), value.tokens] if isinstance(value, Sums) else [key, *asdict(value).values()]
        for key, value in answer.items()
    ]
    return {"sums": json.dumps(plain)}


def answer_tensors(answer: Answer, wire: str) -> dict[str, Tensor]:
    """Return the tensors of an answer by name."""
    return {
        f"{'.'.join(map(str, key))}.{name}": tensor.to(getattr(torch, wire))
        for key, value in answer.items()
        if isinstance(value, Sums)
        for name, tensor in value.tensors.items()
    }


def checked_answer(
    question: Question,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    form: Form,
    tokens: int,
    layers: int,
    shape: Shape,
) -> Answer:
    """Return a device's answer in float64, or say in one line why it cannot be used.

    Parameters
    ----------
    form
        What of the statistics was asked for.
    tokens
        Of the device's text, as it said before.
    layers
        Of the unpruned model.
    shape
        (layer, unit) -> (n, o) of the map that the units flow into, as it is now.

    Raises
    ------
    ReplyError
        Sums of other layers or of another number of tokens than were due, a tensor missing, unexpected or of another
        shape, numbers that are not finite, or that no text can give.
    """
    try:
        rows = [list(row) for row in json.loads(config["sums"])]
    except (KeyError, TypeError, ValueError):
        raise ReplyError("it sends no sums") from None
    if isinstance(question, Similar | Skipped):
        return _checked_plain(question, rows, tokens, layers)
    due = _due(question)
    if [tuple(row[:2]) for row in rows] != due:
        raise ReplyError(
            f"it sends sums of {[row[:2] for row in rows]}; those of {[list(key) for key in due]} were due"
        )
    names = {f"{layer}.{unit}.{name}" for layer, unit in due for name in _lengths(form, *shape(layer, unit))}
    if tensors.keys() != names:
        odd = min(tensors.keys() ^ names)
        raise ReplyError(f"{odd}: {'no such tensor was asked for' if odd in tensors else 'missing'}")
    return {
        (layer, unit): _checked_sums(f"{layer}.{unit}", row[2:], tensors, form, tokens, *shape(layer, unit))
        for (layer, unit), row in zip(due, rows, strict=True)
    }


def _question(asked: dict[str, Any]) -> Question:
    kind: Any = _KINDS[asked.pop("kind")]
    found: Question = kind(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}
    )
    return found


def _key(key: Any) -> list[Any]:
    return list(key) if isinstance(key, tuple) else [key]


def _due(question: Measure | Dense) -> list[tuple[int, Unit]]:
    if isinstance(question, Measure):
        return [(question.layer, question.unit)]
    return [(layer, unit) for layer in question.layers for unit in UNITS]


def _lengths(form: Form, n: int, o: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"gram": (n * (n + 1) // 2,), "inputs": (n,)}
    if form != "own":
        shapes |= {"targets": (o,), "energy": (1,), **({"matched": (n,)} if form == "mask" else {"cross": (n, o)})}
    return shapes


def _checked_plain(question: Similar | Skipped, rows: list[list[Any]], tokens: int, layers: int) -> Answer:
    kind: type[Similarity | Loss] = Similarity if isinstance(question, Similar) else Loss
    found: dict[int, Similarity | Loss] = {}
    for layer, *values in rows:
        numbers = len(values) == len(kind.__dataclass_fields__) and all(
            isinstance(value, int | float) and math.isfinite(value) and abs(value) < _LARGEST for value in values
        )
        if not numbers or not isinstance(layer, int) or layer in found:
            raise ReplyError(f"layer {layer}: its sums are {values}, which are not finite numbers of one layer")
        found[layer] = kind(*values)
    asked = {NONE, *question.candidates} if isinstance(question, Skipped) else set(range(layers))
    if found.keys() != (due := asked - set(question.removed)):
        raise ReplyError(f"it sends sums of layers {sorted(found)}; those of {sorted(due)} were due")
    for layer, each in found.items():
        if not 0 < each.tokens <= tokens or not _possible(each):
            raise ReplyError(f"layer {layer}: its sums over {each.tokens} of {tokens} tokens are such as no text gives")
    return found


def _possible(each: Similarity | Loss) -> bool:
    if isinstance(each, Loss):
        return each.total >= 0
    most = math.sqrt(max(each.before, 0.0) * max(each.after, 0.0)) * (1 + _SLACK)
    cosines = max(map(abs, (each.cosines, each.heads, each.channels)))
    return min(each.before, each.after) >= 0 and abs(each.products) <= most and cosines <= 1.001 * each.tokens


def _checked_sums(
    key: str, said: list[Any], tensors: Mapping[str, Tensor], form: Form, tokens: int, n: int, o: int
) -> Sums:
    if said != [tokens]:
        raise ReplyError(f"{key}: sums over {said} tokens; its text has {tokens}")
    found = {}
    for name, shape in _lengths(form, n, o).items():
        tensor = tensors[f"{key}.{name}"]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ReplyError(f"{key}.{name} is {tuple(tensor.shape)} {tensor.dtype}; floats of shape {shape} were due")
        found[name] = tensor.double()
        if not torch.isfinite(tensor).all() or (tensor.numel() and float(tensor.abs().max()) > _LARGEST):
            raise ReplyError(f"{key}.{name}: numbers that are not all finite")
    lines = torch.arange(n)
    diagonal = found["gram"][lines * (lines + 3) // 2]
    rows, columns = torch.tril_indices(n, n)
    bound = (1 + _SLACK) * (diagonal.clamp_min(0)[rows] * diagonal.clamp_min(0)[columns]).sqrt()
    if bool((diagonal < 0).any()) or bool((found["gram"].abs() > bound + _tiny(diagonal)).any()):
        raise ReplyError(f"{key}.gram is no Gram matrix: an entry is larger than its rows allow")
    if bool((found["inputs"].square() > (1 + _SLACK) * tokens * diagonal + _tiny(diagonal)).any()):
        raise ReplyError(f"{key}.inputs: sums that are larger than the Gram matrix allows")
    if "energy" in found and float(found["energy"]) < 0:
        raise ReplyError(f"{key}.energy is {float(found['energy'])}; at least 0 is due")
    return Sums(tokens, found)


def _tiny(diagonal: Tensor) -> float:
    return float(diagonal.abs().max()) * 1e-6
