"""Devices and a cloud in one process, without messages, for the parts of :mod:`benchmarks.hat`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fl_edge.hat.account import Account
from fl_edge.hat.cloud import Cloud, Refusal
from fl_edge.hat.messages import Upload
from fl_edge.hat.middle import Middle
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.session import DeviceSession
from fl_edge.hat.split import MiddleModel

CAPACITY = 2048  # tokens of a request


def make_cloud(middle: MiddleModel, requests: int, limits: Limits | None = None, capacity: int = CAPACITY) -> Cloud:
    """Return a cloud with room for so many requests at once."""
    return Cloud(Middle(middle, capacity, capacity * requests), limits or Limits(), lease_s=600.0)


def serve(
    cloud: Cloud,
    sessions: Sequence[DeviceSession],
    jobs: Sequence[Sequence[tuple[int, Tensor]]],
    ahead: bool = True,
) -> list[Account]:
    """Let all devices answer their prompts, one after the other on each, all devices at once.

    Parameters
    ----------
    cloud, sessions
        Not used yet.
    jobs
        For each session its requests: number and prompt (n,).
    ahead
        A device may draft in a thread of its own while it waits.

    Returns
    -------
    list of Account
        Of all requests, in the order of their ends.
    """
    left = [list(each) for each in jobs]
    current: dict[str, int] = {}
    accounts: list[Account] = []

    def submit(place: int, upload: Upload) -> None:
        cloud.submit(str(place), upload, 0.0)
        if not upload.last:
            submit(place, sessions[place].go_on())
        elif ahead:
            sessions[place].look_ahead()

    def begin(place: int) -> None:
        if left[place]:
            request, prompt = left[place].pop(0)
            current[str(place)] = request
            submit(place, sessions[place].begin(request, prompt))

    for place in range(len(sessions)):
        begin(place)
    while cloud.requests:
        for name, answer in cloud.step(0.0):
            if isinstance(answer, Refusal):
                raise RuntimeError(f"device {name}: {answer.reason}")
            if not len(answer.rows):  # an inner chunk of a prompt
                continue
            upload = sessions[int(name)].answer(answer)
            if upload is not None:
                submit(int(name), upload)
                continue
            cloud.end(name, current[name])
            accounts.append(sessions[int(name)].account)
            begin(int(name))
    return accounts


@torch.no_grad()
def greedy(whole: Any, prompt: Tensor, new_tokens: int) -> list[int]:
    """Return what transformers' ``generate`` makes of a prompt (n,)."""
    ids = prompt[None].to(whole.device)
    mask = torch.ones_like(ids)  # without one, transformers overlooks tokens that end a text and pad, too
    found = whole.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


def accept_length(accounts: Sequence[Account]) -> float:
    """Return the tokens of a round over all requests, the one that a prompt brings left out."""
    return sum(each.tokens - 1 for each in accounts) / sum(each.rounds - 1 for each in accounts)
