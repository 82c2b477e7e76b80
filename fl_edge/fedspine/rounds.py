"""The server's part of a round, once the replies are there: aggregate, learn, remember."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fl_edge.fedspine.aggregation import aggregate, truncate
from fl_edge.fedspine.config import FedSpineConfig
from fl_edge.fedspine.deciding import Decision
from fl_edge.fedspine.factors import Factors, Part
from fl_edge.fedspine.messages import Order, Reply, kept
from fl_edge.fedspine.report import DeviceRound
from fl_edge.fedspine.reward import loss_drop, pruning_progress, rewards
from fl_edge.fedspine.state import FedSpineState
from fl_edge.fedspine.weighting import adapter_norm, device_weights
from fl_edge.pruning import Member
from fl_edge.seeding import torch_rng


@dataclass(frozen=True)
class Sent:
    """What a device was asked to do, and how many bytes that took."""

    device: str
    decision: Decision
    order: Order
    down_bytes: int


@dataclass(frozen=True)
class Done:
    """A device's reply that counts."""

    sent: Sent
    reply: Reply
    up_bytes: int
    transfer_s: float

    @property
    def busy_s(self) -> float:
        """t_i, completion time in seconds."""
        return self.reply.compute_s + self.transfer_s


def factors_to_send(state: FedSpineState, config: FedSpineConfig, seed: int) -> dict[str, Factors]:
    """Return the global factors, in an order in which their first r directions are what rank r receives."""
    generator = torch_rng(seed, "truncate", state.server_round)
    return {
        path: truncate(factors, config.max_rank, generator) if factors.rank != config.max_rank else factors
        for path, factors in sorted(state.adapter.items())  # the generator's order, also after a resume
    }


def aggregate_round(
    state: FedSpineState,
    config: FedSpineConfig,
    members: Sequence[Member],
    start: Mapping[str, Factors],
    done: Sequence[Done],
    seed: int,
    server_round: int,
) -> list[float]:
    """Put the devices' factors and heads into the global ones, in the order of `done`, and return their weights.

    Factors are weighted as `fl_edge.fedspine.weighting` says, heads by samples.

    Parameters
    ----------
    start
        The factors of rank r_max that the devices started from; what nobody holds stays as it is there.
    """
    replies = [each.reply for each in done]
    norms = [adapter_norm(reply.adapter.values()) for reply in replies] if config.weighting == "norm" else []
    weights = device_weights(
        [reply.samples for reply in replies],
        [each.sent.decision.after for each in done],
        [each.sent.order.rank for each in done],
        norms,
        config.weighting,  # type: ignore[arg-type] # one of its choices
    )
    generator = torch_rng(seed, "aggregate", server_round)
    for member in members:
        parts = (
            Part(each.reply.adapter[member.path], weight, *kept(member, each.sent.order.plan))
            for each, weight in zip(done, weights, strict=True)
        )
        state.adapter[member.path] = aggregate(
            config.aggregation,  # type: ignore[arg-type] # one of its choices
            parts,
            start[member.path],
            config.max_rank,
            generator,
        )
    samples = torch.tensor([reply.samples for reply in replies], dtype=torch.float64)
    for name, parameter in state.head.items():
        stacked = torch.stack([reply.head[name].double() for reply in replies])
        state.head[name] = torch.tensordot(samples / samples.sum(), stacked, 1).to(parameter.dtype)
    return weights


def learn(state: FedSpineState, config: FedSpineConfig, done: Sequence[Done]) -> list[DeviceRound]:
    """Give every bandit its reward, and remember of each device what the next round depends on.

    The loss that a round improves on is the one after the device's last round, so that a cut too deep counts against
    itself; in the first round, it is the one before training (ours).
    """
    known = [state.devices[each.sent.device] for each in done]
    decisions, replies = [each.sent.decision for each in done], [each.reply for each in done]
    before = [
        reply.loss_before if device.loss is None else device.loss for device, reply in zip(known, replies, strict=True)
    ]
    earned = rewards(
        config.reward,
        loss_drop(before, [reply.loss_after for reply in replies]),
        pruning_progress([d.before for d in decisions], [d.after for d in decisions], config.schedule.target),
        [reply.update_importance for reply in replies],
        [each.busy_s for each in done],
        [decision.could_prune for decision in decisions],
    )
    rows = []
    for device, decision, each, reward in zip(known, decisions, done, earned.tolist(), strict=True):
        reply = each.reply
        device.plan = decision.plan
        device.observe(reply.importance, reply.steps, config.smoothing)
        device.loss, device.samples = reply.loss_after, reply.samples
        device.participation += 1
        if config.choice == "bandit":
            device.agent.learn(decision.arm, reward)
        rows.append(
            DeviceRound(
                device=each.sent.device,
                ratio=decision.arm.ratio,
                rank=decision.arm.rank,
                why=decision.why,
                sparsity=decision.after,
                loss_before=reply.loss_before,
                loss_after=reply.loss_after,
                compute_s=reply.compute_s,
                transfer_s=each.transfer_s,
                reward=reward,
                cells=len(device.agent.leaves),
            )
        )
    return rows
