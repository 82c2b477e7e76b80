"""Federated training of the adapter: rounds of local training, and a weighted mean (FedAvg).

*Ours*: the paper does not tell where its adapter is trained. What a device does in a round is HAT's distillation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.hat.adapter import Adapter
from fl_edge.hat.config import TrainingConfig
from fl_edge.hat.distillation import Course, Lessons, Likeness, compare, train
from fl_edge.hat.split import DeviceModel
from fl_edge.models.averaging import check_weights

_LARGEST = 1e15

Weights = dict[str, Tensor]


def course(config: TrainingConfig, server_round: int) -> Course:
    """Return how devices train in a round, counted from 1: the rate falls linearly from round to round, and in each."""
    rate = config.rate * (config.rounds - server_round + 1) / config.rounds
    return Course(config.steps, config.batch_size, rate, token_weight=config.token_weight)


@dataclass(frozen=True)
class Learned:
    """What a device has to say after a round.

    Attributes
    ----------
    weights
        Of its adapter.
    tokens
        That it was trained on, its weight in the mean.
    before
        How near the adapter that it was sent was to the whole model, on sequences that no device trains on.
    loss
        Mean over the steps.
    """

    weights: Weights
    tokens: int
    before: Likeness
    loss: float

    def to_config(self) -> dict[str, Any]:
        """Return all but the weights as plain values."""
        return {"tokens": self.tokens, "loss": self.loss, **{f"before.{k}": v for k, v in asdict(self.before).items()}}

    @classmethod
    def checked(cls, config: Mapping[str, Any], weights: Weights, like: Mapping[str, Tensor]) -> Learned:
        """Undo :meth:`to_config`, for weights that are to be of the same kind as others.

        Raises
        ------
        ReplyError
            What cannot be used.
        """
        check_weights(weights, like)
        names = ("tokens", "loss", *(f"before.{each.name}" for each in fields(Likeness)))
        for name in names:
            value: Any = config.get(name)
            if type(value) not in (int, float) or not 0 <= value < _LARGEST:
                raise ReplyError(f"{name}={value!r} of a trained adapter must be a number from 0 on")
        tokens, loss, *before = (config[name] for name in names)
        if tokens != int(tokens) or not tokens:
            raise ReplyError(f"an adapter was trained on tokens={tokens}; 1 at least are due")
        return cls(weights, int(tokens), Likeness(*before), float(loss))


def learn(
    model: DeviceModel,
    weights: Mapping[str, Tensor],
    lessons: Lessons,
    order: Course,
    held_out: float,
    seed: int,
) -> Learned:
    """Train an adapter on a device for one round.

    Parameters
    ----------
    weights
        Of the adapter that the server sent.
    lessons
        The device's own.
    order
        How.
    held_out
        Share of the sequences, the last ones, that are not trained on.
    seed
        Of this device and round.

    Raises
    ------
    ReplyError
        Weights that are no adapter of this model, or too few sequences.
    TrainingError
        A loss that is not a number.
    """
    adapter = fitted(model, weights).train()
    kept = len(lessons) - max(1, round(held_out * len(lessons)))
    if kept < 1:
        raise ReplyError(f"{len(lessons)} sequences are too few to train on some and to test on others; at least 2")
    own, test = _part(lessons, slice(kept)), _part(lessons, slice(kept, None))
    before = compare(adapter, model, test, token_weight=order.token_weight)
    losses = list[float]()
    train(adapter, model, own, order, seed, lambda _step, loss: losses.append(loss))
    found = {name: tensor.detach().cpu() for name, tensor in adapter.state_dict().items()}
    return Learned(found, int(own.mask.sum()), before, sum(losses) / len(losses))


def fitted(model: DeviceModel, weights: Mapping[str, Tensor]) -> Adapter:
    """Return an adapter in float32 with given weights, where the model is.

    Raises
    ------
    ReplyError
        Weights that are no adapter of this model.
    """
    adapter = Adapter(model.config)
    check_weights(weights, adapter.state_dict())
    adapter.load_state_dict(weights)
    return adapter.to(model.device)


def drafting(model: DeviceModel, weights: Mapping[str, Tensor]) -> Adapter:
    """Return an adapter with given weights to draft with: frozen, and of the model's type; raises as :func:`fitted`."""
    return fitted(model, weights).to(model.dtype).requires_grad_(False).eval()


def figures(learned: Sequence[Learned]) -> dict[str, float]:
    """Return the means of what devices measured, weighted by tokens, by their names in :class:`AdapterRound`."""
    total = sum(each.tokens for each in learned) or 1
    shares = [each.tokens / total for each in learned]
    return {
        "agreement": sum(share * each.before.agreement for share, each in zip(shares, learned, strict=True)),
        "overlap": sum(share * each.before.overlap for share, each in zip(shares, learned, strict=True)),
        "loss": sum(share * each.loss for share, each in zip(shares, learned, strict=True)),
    }


@dataclass(frozen=True)
class AdapterRound:
    """One round of the adapter's training.

    Attributes
    ----------
    server_round
        From 1.
    devices
        That answered.
    agreement, overlap
        Of the adapter before the round with the whole model, on held-out text, see
        :class:`~fl_edge.hat.distillation.Likeness`; mean over the devices by their tokens.
    loss
        Of the devices' steps, mean.
    absent
        Device -> why it does not count.
    up_bytes, down_bytes
        Of adapters.
    real_s
        Seconds.
    """

    server_round: int
    devices: int
    agreement: float
    overlap: float
    loss: float
    absent: Mapping[str, str] = field(default_factory=dict)
    up_bytes: int = 0
    down_bytes: int = 0
    real_s: float = 0.0

    def line(self, rounds: int, left_s: float) -> str:
        """Say it in one line, with the seconds that are left."""
        return (
            f"adapter {self.server_round:3d}/{rounds}  loss {self.loss:.3f}  agreed on {100 * self.agreement:.1f} % of "
            f"tokens before  {self.devices} devices  {self.real_s:.1f} s  left {left_s:.0f} s"
        )

    def scalars(self) -> dict[str, float | None]:
        """Return what is followed over the rounds."""
        return {"adapter/agreement": self.agreement, "adapter/overlap": self.overlap, "adapter/loss": self.loss}

    def histograms(self) -> dict[str, Sequence[float]]:
        """Return nothing: no value a device is kept."""
        return {}

    def to_record(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"kind": "adapter", **asdict(self), "absent": dict(self.absent)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> AdapterRound:
        """Undo :meth:`to_record`."""
        return cls(**{name: value for name, value in record.items() if name != "kind"})


def _part(lessons: Lessons, which: slice) -> Lessons:
    return Lessons(lessons.states[which], lessons.rows[which], lessons.mask[which])
