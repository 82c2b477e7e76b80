"""A device's side of one request after the other: what to send next, and what is measured by the way.

Knows nothing of how messages travel: every upload that is returned gets one answer, or leave to go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from threading import Event
from typing import Any

from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.hat.account import Account
from fl_edge.hat.bytes import pack_rows, unpack_rows
from fl_edge.hat.chains import Chains
from fl_edge.hat.config import HatConfig
from fl_edge.hat.drafting import Adapted
from fl_edge.hat.generation import Generation, Rules
from fl_edge.hat.growing import GrowingTrees
from fl_edge.hat.medusa import MedusaHeads, MedusaTrees
from fl_edge.hat.messages import Answer, Upload
from fl_edge.hat.monitor import DeviceMonitor
from fl_edge.hat.pace import MonitoredPace
from fl_edge.hat.payoff import Payoff
from fl_edge.hat.proposing import DevicePart, Proposer
from fl_edge.hat.sampling import Sampler
from fl_edge.seeding import derive_seed


class DeviceSession:
    """Generates on a device, request by request.

    Parameters
    ----------
    model
        The device's part.
    adapter
        What drafts: an adapter, or Medusa's heads; without it nothing is drafted.
    config
        How.
    context
        Tokens that a request may have in the cloud.
    seed
        Of all draws; a request's follow from it and its number.
    stops
        Tokens that end a text.
    hear
        Called with the number of a request and its new tokens, as they come.
    clock
        Seconds.

    Attributes
    ----------
    context
        As given.
    monitor
        What was measured, over all requests.
    account
        Of the request under way, or the last.
    """

    def __init__(
        self,
        model: DevicePart,
        adapter: Adapted | MedusaHeads | None,
        config: HatConfig,
        context: int,
        seed: int,
        stops: Collection[int],
        hear: Callable[[int, Sequence[int]], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._adapter, self._config, self._seed = model, adapter, config, seed
        self.context = context
        self._rules = Rules(config.new_tokens, context, stops)
        self._hear, self._clock = hear, clock
        self.monitor = DeviceMonitor()
        self.account = Account(0)
        self._pace = MonitoredPace(config, self.monitor, row_bytes=0.0)
        self._payoff = Payoff(self.monitor)
        self._generation: Generation | None = None
        self._started = self._sent_at = 0.0
        self._sent_bytes = 0  # of the last upload; 0: another process sent it
        self._came, self._ahead = Event(), _done()
        self._beside = ThreadPoolExecutor(1, "fl_edge-ahead")

    @property
    def under_way(self) -> bool:
        """Whether a request has been begun and is not over."""
        return self._generation is not None and not self._generation.over

    def begin(self, request: int, prompt: Tensor) -> Upload:
        """Start a request and return the first chunk of its prompt (n,).

        Raises
        ------
        ConfigError
            A prompt that leaves no room for an answer.
        """
        self._generation = self._new(request, prompt)
        self.account, self._started = Account(len(prompt)), self._clock()
        return self._leaves(self._read_on())

    def go_on(self) -> Upload:
        """Return the next chunk, now that the cloud has the one before."""
        if self._sent_bytes:
            self.monitor.sent(self._sent_bytes, self._clock() - self._sent_at)
        return self._leaves(self._stop_ahead() or self._read_on())

    def look_ahead(self) -> None:
        """Use the time until the cloud speaks, in a thread of its own: for the prompt's next chunk, or for drafts."""
        self._came.clear()
        whole = self._current().sent == len(self._current().prompt)
        self._ahead = self._beside.submit(self._draft_on if whole else self._read_on)

    def answer(self, answer: Answer) -> Upload | None:
        """Take in the cloud's answer; return what is to be verified next, nothing when the text is whole.

        Raises
        ------
        ReplyError
            An answer that does not fit.
        """
        came, generation, account = self._clock(), self._current(), self.account
        self._stop_ahead()
        self._measure(answer, came - self._sent_at - answer.wait_s - answer.batch_s)
        if account.rounds:
            self._payoff.answered(len(answer.rows), came - self._sent_at)
        found = generation.take_in(unpack_rows(answer.rows))
        account.tokens += len(found.tokens)
        account.rounds += 1
        account.drafted += found.drafted
        account.accepted += found.accepted
        account.ahead += found.ahead
        account.down_bytes += answer.rows.nbytes
        before, account.total_s = account.total_s, self._clock() - self._started
        if account.rounds == 1:
            account.first_s = account.total_s
        else:
            self._payoff.rounded(len(found.tokens), account.total_s - before)
        self._hear(generation.request, found.tokens)
        if generation.over:
            return None
        started = self._clock()
        upload = generation.propose()
        if not found.ahead and upload.parents is None:
            self.monitor.drafted(self._clock() - started, len(upload.rows))
        return self._leaves(upload)

    def give_up(self) -> None:
        """Forget the request under way."""
        self._stop_ahead()
        self._generation = None

    def to_record(self) -> dict[str, Any]:
        """Return where the request under way stands, as plain values, for :meth:`restore`."""
        place = self._place(self._current())
        began = time.time() - (self._clock() - self._started)  # by the one clock that processes share
        return {**place, "account": asdict(self.account), "began": began, "measured": self.measured()}

    def measured(self) -> dict[str, Any]:
        """Return what was measured over all requests, as plain values, for :meth:`remember`."""
        return {"monitor": self.monitor.to_record(), "payoff": self._payoff.to_record()}

    def remember(self, measured: Mapping[str, Any]) -> None:
        """Go on from what another process measured; before a request begins."""
        self._pace.monitor = self.monitor = DeviceMonitor.from_record(measured["monitor"])
        self._payoff = Payoff.from_record(measured["payoff"], self.monitor)

    def stands_at(self, record: Mapping[str, Any]) -> bool:
        """Return whether this is where a record of :meth:`to_record` was made."""
        return self._generation is not None and all(
            record[name] == value for name, value in self._place(self._generation).items()
        )

    def restore(self, record: Mapping[str, Any], prompt: Tensor) -> None:
        """Go on where another process was."""
        self.remember(record["measured"])
        self._generation = self._new(int(record["request"]), prompt)
        self._generation.restore(record["text"], int(record["sent"]), record["pending"], record["parents"])
        self.account, self._sent_bytes, self._sent_at = Account(**record["account"]), 0, self._clock()
        self._started = self._sent_at - (time.time() - float(record["began"]))

    def _new(self, request: int, prompt: Tensor) -> Generation:
        own = self._config
        sampler = Sampler(own.temperature, own.top_p, derive_seed(self._seed, "hat", request))
        proposer: Proposer
        if isinstance(self._adapter, MedusaHeads):
            proposer = MedusaTrees(self._model, self._adapter, sampler, own.tree_rows)
        elif own.adaptive and self._adapter is not None:
            proposer = GrowingTrees(self._model, self._adapter, sampler, self._payoff, own.draft_width, self._clock)
        else:
            proposer = Chains(self._model, self._adapter, sampler, self._pace, own.guesses)
        return Generation(self._model, proposer, sampler, self._pace, self._rules, request, prompt)

    @staticmethod
    def _place(generation: Generation) -> dict[str, Any]:
        return {
            "request": generation.request,
            "text": list(generation.text),
            "sent": generation.sent,
            "pending": list(generation.pending),
            "parents": None if generation.parents is None else list(generation.parents),
        }

    def _current(self) -> Generation:
        if self._generation is None:
            raise ReplyError("the cloud speaks of a request, and none is under way on this device")
        return self._generation

    def _leaves(self, upload: Upload) -> Upload:
        if self._config.int8:
            upload = replace(upload, rows=pack_rows(upload.rows))
        self._sent_bytes, self._sent_at = upload.rows.nbytes, self._clock()
        self._pace.row_bytes = self._payoff.row_bytes = self._sent_bytes / len(upload.rows)
        self.account.up_bytes += self._sent_bytes
        return upload

    def _read_on(self) -> Upload:
        """Return the prompt's next chunk."""
        started = self._clock()
        upload = self._current().next_chunk()
        self.monitor.read(len(upload.rows), self._clock() - started)
        return upload

    def _draft_on(self) -> None:
        started = self._clock()
        steps = self._current().look_ahead(self._came.is_set)
        if steps:
            self.monitor.drafted(self._clock() - started, steps, self._config.guesses)

    def _stop_ahead(self) -> Upload | None:
        """Return the prompt's next chunk, if that was read ahead."""
        self._came.set()
        chunk, self._ahead = self._ahead.result(), _done()
        return chunk

    def _measure(self, answer: Answer, seconds: float) -> None:
        """Take in what an exchange took on its way, there and back."""
        rows = len(answer.rows)
        self.monitor.answered(rows, answer.wait_s, answer.batch_tokens, answer.batch_s)
        if self._sent_bytes and seconds > 0:
            self.monitor.exchanged(self._sent_bytes + answer.rows.nbytes, seconds)
            self.monitor.sent(self._sent_bytes, seconds)


def _done() -> Future[Upload | None]:
    future = Future[Upload | None]()
    future.set_result(None)
    return future
