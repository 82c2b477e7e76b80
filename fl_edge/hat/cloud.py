"""The cloud: takes uploads of many devices, runs batches of them, answers.

What it does is HAT's; leases, limits and checks are *ours*. It knows no clock but the one that is handed to it, and has
no threads: whoever owns it calls it from one thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.hat.admission import check_place, checked_rows, is_prompt, moved
from fl_edge.hat.attention import Span
from fl_edge.hat.bytes import pack_rows
from fl_edge.hat.messages import Answer, Upload
from fl_edge.hat.middle import Item, Middle
from fl_edge.hat.scheduling import Limits, Waiting, next_batch

_OVERFLOWN = "the rows lead to numbers that are not finite"

Key = tuple[str, int]  # a device cannot name another one's request


@dataclass(frozen=True)
class Refusal:
    """Stands for the answer to an upload that could not be run.

    The cloud keeps what it had before the upload; uploads of the request that came after it are refused, too.

    Attributes
    ----------
    request
        As in the upload.
    reason
        One line.
    """

    request: int
    reason: str


@dataclass(eq=False)
class _Queued:
    key: Key
    upload: Upload
    rows: Tensor
    span: Span
    arrived: float
    done: int = 0

    def waiting(self) -> Waiting:
        prompt = is_prompt(self.upload)
        return Waiting(self.key, len(self.rows) - self.done, not prompt, started=self.span.base + self.done > 0)

    def item(self, count: int) -> Item:
        span = Span(self.span.slot, self.span.base + self.done, count, self.span.parents)
        return Item(span, self.rows[self.done : self.done + count])

    def wanted(self, rows: Tensor) -> Tensor:
        """Of the rows of the last batch that the upload was in; packed if the upload was."""
        if not self.upload.last:
            return rows[:0]
        rows = rows if self.upload.verify else rows[-1:]
        return pack_rows(rows) if self.upload.rows.dtype == torch.int8 else rows


class Cloud:
    """Middle submodel, caches, queue and leases.

    Parameters
    ----------
    middle
        With the pool, which bounds how many requests there may be.
    limits
        Of a batch.
    lease_s
        A device that is owed no answer and that has not been heard of for this long loses its requests.
    clock
        Seconds, to measure batches with.
    """

    def __init__(
        self, middle: Middle, limits: Limits, lease_s: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._middle, self._limits, self._lease_s, self._clock = middle, limits, lease_s, clock
        self._queue: list[_Queued] = []
        self._spans: dict[Key, Span] = {}  # of each request's last upload
        self._heard: dict[str, float] = {}

    @property
    def requests(self) -> int:
        """Requests that have a slot."""
        return len(self._spans)

    @property
    def waiting(self) -> int:
        """Rows that wait to be run."""
        return sum(len(each.rows) - each.done for each in self._queue)

    def submit(self, device: str, upload: Upload, now: float) -> None:
        """Take an upload; it is answered by a :meth:`step`.

        Raises
        ------
        ReplyError
            It cannot be used, or there is no room for another request. Nothing has changed then but the lease.
        """
        key = device, upload.request
        if device in self._heard:
            self._heard[device] = now
        last, pool = self._spans.get(key), self._middle.pool
        rows = checked_rows(upload, self._middle.width, self._middle.dtype)
        waiting = [each.upload for each in self._queue if each.key == key]
        check_place(upload, last, waiting, self._middle.capacity)
        if last is None:
            if (slot := pool.take()) is None:
                held = f"all {pool.slots} requests that the cloud has memory for are under way"
                raise ReplyError(f"request {upload.request}: {held}; try again later")
        else:
            slot = last.slot
            if kept := moved(upload):
                pool.move(slot, last.base, kept)
        self._spans[key] = span = Span(slot, upload.base, len(rows), upload.parents)
        self._heard[device] = now
        self._queue.append(_Queued(key, upload, rows, span, now))

    def step(self, now: float) -> list[tuple[str, Answer | Refusal]]:
        """Run one batch of what waits.

        Returns
        -------
        list of (str, Answer or Refusal)
            Devices, and what they are owed; empty if nothing waits, or if only parts of prompts were run.
        """
        parts = next_batch([each.waiting() for each in self._queue], self._limits)
        if not parts:
            return []
        chosen = [(self._queue[index], count) for index, count in parts]
        start = self._clock()
        found = self._run([each.item(count) for each, count in chosen])
        seconds, tokens = self._clock() - start, sum(count for _, count in chosen)
        owed: list[tuple[str, Answer | Refusal]] = []
        for (each, count), rows in zip(chosen, found, strict=True):
            device, request = each.key
            if isinstance(rows, str):
                owed += [(device, Refusal(request, rows))] * self._refuse(each)
                continue
            each.done += count
            if each.done == len(each.rows):
                owed.append((device, Answer(request, each.wanted(rows), now - each.arrived, tokens, seconds)))
        self._queue = [each for each in self._queue if each.done < len(each.rows)]
        self._heard |= {device: now for device, _ in owed}
        return owed

    def end(self, device: str, request: int) -> None:
        """Forget a request; one that is unknown has been forgotten."""
        self._drop((device, request))

    def expire(self, now: float) -> list[str]:
        """Forget the requests of devices whose lease has run out, and return which devices these are."""
        owed = {each.key[0] for each in self._queue}
        gone = [device for device, heard in self._heard.items() if now - heard > self._lease_s and device not in owed]
        for device in gone:
            for key in [key for key in self._spans if key[0] == device]:
                self._drop(key)
        return gone

    def _run(self, items: Sequence[Item]) -> list[Tensor | str]:
        """Return the rows of each item, or why there are none."""
        try:
            found = self._middle.run(items)
        except Exception as error:  # whatever the accelerator says; that it is out of memory is a RuntimeError
            reason = f"the cloud could not run the rows: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        else:
            finite = (bool(torch.isfinite(rows).all()) for rows in found)
            return [rows if each else _OVERFLOWN for rows, each in zip(found, finite, strict=True)]
        # here what the batch had in memory is free; perhaps it is only one item, or they were only too many
        return [self._run([item])[0] for item in items] if len(items) > 1 else [reason]

    def _refuse(self, queued: _Queued) -> int:
        """Go back to what was before a part of an upload; return how many of the request's uploads are now void."""
        slot, base = queued.span.slot, queued.span.base + queued.done
        self._middle.pool.forget(slot, base)
        self._spans[queued.key] = Span(slot, 0, base)
        before = len(self._queue)
        self._queue = [each for each in self._queue if each.key != queued.key]
        return before - len(self._queue)

    def _drop(self, key: Key) -> None:
        if (span := self._spans.pop(key, None)) is not None:
            self._middle.pool.give_back(span.slot)
            self._queue = [each for each in self._queue if each.key != key]
            if all(other[0] != key[0] for other in self._spans):
                del self._heard[key[0]]
