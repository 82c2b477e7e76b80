"""Devices of the virtual clock: what the model's parts cost on them, their links, and how well their drafts do.

HAT: 20 Jetson AGX Xavier and 10 AGX Orin, a performance mode drawn anew every 5 requests, Wi-Fi of 5 to 10 MB/s up and
10 to 15 MB/s down at 2, 8 and 14 m; layers on the device, widths, accept lengths. *Ours*: every constant below that is
marked so; :mod:`fl_edge.hat.simulated_report` says on which of the paper's rows it was set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fl_edge.errors import ConfigError
from fl_edge.seeding import numpy_rng

DISTANCES_M = (2, 8, 14)
MODE_REQUESTS = 5  # requests of a device until it draws its mode anew (HAT)
MODES = (1.0, 0.95, 0.9, 0.85)  # speed in each mode, relative to the fastest (ours)
WEIGHT_BYTES = 2  # fp16
# Bytes a second from memory in the fastest mode: 137 and 205 GB/s by data sheet, of which a part is reached (ours)
READ_BYTES_S = {"xavier": 0.92 * 136.5e9, "orin": 0.92 * 204.8e9}
ORIN = 2.0  # operations a second of an Orin, relative to a Xavier (ours)
SWAY = 0.1  # by which a link's place between slowest and fastest changes from request to request, either way (ours)
UP_BYTES_S, DOWN_BYTES_S = (5e6, 10e6), (10e6, 15e6)
LATENCY_S = 0.0005  # of either direction (ours)
MESSAGE_S = 0.0001  # that each upload costs the link beyond its bytes (ours)


@dataclass(frozen=True)
class Shape:
    """A model cut in three, by its sizes.

    Attributes
    ----------
    hidden, intermediate, layers, vocabulary
        Of the whole model, Llama's kind without grouped queries.
    input_layers
        m, layers on the device.
    medusa_weights
        Of the Medusa heads that the paper trained for it.
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    input_layers: int
    medusa_weights: float

    @property
    def row_bytes(self) -> int:
        """A, bytes of one token's hidden state."""
        return WEIGHT_BYTES * self.hidden

    @property
    def input_weights(self) -> int:
        """Weights of the input submodel that are read for a token."""
        return self.input_layers * self._layer_weights

    @property
    def middle_weights(self) -> int:
        """Weights of the middle submodel."""
        return (self.layers - self.input_layers) * self._layer_weights

    @property
    def _layer_weights(self) -> int:
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate

    @property
    def adapter_weights(self) -> int:
        """Weights of the adapter: one attention block."""
        return 4 * self.hidden**2

    @property
    def head_weights(self) -> int:
        """Weights of the output submodel."""
        return self.hidden * self.vocabulary


VICUNA_7B = Shape(4096, 11008, 32, 32000, 2, 591e6)
VICUNA_13B = Shape(5120, 13824, 40, 32000, 3, 760e6)


@dataclass(frozen=True)
class Device:
    """One device for the time of one request.

    Attributes
    ----------
    read_bytes_s, flops
        Bytes a second from memory, and operations a second.
    up, down
        Bytes a second.
    latency_s
        Of either direction.
    message_s
        Seconds that each upload costs beyond its bytes.
    """

    read_bytes_s: float
    flops: float
    up: float
    down: float
    latency_s: float = LATENCY_S
    message_s: float = MESSAGE_S

    def seconds(self, weights: float, rows: int = 1) -> float:
        """Return what a part of the model takes for some rows: reading its weights once, or computing, the longer."""
        return max(WEIGHT_BYTES * weights / self.read_bytes_s, 2 * weights * rows / self.flops)


@dataclass(frozen=True)
class TestBed:
    """The devices of an experiment. Both fields are *ours*.

    Attributes
    ----------
    nearness
        Place of the link at each of :data:`DISTANCES_M` between the slowest, 0, and the fastest, 1.
    flops
        Operations a second of prompts through the input submodel on a Xavier in its fastest mode.
    devices
        How many; a third are Orins, and a third stand at each distance.
    """

    nearness: tuple[float, float, float]
    flops: float
    devices: int = 30

    __test__ = False  # not a test, whatever pytest thinks of the name

    def draw(self, seed: int, number: int, request: int) -> Device:
        """Return a device as it is for its ``request``-th request, counted from 0."""
        place = int(numpy_rng(seed, "hat", "devices").permutation(self.devices)[number])
        kind, speed = ("orin", ORIN) if place % 3 == 2 else ("xavier", 1.0)
        mode = MODES[int(numpy_rng(seed, "hat", "mode", number, request // MODE_REQUESTS).integers(len(MODES)))]
        sway = float(numpy_rng(seed, "hat", "link", number, request).uniform(-SWAY, SWAY))
        near = min(1.0, max(0.0, self.nearness[place * len(DISTANCES_M) // self.devices] + sway))
        up, down = (low + near * (high - low) for low, high in (UP_BYTES_S, DOWN_BYTES_S))
        return Device(READ_BYTES_S[kind] * mode, self.flops * speed * mode, up, down)


@dataclass(frozen=True)
class Drafting:
    """How drafts turn out: each goes on with one chance and holds with another, independently (ours).

    Attributes
    ----------
    accept_length
        Tokens a round on the average, the full model's own among them; at least 1.
    confident
        Chance that the device drafts on after a draft.
    cap
        Drafts a round at most.
    guessed
        Chance that the token after a whole accepted draft is among the k guesses.
    """

    accept_length: float
    confident: float = 0.5
    cap: int = 6
    guessed: float = 0.8

    @cached_property
    def held(self) -> float:
        """Chance that a draft is accepted, such that ``accept_length`` comes out.

        Raises
        ------
        ConfigError
            An accept length that drafts of this length cannot have.
        """
        low, high = 0.0, 1.0
        if not 1.0 <= self.accept_length <= self._length(1.0):
            raise ConfigError(
                f"an accept length of {self.accept_length} cannot be; with these drafts it must be at least 1 "
                f"and at most {self._length(1.0):.3g}"
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._length(middle) < self.accept_length else (low, middle)
        return (low + high) / 2

    def _length(self, held: float) -> float:
        return 1 + sum(self.confident ** (draft - 1) * held**draft for draft in range(1, self.cap + 1))
