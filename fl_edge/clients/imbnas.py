"""The IMB-NAS client: a device's part in a search for an architecture that suits all devices' long tail.

Six messages; `arrays` holds one packed array (see `fl_edge.link.packing`):

======================  ===========================================  =================================================
message type            asks with                                    answers with
======================  ===========================================  =================================================
query.imbnas_describe   nothing                                      device, classes, image shape, images by class
query.imbnas_keep       the super-network, its space, its hash       the hash
train.imbnas_head       a head for all paths, how to train it        the head after training, images, loss
train.imbnas_sums       candidates, what is known of them            sums over its images (`fl_edge.imbnas.federation`)
train.imbnas_networks   networks, how to train them                  the networks after training, images, losses
query.imbnas_forget     nothing                                      device
======================  ===========================================  =================================================

Images, labels and features never leave the device. The super-network comes once: it stays in memory, and in a file
(`fl_edge.clients.cache`) where the process may not live to the next message. Head and sums name it by its hash; a device
that has lost it says so, and it is sent again. All else that a question needs comes with it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_edge.clients.answering import answering
from fl_edge.clients.cache import WeightCache
from fl_edge.data.images import ImageSet
from fl_edge.errors import ConfigError, ReplyError
from fl_edge.imbnas.adaptation import Turn, train_head
from fl_edge.imbnas.config import HeadConfig, RetrainConfig
from fl_edge.imbnas.federation import Named, Shard, put, read_head, trained_part
from fl_edge.imbnas.losses import make_loss
from fl_edge.imbnas.messages import (
    Aim,
    read,
    read_architectures,
    read_question,
    read_space,
    write_answers,
    write_space,
)
from fl_edge.imbnas.retraining import make_network, train_network
from fl_edge.imbnas.supernet import Supernet
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.resident.staying import stays
from fl_edge.models.pretraining import weights_digest
from fl_edge.seeding import derive_seed, torch_rng

STATE = "imbnas"  # in Context.state: which super-network this device was sent, and its file's hash

log = logging.getLogger("flwr.fl_edge")


@dataclass(frozen=True)
class ImbNasWorkload:
    """What a device has.

    Attributes
    ----------
    device
        Its name, the same in every run.
    train
        Its images of the long tail. Classes and image shape are those of all devices; any class may be missing.
    validation
        Its images that candidates are scored on; it may be empty. Over all devices they should be balanced.
    accelerator
        Where models compute: "cpu", "cuda", ...
    threads
        Threads of torch; sums come out in another order, and so with other last bits, when it changes.
    """

    device: str
    train: ImageSet
    validation: ImageSet
    accelerator: str = "cpu"
    threads: int = 1


@dataclass(eq=False)
class _Held:
    digest: str
    shard: Shard


class ImbNasClient:
    """Answers IMB-NAS's messages on a device.

    Parameters
    ----------
    load
        Context -> ImbNasWorkload. Called for every message, so it should remember what is slow to make.
    cache
        Where the super-network waits between messages.
    keep_live
        Devices whose super-network is kept in this process; more than one only when one process serves several.

    Examples
    --------
    In a Flower project of one's own::

        app = ClientApp()
        ImbNasClient(load).register(app)
    """

    def __init__(
        self, load: Callable[[Context], ImbNasWorkload], *, cache: WeightCache | None = None, keep_live: int = 64
    ):
        self._load = load
        self._cache = cache or WeightCache()
        self._keep_live = keep_live
        self._live: OrderedDict[tuple[int, int], _Held] = OrderedDict()

    def register(self, app: ClientApp) -> None:
        """Add the six handlers to a ClientApp, beside whatever else it does."""
        app.query("imbnas_describe")(answering(self._load, self._describe))
        app.query("imbnas_keep")(answering(self._load, self._keep))
        app.query("imbnas_forget")(answering(self._load, self._forget))
        app.train("imbnas_head")(answering(self._load, self._head))
        app.train("imbnas_sums")(answering(self._load, self._sums))
        app.train("imbnas_networks")(answering(self._load, self._networks))

    def _describe(self, _message: Message, _context: Context, work: ImbNasWorkload) -> RecordDict:
        said = {
            "device": work.device,
            "classes": list(work.train.classes),
            "shape": list(work.train.shape),
            "train": work.train.label_counts().tolist(),
            "validation": work.validation.label_counts().tolist(),
        }
        return make_content(said)

    def _head(self, message: Message, context: Context, work: ImbNasWorkload) -> RecordDict:
        said = config_of(message)
        shard = self._found(said, context, work)
        if shard is None:
            return make_content({"missing": True})
        aim, settings = Aim.of(said), read(HeadConfig, "head", said)
        head = read_head(_moved(tensors_of(message), work)).requires_grad_()
        loss = make_loss(aim.loss, torch.tensor(aim.counts, device=work.accelerator), aim.config)
        turn = Turn(int(said["turn"]), int(said["turns"]), work.device)
        value = train_head(shard.supernet, head, work.train, loss, settings, int(said["seed"]), turn=turn)
        return make_content({"samples": len(work.train), "loss": value}, trained_part(head))

    def _sums(self, message: Message, context: Context, work: ImbNasWorkload) -> RecordDict:
        said = config_of(message)
        shard = self._found(said, context, work)
        if shard is None:
            return make_content({"missing": True})
        question, calibration, place = read_question(said, tensors_of(message), shard.supernet)
        objective = Aim.of(said).objective().to(shard.device) if "loss" in said else None
        return make_content({}, write_answers(shard.answer(question, objective, calibration, place)))

    def _networks(self, message: Message, _context: Context, work: ImbNasWorkload) -> RecordDict:
        said, tensors = config_of(message), tensors_of(message)
        space = read_space(str(said["space"]))
        aim, recipe = Aim.of(said), read(RetrainConfig, "final", said)
        loss = make_loss(aim.loss, torch.tensor(aim.counts, device=work.accelerator), aim.config)
        turn = Turn(int(said["turn"]), int(said["turns"]), work.device)
        seed = derive_seed(int(said["seed"]), "federated", turn.number, work.device)
        trained, losses = Named(), list[float]()
        for number, architecture in enumerate(read_architectures(str(said["architectures"]), space)):
            network = make_network(space, architecture, work.train, aim.loss, seed)
            put(network, _part(tensors, number))
            network.to(work.accelerator)
            losses.append(train_network(network, work.train, loss, recipe, seed, turn=turn))
            trained |= {f"{number}.{name}": value for name, value in trained_part(network).items()}
        return make_content({"samples": len(work.train), "losses": losses}, trained)

    # --- the super-network ---

    def _keep(self, message: Message, context: Context, work: ImbNasWorkload) -> RecordDict:
        said, weights = config_of(message), tensors_of(message)
        digest, place = str(said["digest"]), (context.run_id, context.node_id)
        shard = _built(digest, str(said["space"]), weights, work)
        if not stays():  # the next process needs a file; one that stays has the model itself
            file = self._cache.save(*place, weights)
            context.state[STATE] = ConfigRecord({"digest": digest, "space": str(said["space"]), "file": file})
        self._remember(place, _Held(digest, shard))
        return make_content({"device": work.device, "digest": digest})

    def _forget(self, _message: Message, context: Context, work: ImbNasWorkload) -> RecordDict:
        place = (context.run_id, context.node_id)
        self._live.pop(place, None)
        self._cache.drop(*place)
        context.state.pop(STATE, None)
        return make_content({"device": work.device})

    def _found(self, said: Mapping[str, Any], context: Context, work: ImbNasWorkload) -> Shard | None:
        """Return the device's images behind the super-network that a message names, if the device still has it."""
        digest, place = str(said["digest"]), (context.run_id, context.node_id)
        held = self._live.get(place)
        if held is not None and held.digest == digest:
            return held.shard
        noted: Any = context.state.config_records.get(STATE)
        if noted is None or noted["digest"] != digest:
            return None
        try:
            weights = self._cache.load(*place, str(noted["file"]))
        except ReplyError as error:
            log.warning("%s asks for the super-network again: %s", work.device, error)
            return None
        held = _Held(digest, _built(digest, str(noted["space"]), weights, work))
        self._remember(place, held)
        return held.shard

    def _remember(self, place: tuple[int, int], held: _Held) -> None:
        self._live[place] = held
        self._live.move_to_end(place)
        while len(self._live) > self._keep_live:
            self._live.popitem(last=False)


def _built(digest: str, space: str, weights: Mapping[str, Tensor], work: ImbNasWorkload) -> Shard:
    """Return a device's images behind a super-network of given weights.

    Raises
    ------
    ReplyError
        Weights that do not fit the space and the images, or have another hash.
    """
    supernet = Supernet(read_space(space), work.train.shape[0], torch_rng(0, "skeleton"))
    put(supernet, weights)
    if weights_digest(supernet) != digest:
        raise ReplyError(f"{work.device} was sent a super-network whose hash is not {digest}")
    try:
        return Shard(supernet.to(work.accelerator), work.train, work.validation)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"accelerator={work.accelerator} cannot be used: {error}") from None


def _part(tensors: Mapping[str, Tensor], number: int) -> Named:
    found = (name.partition(".") for name in tensors)
    return {own: tensors[f"{first}.{own}"] for first, _, own in found if first == str(number)}


def _moved(tensors: Mapping[str, Tensor], work: ImbNasWorkload) -> Named:
    return {name: value.to(work.accelerator) for name, value in tensors.items()}
