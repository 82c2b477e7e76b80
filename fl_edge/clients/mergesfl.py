"""The MergeSFL client: trains the bottom model, one batch ahead of the server.

Four messages, each answered at once; `arrays` holds one packed array (see `fl_edge.link.packing`):

=========================  =====================================  ====================================================
message type               asks with                              answers with
=========================  =====================================  ====================================================
query.mergesfl_describe    nothing                                device, label counts, seconds a sample
train.mergesfl_begin       bottom weights, batch size, rates      features and labels of batch 0
train.mergesfl_step        gradient of batch k-1 (or skip)        features and labels of batch k
train.mergesfl_end         gradient of the last batch (or skip)   bottom weights, seconds a sample
=========================  =====================================  ====================================================

The step is fused, gradient in and next features out, which halves the messages. A client process may not live from one
message to the next: what it must know is in `Context.state`, its weights are in a file (`fl_edge.clients.cache`), and a
lost autograd graph is computed again. A resident client (`fl_edge.link.resident`) keeps model and graph in memory and
writes no file. Both ways give the same bits.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fl_edge.clients.answering import answering
from fl_edge.clients.cache import WeightCache
from fl_edge.errors import ReplyError
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.resident.staying import stays
from fl_edge.mergesfl.bottoms import Turn, batch_indices, bottom_step, forward, repeat_forward

STATE = "mergesfl"  # this client's record in Context.state
_PROBE_SAMPLES = 8  # a device that has not trained yet is measured on so many samples


@dataclass(frozen=True)
class Workload:
    """What a device trains on.

    Attributes
    ----------
    device
        Its name, the same in every run.
    bottom
        Bottom model; a template, copied before the server's weights go in.
    labels
        int64 (n,), labels of the samples on the device, in [0, num_classes).
    batch
        Sample indices (d,) int64 -> model inputs (d, ...).
    costs
        Round -> (seconds of compute, seconds of transfer) for one sample, as a device profile tells them; without it
        compute is measured here, and transfer by the server if its grid sees when replies arrive (ResidentGrid does;
        else it counts as free).
    threads
        Threads of torch; sums come out in another order, and so with other last bits, when it changes.
    """

    device: str
    bottom: nn.Module
    labels: Tensor
    num_classes: int
    batch: Callable[[Tensor], Tensor]
    costs: Callable[[int], tuple[float, float]] | None = None
    threads: int = 1


@dataclass
class _Live:
    """A bottom model in memory, with the graph of its last forward pass."""

    tag: str
    bottom: nn.Module
    features: Tensor


class MergeSFLClient:
    """Answers MergeSFL's messages on a device.

    Parameters
    ----------
    load
        Context -> Workload. Called for every message, so it should remember what is slow to make.
    cache
        Where weights wait between messages.
    keep_live
        Models kept in this process with their graphs; more than one only when one process serves several devices.

    Examples
    --------
    In a Flower project of one's own::

        app = ClientApp()
        MergeSFLClient(load).register(app)
    """

    def __init__(self, load: Callable[[Context], Workload], *, cache: WeightCache | None = None, keep_live: int = 64):
        self._load = load
        self._cache = cache or WeightCache()
        self._keep_live = keep_live
        self._live: OrderedDict[tuple[int, int], _Live] = OrderedDict()

    def register(self, app: ClientApp) -> None:
        """Add the four handlers to a ClientApp, beside whatever else it does."""
        app.query("mergesfl_describe")(answering(self._load, self._describe))
        app.train("mergesfl_begin")(answering(self._load, self._begin))
        app.train("mergesfl_step")(answering(self._load, self._step))
        app.train("mergesfl_end")(answering(self._load, self._end))

    def _describe(self, message: Message, _: Context, work: Workload) -> RecordDict:
        server_round = int(config_of(message)["round"])
        counts = torch.bincount(work.labels, minlength=work.num_classes).tolist()
        if work.costs is None:
            compute_s, transfer_s = _probe(work), 0.0
        else:
            compute_s, transfer_s = work.costs(server_round)
        described = {"device": work.device, "labels": counts, "compute_s": compute_s, "transfer_s": transfer_s}
        return make_content(described)

    def _begin(self, message: Message, context: Context, work: Workload) -> RecordDict:
        order = config_of(message)
        size = int(order["batch_size"])
        if not 1 <= size <= len(work.labels):
            raise ReplyError(f"{work.device} was asked for batches of {size}; it holds {len(work.labels)} samples")
        bottom = _with_weights(work, tensors_of(message))
        context.state[STATE] = ConfigRecord({**order, "trained_s": 0.0, "trained": 0})
        return self._send_batch(context, work, bottom, step=0)

    def _step(self, message: Message, context: Context, work: Workload) -> RecordDict:
        bottom = self._learn(message, context, work)
        return self._send_batch(context, work, bottom, int(_state(context)["step"]) + 1)

    def _end(self, message: Message, context: Context, work: Workload) -> RecordDict:
        bottom = self._learn(message, context, work)
        state = _state(context)
        run, node = context.run_id, context.node_id
        self._live.pop((run, node), None)
        self._cache.drop(run, node)
        del context.state[STATE]
        compute_s, transfer_s = self._costs(work, state)
        ended = {"device": work.device, "compute_s": compute_s, "transfer_s": transfer_s}
        return make_content(ended, bottom.state_dict())

    def _learn(self, message: Message, context: Context, work: Workload) -> nn.Module:
        """Apply the gradient of the last batch sent, and return the bottom model."""
        state, tag = _state(context), config_of(message)["tag"]
        if tag != state["tag"]:
            raise ReplyError(
                f"{work.device} got the gradient of batch {tag}, but the last features it sent were of batch "
                f"{state['tag']}; it was not applied"
            )
        started = time.perf_counter()
        live = self._live.get((context.run_id, context.node_id))
        if live is None or live.tag != state["tag"]:
            live = self._rebuild(context, work, state)
        gradient = tensors_of(message).get("gradient")
        if gradient is None:  # the server made no update in this iteration
            return live.bottom
        if gradient.shape != live.features.shape or not torch.isfinite(gradient).all():
            raise ReplyError(
                f"{work.device} got a gradient of shape {tuple(gradient.shape)}; a finite one of shape "
                f"{tuple(live.features.shape)} was due"
            )
        bottom_step(live.bottom, live.features, gradient, float(state["learning_rate"]))
        _note_training(state, time.perf_counter() - started, len(gradient))
        return live.bottom

    def _rebuild(self, context: Context, work: Workload, state: Any) -> _Live:
        """Make the last forward pass again, from the weights in the cache."""
        weights = self._cache.load(context.run_id, context.node_id, str(state["digest"]))
        bottom = _with_weights(work, weights)
        turn, step = _turn(state, work), int(state["step"])
        indices = batch_indices(turn, step, int(state["batch_size"]), len(work.labels))
        return _Live(str(state["tag"]), bottom, repeat_forward(bottom, work.batch(indices), turn, step))

    def _send_batch(self, context: Context, work: Workload, bottom: nn.Module, step: int) -> RecordDict:
        state = _state(context)
        started = time.perf_counter()
        turn = _turn(state, work)
        indices = batch_indices(turn, step, int(state["batch_size"]), len(work.labels))
        features = forward(bottom, work.batch(indices), turn, step)
        _note_training(state, time.perf_counter() - started, 0)
        tag = f"{turn.server_round}/{step}/{work.device}"
        self._remember((context.run_id, context.node_id), _Live(tag, bottom, features))
        state["step"], state["tag"] = step, tag
        # the next process needs a file; one that stays has the model itself, and a device's flash lasts longer
        state["digest"] = "" if stays() else self._cache.save(context.run_id, context.node_id, bottom.state_dict())
        compute_s, transfer_s = self._costs(work, state)
        sent = {"device": work.device, "tag": tag, "compute_s": compute_s, "transfer_s": transfer_s}
        # int16 labels: the two bytes a label of the paper's traffic formula
        return make_content(sent, {"features": features.detach(), "labels": work.labels[indices].to(torch.int16)})

    def _remember(self, key: tuple[int, int], live: _Live) -> None:
        self._live[key] = live
        self._live.move_to_end(key)
        while len(self._live) > self._keep_live:
            self._live.popitem(last=False)

    @staticmethod
    def _costs(work: Workload, state: Any) -> tuple[float, float]:
        if work.costs is not None:
            return work.costs(int(state["round"]))
        trained = int(state["trained"])
        return (float(state["trained_s"]) / trained if trained else 0.0), 0.0


def _state(context: Context) -> Any:
    if STATE not in context.state:
        raise ReplyError("no round is under way on this device; it restarted, or the round began without it")
    return context.state.config_records[STATE]


def _turn(state: Any, work: Workload) -> Turn:
    return Turn(int(state["seed"]), int(state["round"]), work.device)


def _with_weights(work: Workload, weights: dict[str, Tensor]) -> nn.Module:
    bottom = copy.deepcopy(work.bottom)
    try:
        bottom.load_state_dict(weights)
    except RuntimeError:
        raise ReplyError(f"the bottom model on {work.device} is not the server's: names or shapes differ") from None
    return bottom


def _note_training(state: Any, seconds: float, samples: int) -> None:
    state["trained_s"] = float(state["trained_s"]) + seconds
    state["trained"] = int(state["trained"]) + samples


def _probe(work: Workload) -> float:
    """Measure the seconds that one sample takes, forward and backward, after a first pass that warms up."""
    bottom = copy.deepcopy(work.bottom)
    inputs = work.batch(torch.arange(min(_PROBE_SAMPLES, len(work.labels))))
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        bottom(inputs).sum().backward()
        seconds = time.perf_counter() - started
    return seconds / len(inputs)
