"""Which units of a model stay: a small value that a server and its devices hand to each other."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from fl_edge.errors import ConfigError

Unit = Literal["heads", "channels"]
UNITS: tuple[Unit, ...] = ("heads", "channels")


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps, numbered as in the unpruned model, ascending; where both are empty the layer is removed."""

    heads: tuple[int, ...]  # attention heads; with grouped queries, key/value groups with their query heads
    channels: tuple[int, ...]  # channels of the feed-forward network

    @property
    def removed(self) -> bool:
        """Whether the layer is gone, with its norms and biases."""
        return not self.heads and not self.channels


@dataclass(frozen=True)
class PruningPlan:
    """What every layer of a model keeps. Layers, too, are numbered as in the unpruned model, removed ones included.

    Attributes
    ----------
    model_type
        The Hugging Face name of the architecture, for example ``"bert"``.
    heads, channels
        Units of each layer before pruning.
    layers
        What each layer keeps: at least one head and one channel, or neither where the layer is removed; at least one
        layer stays.

    Raises
    ------
    ConfigError
        Units that are not ascending or not in the model, a layer that keeps only heads or only channels, or no layer.
    """

    model_type: str
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        if not len(self.heads) == len(self.channels) == len(self.layers) > 0:
            raise ConfigError(
                f"a pruning plan names {len(self.heads)} layers' heads, {len(self.channels)} layers' channels and "
                f"{len(self.layers)} layers; it must be the same number, at least 1"
            )
        if not self.layers_kept:
            raise ConfigError(f"the pruning plan removes all {len(self.layers)} layers; at least one must stay")
        for layer in self.layers_kept:
            for unit in UNITS:
                kept, total = self.kept(layer, unit), self.total(layer, unit)
                if not kept:
                    raise ConfigError(
                        f"the pruning plan leaves layer {layer} no {unit}; at least one must stay, "
                        "or neither heads nor channels, which removes the layer"
                    )
                if kept[0] < 0 or kept[-1] >= total or any(a >= b for a, b in pairwise(kept)):
                    raise ConfigError(
                        f"the pruning plan's {unit} of layer {layer} must be ascending numbers below {total}"
                    )

    @property
    def layers_kept(self) -> tuple[int, ...]:
        """The layers that stay, ascending."""
        return tuple(index for index, layer in enumerate(self.layers) if not layer.removed)

    def restricted(self, layers: Sequence[int]) -> PruningPlan:
        """Return the plan of the model that has only these layers, which it numbers anew from 0.

        With ``present.layers_kept`` it is the plan in the numbering of a model that was sliced by ``present``.

        Raises
        ------
        ConfigError
            Layers that are not ascending, not in the plan, or all removed by it.
        """
        chosen = tuple(layers)
        if any(a >= b for a, b in pairwise(chosen)) or not set(chosen) <= set(range(len(self.layers))):
            raise ConfigError(f"layers {list(chosen)} must be ascending numbers below {len(self.layers)}")
        return PruningPlan(
            self.model_type,
            tuple(self.heads[layer] for layer in chosen),
            tuple(self.channels[layer] for layer in chosen),
            tuple(self.layers[layer] for layer in chosen),
        )

    def kept(self, layer: int, unit: Unit) -> tuple[int, ...]:
        """Return the units that a layer keeps."""
        return self.layers[layer].heads if unit == "heads" else self.layers[layer].channels

    def total(self, layer: int, unit: Unit) -> int:
        """Return how many units a layer has before pruning."""
        return self.heads[layer] if unit == "heads" else self.channels[layer]

    def unpruned(self) -> PruningPlan:
        """Return the plan of the same model that keeps everything."""
        layers = (LayerPlan(tuple(range(h)), tuple(range(c))) for h, c in zip(self.heads, self.channels, strict=True))
        return PruningPlan(self.model_type, self.heads, self.channels, tuple(layers))

    def covers(self, other: PruningPlan) -> bool:
        """Whether ``other`` belongs to the same model and keeps nothing that this plan has removed."""
        return (self.model_type, self.heads, self.channels) == (other.model_type, other.heads, other.channels) and all(
            set(mine.heads) >= set(theirs.heads) and set(mine.channels) >= set(theirs.channels)
            for mine, theirs in zip(self.layers, other.layers, strict=True)
        )

    def to_record(self) -> dict[str, Any]:
        """Return the plan as plain JSON values; kept sets are hexadecimal bit masks, unit 0 the lowest bit."""
        return {
            "model_type": self.model_type,
            **{unit: [self.total(layer, unit) for layer in range(len(self.layers))] for unit in UNITS},
            **{
                f"kept_{unit}": [
                    _to_mask(self.kept(layer, unit), self.total(layer, unit)) for layer in range(len(self.layers))
                ]
                for unit in UNITS
            },
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PruningPlan:
        """Return the plan of a record made by :meth:`to_record`; whatever else arrives is refused.

        Raises
        ------
        ConfigError
            A key that is missing or unknown, a value of another kind, a mask that does not fit its layer.
        """
        keys = {"model_type", *UNITS, *(f"kept_{unit}" for unit in UNITS)}
        if not isinstance(record, Mapping) or set(record) != keys:
            raise ConfigError(f"a pruning plan's record must have exactly the keys {', '.join(sorted(keys))}")
        if not isinstance(record["model_type"], str):
            raise ConfigError("a pruning plan's model_type must be a text")
        totals = {unit: _counts(record[unit], unit) for unit in UNITS}
        kept = {unit: _from_masks(record[f"kept_{unit}"], totals[unit], unit) for unit in UNITS}
        layers = tuple(LayerPlan(*both) for both in zip(kept["heads"], kept["channels"], strict=False))
        return cls(record["model_type"], totals["heads"], totals["channels"], layers)

    def digest(self) -> str:
        """Return 32 hexadecimal digits that are equal exactly for equal plans."""
        text = json.dumps(self.to_record(), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _to_mask(kept: Sequence[int], total: int) -> str:
    return f"{sum(1 << unit for unit in kept):0{_digits(total)}x}"


def _digits(total: int) -> int:
    return (total + 3) // 4


def _counts(values: Any, unit: Unit) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not all(type(value) is int and value > 0 for value in values):
        raise ConfigError(f"a pruning plan's {unit} must be a list of whole numbers, each at least 1")
    return tuple(values)


def _from_masks(masks: Any, totals: Sequence[int], unit: Unit) -> list[tuple[int, ...]]:
    if not isinstance(masks, list | tuple) or len(masks) != len(totals):
        raise ConfigError(f"a pruning plan's kept_{unit} must be a list of {len(totals)} masks, one a layer")
    found = []
    for layer, (mask, total) in enumerate(zip(masks, totals, strict=True)):
        if not isinstance(mask, str) or len(mask) != _digits(total) or not re.fullmatch("[0-9a-f]+", mask):
            raise ConfigError(
                f"the pruning plan's kept_{unit} of layer {layer} must be {_digits(total)} hexadecimal digits"
            )
        bits = int(mask, 16)
        found.append(tuple(index for index in range(bits.bit_length()) if bits >> index & 1))
    return found
