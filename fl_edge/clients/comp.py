"""The COMP client: prunes its own copy of a language model, or takes part in a pruning with sums over its text.

Four messages; `arrays` holds one packed array (see `fl_edge.link.packing`):

====================  =========================================  ======================================================
message type          asks with                                  answers with
====================  =========================================  ======================================================
query.comp_describe   nothing                                    device, tokens of its text, hash of its base model
train.comp_prune      settings, its ratio with them              what came of it: plan, size, perplexity, latency, ...
train.comp_answer     a question, and the decisions since the    sums over the tokens of its text, or only how many
                      one that the device has                    decisions it has followed
train.comp_finish     the last decisions, and the plan           as train.comp_prune
====================  =========================================  ======================================================

Text, tokens and hidden states never leave the device, and the pruned model stays on it: answers name its folder. A
client process may not live from one message to the next. What a device needs to go on, hidden states in front of a
layer, is in a file (`fl_edge.clients.cache`) or, in a process that stays, in memory alone; a device that has lost both
says that it has followed nothing, is sent all decisions, and follows them to the same bits.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_edge.clients.answering import answering
from fl_edge.clients.cache import WeightCache
from fl_edge.comp.device import Device
from fl_edge.comp.figures import measured
from fl_edge.comp.local import TextSource
from fl_edge.comp.messages import Order, answer_config, answer_tensors, read_config, read_plan_record
from fl_edge.comp.outcome import Outcome
from fl_edge.comp.run import prune_checkpoint
from fl_edge.comp.state import run_key
from fl_edge.errors import ReplyError
from fl_edge.files import default_folder
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.resident.staying import stays

STATE = "comp"  # this client's record in Context.state

log = logging.getLogger("flwr.fl_edge")


@dataclass(frozen=True)
class CompWorkload:
    """What a device prunes, and with what text.

    Attributes
    ----------
    device
        Its name, the same in every run.
    base
        Folder of the unpruned model: a causal language model of an architecture that `fl_edge.pruning` knows.
    base_digest
        Hash of its files (`fl_edge.comp.outcome.base_digest`); in a federated pruning it must be the server's.
    calibration, test
        (s, n) int64, sequences of full length: the device's own text, and text to measure perplexity on.
    out
        Folder below which pruned models are left; by default `comp` below that of the caches.
    accelerator
        Where the model computes: "cpu", "cuda", ...
    threads
        Threads of torch; sums come out in another order, and so with other last bits, when it changes.
    """

    device: str
    base: Path
    base_digest: str
    calibration: Tensor
    test: Tensor
    out: Path | None = None
    accelerator: str = "cpu"
    threads: int = 1

    def folder(self, name: str) -> Path:
        """Return where a pruned model goes."""
        return (self.out or default_folder() / "comp") / self.device / name


@dataclass
class _Live:
    session: str
    device: Device


class CompClient:
    """Answers COMP's messages on a device.

    Parameters
    ----------
    load
        Context -> CompWorkload. Called for every message, so it should remember what is slow to make.
    cache
        Where hidden states wait between messages.
    keep_live
        Devices kept in this process with their hidden states; more than one only when one process serves several.

    Examples
    --------
    In a Flower project of one's own::

        app = ClientApp()
        CompClient(load).register(app)
    """

    def __init__(
        self, load: Callable[[Context], CompWorkload], *, cache: WeightCache | None = None, keep_live: int = 16
    ):
        self._load = load
        self._cache = cache or WeightCache()
        self._keep_live = keep_live
        self._live: OrderedDict[tuple[int, int], _Live] = OrderedDict()

    def register(self, app: ClientApp) -> None:
        """Add the four handlers to a ClientApp, beside whatever else it does."""
        app.query("comp_describe")(answering(self._load, self._describe))
        app.train("comp_prune")(answering(self._load, self._prune))
        app.train("comp_answer")(answering(self._load, self._answer))
        app.train("comp_finish")(answering(self._load, self._finish))

    def _describe(self, _message: Message, _context: Context, work: CompWorkload) -> RecordDict:
        return make_content({"device": work.device, "tokens": work.calibration.numel(), "base": work.base_digest})

    def _prune(self, message: Message, _context: Context, work: CompWorkload) -> RecordDict:
        config = read_config(config_of(message))
        accelerator = torch.device(work.accelerator)
        key = run_key(work.base, config, work.calibration)
        out = work.folder(f"local-{key[:12]}")
        result = prune_checkpoint(
            work.base,
            out,
            config,
            lambda bench: TextSource(bench, work.calibration, config.target),
            key=key,
            device=accelerator,
        )
        outcome = Outcome(
            plan=result.plan,
            folder=str(out),
            seconds=result.seconds,
            bytes_read=result.bytes_read,
            figures=measured(work.base, out, work.test, accelerator),
        )
        return make_content(outcome.to_config())

    def _answer(self, message: Message, context: Context, work: CompWorkload) -> RecordDict:
        order = Order.of(config_of(message), tensors_of(message))
        device = self._found(order, context, work)
        read = device.bytes_read
        self._follow(order, context, device)
        answer = None if order.question is None else device.answer(order.question, order.form)
        self._keep(order, context, device)
        said = {"steps": _lasting(order, context, device), "bytes_read": device.bytes_read - read}
        if answer is None:
            return make_content(said)
        return make_content({**said, **answer_config(answer)}, answer_tensors(answer, order.wire))

    def _finish(self, message: Message, context: Context, work: CompWorkload) -> RecordDict:
        config = config_of(message)
        order = Order.of(config, tensors_of(message))
        started, device = time.perf_counter(), self._found(order, context, work)
        read = device.bytes_read
        self._follow(order, context, device)
        if device.steps != int(config["end"]):
            said = {"steps": _lasting(order, context, device), "bytes_read": device.bytes_read - read}
            return make_content(said)
        plan = read_plan_record(config)
        device.finish(plan)
        self._forget(context)
        outcome = Outcome(
            plan=plan,
            folder=str(device.folder),
            seconds=time.perf_counter() - started,
            bytes_read=device.bytes_read - read,
            figures=measured(work.base, device.folder, work.test, torch.device(work.accelerator)),
        )
        return make_content(outcome.to_config())

    # --- where a device stands ---

    def _found(self, order: Order, context: Context, work: CompWorkload) -> Device:
        """Return the device where the last message left it: in memory, as the cache has it, or at the beginning."""
        live = self._live.get((context.run_id, context.node_id))
        if live is not None and live.session == order.session:
            return live.device
        folder, place = work.folder(order.session), torch.device(work.accelerator)
        record = _record(order, context)
        if record is not None:
            device = Device(work.base, folder, work.calibration, order.config, place)
            try:
                digest = str(record["digest"])
                held = self._cache.load(context.run_id, context.node_id, digest) if digest else {}
                device.restore(held, record)
            except ReplyError as error:
                log.warning("%s starts again from the first decision: %s", work.device, error)
                del context.state[STATE]
            else:
                return device
        return Device(work.base, folder, work.calibration, order.config, place)

    def _follow(self, order: Order, context: Context, device: Device) -> None:
        device.follow(order.first, list(order.steps), measures=order.measures)
        self._keep(order, context, device)

    def _keep(self, order: Order, context: Context, device: Device) -> None:
        """Keep the device in memory, and where it stands on disk if this process may not stay."""
        place = (context.run_id, context.node_id)
        self._live[place] = _Live(order.session, device)
        self._live.move_to_end(place)
        while len(self._live) > self._keep_live:
            self._live.popitem(last=False)
        snapshot = None if stays() else device.snapshot()
        if snapshot is None:
            return
        tensors, where = snapshot
        kept = _record(order, context)
        if kept is not None and all(kept.get(name) == value for name, value in where.items()):
            return
        digest = self._cache.save(*place, tensors) if tensors else ""
        context.state[STATE] = ConfigRecord({"session": order.session, "digest": digest, **where})

    def _forget(self, context: Context) -> None:
        self._live.pop((context.run_id, context.node_id), None)
        self._cache.drop(context.run_id, context.node_id)
        if STATE in context.state:
            del context.state[STATE]


def _record(order: Order, context: Context) -> Any:
    """Return what this device noted of where it stands in this session, if it did."""
    record: Any = context.state.config_records.get(STATE)
    return record if record is not None and record["session"] == order.session else None


def _lasting(order: Order, context: Context, device: Device) -> int:
    """Return how many steps need not be sent again, whatever process the next message meets."""
    if stays():
        return device.steps
    record = _record(order, context)
    return 0 if record is None else int(record["steps"])
