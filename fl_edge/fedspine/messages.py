"""What goes to a device and what comes back, as plain values and named tensors, and the check of what comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.fedspine.config import FedSpineConfig
from fl_edge.fedspine.factors import Factors, gather
from fl_edge.fedspine.importance import UnitScores
from fl_edge.fedspine.replies import checked_adapter, checked_samples, named
from fl_edge.fedspine.training import LocalRound, TrainingSettings
from fl_edge.pruning import Member, PruningPlan, kept_indices
from fl_edge.pruning.plan import UNITS, Unit

_LARGEST = 1e12  # of a device's seconds, losses and bits a second


@dataclass(frozen=True)
class Order:
    """One device's work in one round."""

    server_round: int
    seed: int
    plan: PruningPlan
    rank: int
    tau: int
    batch_size: int
    probe_batches: int
    settings: TrainingSettings

    def to_config(self) -> dict[str, Any]:
        """Return plain values that a ConfigRecord takes."""
        return {
            "round": self.server_round, "seed": self.seed, "plan": json.dumps(self.plan.to_record()), "rank": self.rank,
            "tau": self.tau, "batch_size": self.batch_size, "probe_batches": self.probe_batches, **vars(self.settings),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Order:
        """Undo :meth:`to_config`."""
        settings = TrainingSettings(**{name: config[name] for name in TrainingSettings.__dataclass_fields__})
        plan = PruningPlan.from_record(json.loads(config["plan"]))
        round_, seed, rank, tau, size, probes = (
            int(config[name]) for name in ("round", "seed", "rank", "tau", "batch_size", "probe_batches")
        )
        return cls(round_, seed, plan, rank, tau, size, probes, settings)


@dataclass(frozen=True)
class Reply:
    """What a device's round came to, checked."""

    adapter: dict[str, Factors]
    head: dict[str, Tensor]
    importance: UnitScores
    steps: int
    samples: int
    loss_before: float
    loss_after: float
    update_importance: float
    compute_s: float
    bandwidth_bps: float  # 0 where it is measured by the server, or counts as free


def make_order(config: FedSpineConfig, seed: int, server_round: int, plan: PruningPlan, rank: int) -> Order:
    """Return the order of a round."""
    settings = TrainingSettings(
        learning_rate=config.learning_rate_at(server_round),
        scale=config.scale,
        dropout=config.dropout,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        smoothing=config.smoothing,
        normalise=config.normalise,
    )
    return Order(server_round, seed, plan, rank, config.tau, config.batch_size, config.probe_batches, settings)


def kept(member: Member, plan: PruningPlan) -> tuple[Tensor | None, Tensor | None]:
    """Return (rows, columns) of a linear map that a plan keeps; None for all."""
    if len(plan.kept(member.layer, member.unit)) == plan.total(member.layer, member.unit):
        return None, None
    index = kept_indices(member, plan)
    return (index, None) if member.axis == 0 else (None, index)


def device_adapter(
    adapter: Mapping[str, Factors], members: Sequence[Member], plan: PruningPlan, rank: int
) -> dict[str, Factors]:
    """Return what a device receives of the global adapter: its rank's directions at its kept rows and columns."""
    return {member.path: gather(adapter[member.path], rank, *kept(member, plan)) for member in members}


def order_tensors(adapter: Mapping[str, Factors], head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of an order."""
    return named(adapter) | {f"head.{name}": tensor for name, tensor in head.items()}


def read_order_tensors(
    tensors: Mapping[str, Tensor], members: Sequence[Member]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Return (adapter, head) of an order.

    Raises
    ------
    ReplyError
        Factors that are missing.
    """
    try:
        adapter = {
            each.path: Factors(tensors[f"{each.path}.lora_A.weight"], tensors[f"{each.path}.lora_B.weight"])
            for each in members
        }
    except KeyError as error:
        raise ReplyError(f"the order holds no {error.args[0]}; server and device have different models") from None
    return adapter, {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}


def reply_config(
    order: Order, done: LocalRound, samples: int, compute_s: float, bandwidth_bps: float
) -> dict[str, Any]:
    """Return the plain values of a reply."""
    return {
        "round": order.server_round, "plan": order.plan.digest(), "rank": order.rank, "samples": samples,
        "steps": done.importance.steps, "loss_before": done.loss_before, "loss_after": done.loss_after,
        "update_importance": done.update_importance, "compute_s": compute_s, "bandwidth_bps": bandwidth_bps,
    }  # fmt: skip


def reply_tensors(done: LocalRound) -> dict[str, Tensor]:
    """Name the tensors of a reply."""
    scores = {
        _score_name(layer, unit): score.float()
        for layer, units in enumerate(done.importance.mean or [])
        for unit, score in units.items()
    }
    return order_tensors(done.adapter, done.head) | scores


def checked_reply(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    order: Order,
    members: Sequence[Member],
    head: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
) -> Reply:
    """Return a device's reply, or say in one line why it cannot be used.

    Parameters
    ----------
    order
        What the device was asked to do.
    members
        Linear maps of the unpruned model.
    head
        The head that it was sent.
    shapes
        (d_out, d_in) of each map of the unpruned model, by path.

    Raises
    ------
    ReplyError
        Another round, plan or rank; numbers that are not finite or impossible; a tensor missing, unexpected or of
        another shape.
    """
    if config.get("round") != order.server_round:
        raise ReplyError(f"it answers round {config.get('round')}; round {order.server_round} was due")
    if config.get("plan") != order.plan.digest():
        raise ReplyError("it has pruned by another plan than the one it was sent")
    if config.get("rank") != order.rank:
        raise ReplyError(f"it has trained rank {config.get('rank')}; {order.rank} was given")
    numbers = {
        name: checked_number(config, name)
        for name in ("loss_before", "loss_after", "update_importance", "compute_s", "bandwidth_bps")
    }
    steps = int(checked_number(config, "steps"))
    if steps > order.tau:
        raise ReplyError(f"its importance is of {steps} iterations; {order.tau} were asked for")
    due = {}
    for member in members:
        rows, columns = kept(member, order.plan)
        d_out, d_in = shapes[member.path]
        due[member.path] = (d_out if rows is None else len(rows), d_in if columns is None else len(columns))
    heads = {f"head.{name}": _like(tensors, f"head.{name}", tensor.shape) for name, tensor in head.items()}
    scores = _scores(tensors, order.plan) if steps else {}
    factors = {name: tensor for name, tensor in tensors.items() if name not in heads and name not in scores}
    return Reply(
        adapter=checked_adapter(factors, due, order.rank),
        head={name: heads[f"head.{name}"] for name in head},
        importance=[
            {unit: scores[_score_name(layer, unit)] for unit in UNITS}
            for layer in range(len(order.plan.layers) if steps else 0)
        ],
        steps=steps,
        samples=checked_samples(int(checked_number(config, "samples"))),
        **numbers,
    )


def checked_number(config: Mapping[str, Any], name: str) -> float:
    """Return a number of a reply.

    Raises
    ------
    ReplyError
        There is none, it is below 0, not finite, or so large that a mean over devices would drown in it.
    """
    value = config.get(name)
    if not isinstance(value, int | float) or not 0 <= value < _LARGEST:
        raise ReplyError(f"{name} is {value}; a number of at least 0 and below {_LARGEST:g} is due")
    return float(value)


def _score_name(layer: int, unit: Unit) -> str:
    return f"importance.{layer}.{unit}"


def _scores(tensors: Mapping[str, Tensor], plan: PruningPlan) -> dict[str, Tensor]:
    scores = {
        (name := _score_name(layer, unit)): _like(tensors, name, (len(plan.kept(layer, unit)),))
        for layer in range(len(plan.layers))
        for unit in UNITS
    }
    for name, score in scores.items():
        if (score < 0).any():
            raise ReplyError(f"{name}: numbers below 0")
    return scores


def _like(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
    found = tensors.get(name)
    if found is None or tuple(found.shape) != tuple(shape) or not found.is_floating_point():
        there = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
        raise ReplyError(f"{name} is {there}; floating numbers of shape {tuple(shape)} were due")
    if not torch.isfinite(found).all():
        raise ReplyError(f"{name}: numbers that are not all finite")
    return found
