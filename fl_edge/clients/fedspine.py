"""The FedSpine client: cuts its transformer as it is told, tunes LoRA on it, and says which units mattered.

Two messages; `arrays` holds one packed array (see `fl_edge.link.packing`):

========================  ====================================  =====================================================
message type              asks with                             answers with
========================  ====================================  =====================================================
query.fedspine_describe   nothing                               device, samples, hash of its base model
train.fedspine            plan, rank, LoRA factors and head     trained factors and head, importance, losses, times
                          for that plan
========================  ====================================  =====================================================

What a round needs comes with the message, so a device that was restarted has lost nothing. The pruned base itself is
rebuilt from the unpruned one; a process that stays keeps it in memory, and one that may not stay leaves it on disk
under the hash of base and plan (`Context.state` holds that hash), which spares a large model from being loaded whole
again. All ways give the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fl_edge.clients.answering import answering
from fl_edge.clients.bases import PrunedBases
from fl_edge.data.tokens import batches
from fl_edge.errors import ReplyError
from fl_edge.fedspine.costs import training_macs
from fl_edge.fedspine.messages import Order, read_order_tensors, reply_config, reply_tensors
from fl_edge.fedspine.training import train_round
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.pruning import count_costs, members
from fl_edge.seeding import derive_seed, torch_rng

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class FedSpineWorkload:
    """What a device tunes on.

    Attributes
    ----------
    device
        Its name, the same in every run.
    base
        Returns a fresh copy of the unpruned model: any `AutoModelForSequenceClassification` or `AutoModelForCausalLM`
        of an architecture that `fl_edge.pruning` knows.
    base_digest
        Hash of its weights; server and devices must agree on it.
    dataset
        Columns `input_ids`, `attention_mask`, `labels`, as `fl_edge.data.texts` makes them.
    pad_id
        Token to pad with.
    costs
        Round -> (multiply-adds a second, bits a second), as a device profile tells them; without it compute is measured
        here, and transfer by the server if its grid sees when replies arrive.
    accelerator
        Where the model computes: "cpu", "cuda", ...
    threads
        Threads of torch; sums come out in another order, and so with other last bits, when it changes.
    """

    device: str
    base: Callable[[], nn.Module]
    base_digest: str
    dataset: Dataset
    pad_id: int
    costs: Callable[[int], tuple[float, float]] | None = None
    accelerator: str = "cpu"
    threads: int = 1


class FedSpineClient:
    """Answers FedSpine's messages on a device.

    Parameters
    ----------
    load
        Context -> FedSpineWorkload. Called for every message, so it should remember what is slow to make.
    keep_live
        Pruned models kept in this process; more than one only when one process serves several devices.

    Examples
    --------
    In a Flower project of one's own::

        app = ClientApp()
        FedSpineClient(load).register(app)
    """

    def __init__(self, load: Callable[[Context], FedSpineWorkload], *, keep_live: int = 32) -> None:
        self._load = load
        self._bases = PrunedBases(keep_live)

    def register(self, app: ClientApp) -> None:
        """Add the two handlers to a ClientApp, beside whatever else it does."""
        app.query("fedspine_describe")(answering(self._load, self._describe))
        app.train("fedspine")(answering(self._load, self._train))

    def _describe(self, _message: Message, _context: Context, work: FedSpineWorkload) -> RecordDict:
        return make_content({"device": work.device, "samples": len(work.dataset), "base": work.base_digest})

    def _train(self, message: Message, context: Context, work: FedSpineWorkload) -> RecordDict:
        order = Order.from_config(config_of(message))
        if not len(work.dataset):
            raise ReplyError(f"{work.device} holds no samples")
        started = time.perf_counter()
        model = self._bases.get(context, work.base, work.base_digest, order.plan, work.accelerator)
        maps = members(model)
        adapter, head = read_order_tensors(tensors_of(message), maps)
        size, seed = order.batch_size, order.seed
        drawing, probing = (
            torch_rng(seed, "batches", order.server_round, work.device),
            torch_rng(seed, "probe", work.device),
        )
        drawn = list(batches(work.dataset, work.pad_id, size, order.tau, drawing))
        probe = list(batches(work.dataset, work.pad_id, size, order.probe_batches, probing))
        dropout_seed = derive_seed(seed, "dropout", order.server_round, work.device)
        done = train_round(model, maps, adapter, head, drawn, probe, order.settings, dropout_seed)
        compute_s, bandwidth_bps = time.perf_counter() - started, 0.0
        if work.costs is not None:
            macs_per_s, bandwidth_bps = work.costs(order.server_round)
            tokens = [(batch["input_ids"].numel(), batch["input_ids"].shape[1]) for batch in drawn]
            lora = sum(factors.a.numel() + factors.b.numel() for factors in adapter.values())
            compute_s = training_macs(count_costs(model, order.plan), lora, tokens) / macs_per_s
        return make_content(reply_config(order, done, len(work.dataset), compute_s, bandwidth_bps), reply_tensors(done))
