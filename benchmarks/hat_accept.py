"""Accept length, of :mod:`benchmarks.hat`: tokens that a round brings, on files that nothing was trained on.

Text goes on from held-out prompts without look-ahead, so that the figure hangs on no clock. The adapter drafts six
tokens at most and stops when it is less sure than a threshold: the paper's 0.6, or 0.1, since a model this small is
seldom sure, or never. Medusa's heads, trained on the same text by the same course, draft trees. *agreement* and
*overlap* are those of the adapter on the held-out text itself, token by token.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.hat_heads import heads_for
from benchmarks.hat_models import LLAMA, adapter_for, device_model, middle_model, prompts
from benchmarks.hat_rooms import CAPACITY, accept_length, make_cloud, serve
from fl_edge.hat.adapter import Adapter
from fl_edge.hat.config import HatConfig
from fl_edge.hat.distillation import compare, teach
from fl_edge.hat.session import DeviceSession

PROMPTS, TOKENS, QUICK_PROMPTS, QUICK_TOKENS = 40, 128, 6, 32
SHORTEST, LONGEST = 64, 512
_BASE = HatConfig(guesses=0, chunking="none")
PAPERS, OURS, MEDUSA_DRAFTS = "HAT, threshold 0.6", "HAT, threshold 0.1", "U-Medusa, trees of 9"
DRAFTS: Mapping[str, HatConfig] = {
    PAPERS: _BASE,
    "HAT, threshold 0.3": replace(_BASE, threshold=0.3),
    OURS: replace(_BASE, threshold=0.1),
    "HAT, threshold 0": replace(_BASE, threshold=0.0),
    "HAT, threshold 0.1, temperature 1": replace(_BASE, threshold=0.1, temperature=1.0),
    **{f"U-Medusa, trees of {rows}": replace(_BASE, tree_rows=rows) for rows in (5, 9, 16)},
}
HELD_OUT, QUICK_HELD_OUT = 32, 4  # sequences of held-out text
LENGTH = 512


def accept_case(drafts: str) -> str:
    """Return what the table calls a measurement."""
    return f"accept: {drafts}"


def measured_length(drafts: str, quick: bool) -> float:
    """Return an accept length."""
    return float(measure_accept(drafts, quick)["accept_length"])


@functools.cache
def measure_accept(drafts: str, quick: bool) -> dict[str, Any]:
    """Return the accept length, what was drafted and held, and the trained parameters."""
    device, middle = device_model(LLAMA, quick), middle_model(LLAMA, quick)
    drafter = (heads_for if drafts.startswith("U-Medusa") else adapter_for)(LLAMA, device, quick)
    config = replace(DRAFTS[drafts], new_tokens=QUICK_TOKENS if quick else TOKENS)
    likeness: dict[str, float] = {}
    if isinstance(drafter, Adapter):  # before the middle submodel is a cloud's
        held_out = torch.stack(prompts(QUICK_HELD_OUT if quick else HELD_OUT, LENGTH, LENGTH, seed=1))
        found = compare(drafter, device, teach(device, middle, held_out, batch_size=4))
        likeness = {"agreement": found.agreement, "overlap": found.overlap}
    asked = prompts(QUICK_PROMPTS if quick else PROMPTS, SHORTEST, LONGEST, seed=2)
    sessions = [DeviceSession(device, drafter, config, CAPACITY, 0, (), lambda _at, _new: None) for _ in asked]
    accounts = serve(make_cloud(middle, len(asked)), sessions, [[job] for job in enumerate(asked)], ahead=False)
    drafted = sum(each.drafted for each in accounts)
    return {
        "tokens": sum(each.tokens for each in accounts),
        "accept_length": accept_length(accounts),
        "drafted": drafted / sum(each.rounds - 1 for each in accounts),
        "held": sum(each.accepted for each in accounts) / max(1, drafted),
        "trained": sum(parameter.numel() for parameter in drafter.parameters()),
        **likeness,
    }
