"""What happens in :mod:`benchmarks.hat_real`: requests, when they come, prompts, devices, and the methods.

The paper's 13B setting: prompts of CNN/DM's lengths at 4 requests a second, 30 devices with the speeds and links of the
virtual clock (:mod:`fl_edge.hat.simulated_report`). An answer has 32 tokens instead of 128: a device has one request at
a time, and 30 devices can carry as many requests as U-shape then has under way. A batch of the cloud costs the same up
to 512 rows, so requests that are not there would cost others nothing but their prompts.

All of it runs in slow motion, twice as slow, so that what is held is longer than what this machine needs for it: 512
rows with their histories take one core longer than the 13 ms that a stage of the paper's cloud has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.hat_heads import heads_for
from benchmarks.hat_models import LLAMA, adapter_for, device_model, prompts
from benchmarks.hat_real_devices import Asked
from fl_edge.hat.config import HatConfig
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.simulated_cloud import StageDelay
from fl_edge.hat.simulated_device import Device
from fl_edge.hat.simulated_report import CNN_DM
from fl_edge.seeding import numpy_rng

CAPACITY = 2048
DEVICES, REQUESTS, NEW_TOKENS = 30, 120, 32
QUICK_DEVICES, QUICK_REQUESTS, QUICK_NEW_TOKENS = 8, 8, 8
MARGIN = 0.25  # of the requests at either end load the cloud but are not counted: U-shape has 30 under way at once
SLOWER = 2.0  # times, all of it
DELAY = StageDelay(SLOWER * CNN_DM.delay.base_s, SLOWER * CNN_DM.delay.token_s, CNN_DM.delay.knee)
LONGEST = CAPACITY - NEW_TOKENS - 32  # of a prompt
BUDGET = 512  # rows of a batch


@dataclass(frozen=True)
class Method:
    """What devices and cloud do.

    Attributes
    ----------
    drafts
        ``adapter``, ``medusa`` or nothing.
    limits
        Of the cloud's batches.
    settings
        Of :class:`~fl_edge.hat.config.HatConfig`, beside the number of new tokens.
    """

    drafts: str
    limits: Limits
    settings: Mapping[str, Any]

    def config(self, new_tokens: int) -> HatConfig:
        """Return how a device generates."""
        return HatConfig(new_tokens=new_tokens, **self.settings)


_PLAIN = {"chunking": "none", "max_drafts": 0, "guesses": 0}
HAT_PLUS, BYTES, U_SHAPE = "HAT+", "HAT+, bytes", "U-shape"
HATS = {f"HAT, threshold {threshold:g}": threshold for threshold in (0.6, 0.3, 0.1)}  # the first is the paper's
SARATHI = {
    f"U-Sarathi, {tokens} rows" + (f", {chunk} a prompt" if chunk else ""): Limits(tokens, chunk)
    for tokens, chunk in ((512, 0), (512, 256), (256, 0))
}
MEDUSA = {f"U-Medusa, trees of {rows}": rows for rows in (5, 9, 16)}
METHODS = {
    **{name: Method("adapter", Limits(BUDGET), {"threshold": threshold}) for name, threshold in HATS.items()},
    HAT_PLUS: Method("adapter", Limits(BUDGET), {"adaptive": True}),
    BYTES: Method("adapter", Limits(BUDGET), {"adaptive": True, "int8": True}),
    U_SHAPE: Method("", Limits(), _PLAIN),
    **{name: Method("", limits, _PLAIN) for name, limits in SARATHI.items()},
    **{
        name: Method("medusa", Limits(), {"chunking": "none", "guesses": 0, "tree_rows": rows})
        for name, rows in MEDUSA.items()
    },
}


def load_parts(quick: bool) -> dict[str, Any]:
    """Return what a device computes with: its part of the model, an adapter, Medusa's heads."""
    model = device_model(LLAMA, quick)
    return {"model": model, "adapter": adapter_for(LLAMA, model, quick), "medusa": heads_for(LLAMA, model, quick)}


def requests(seed: int, quick: bool) -> tuple[list[list[Asked]], int]:
    """Return each device's requests, by time, and the new tokens of each; the same for all methods."""
    devices, count, new_tokens = (
        (QUICK_DEVICES, QUICK_REQUESTS, QUICK_NEW_TOKENS) if quick else (DEVICES, REQUESTS, NEW_TOKENS)
    )
    times = numpy_rng(seed, "hat", "arrivals").exponential(SLOWER / CNN_DM.rate, count).cumsum().tolist()
    lengths = replace(CNN_DM.prompts, longest=LONGEST).draw(seed, count)
    texts: Sequence[Any] = prompts(count, LONGEST, LONGEST, seed)
    asked: list[list[Asked]] = [[] for _ in range(devices)]
    for number, (at, length, text) in enumerate(zip(times, lengths, texts, strict=True)):
        device = number % devices
        machine = _slower(CNN_DM.bed.draw(seed, device, number // devices))
        asked[device].append(Asked(number, at, text[:length].tolist(), machine))
    return asked, new_tokens


def _slower(device: Device) -> Device:
    speeds = {name: getattr(device, name) / SLOWER for name in ("read_bytes_s", "flops", "up", "down")}
    return replace(device, latency_s=SLOWER * device.latency_s, **speeds)
