"""A device's part in the training of its adapter, and the adapter that it was sent last.

Four messages; `arrays` holds one packed array (see `fl_edge.link.packing`):

==================  =====================================  ==========================================================
message type        asks with                              answers with
==================  =====================================  ==========================================================
query.hat_study     nothing                                hidden states of the first sequence of the device's text
query.hat_lesson    rows after the middle submodel         those of the next sequence; nothing more after the last
train.hat_adapter   an adapter, how it is to be trained    the adapter after training, tokens, how it agreed before
query.hat_keep      an adapter                             nothing: drafts are made with it from now on
==================  =====================================  ==========================================================

Where the process may not live from one message to the next, rows and adapter wait in files of the run's (see
`fl_edge.clients.cache`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from fl_edge.clients.cache import WeightCache
from fl_edge.errors import ReplyError
from fl_edge.hat.adapter import Adapter
from fl_edge.hat.distillation import Course
from fl_edge.hat.federation import drafting, learn
from fl_edge.hat.split import DeviceModel
from fl_edge.hat.study import Study
from fl_edge.hat.wire import read_answer, write_upload
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.resident.staying import stays
from fl_edge.seeding import derive_seed

STATE = "hat_adapter"  # in Context.state: the hash of the adapter that this device was sent

Place = tuple[int, int]  # run and node


class Learning(Protocol):
    """What training needs of a workload."""

    @property
    def device(self) -> str:
        """Its name."""

    @property
    def model(self) -> DeviceModel:
        """Its part of the model."""

    @property
    def texts(self) -> Tensor | None:
        """(s, n) int64."""


@dataclass(frozen=True)
class _Held:
    digest: str
    adapter: Adapter


class AdapterLearner:
    """Answers the messages of the adapter's training.

    Parameters
    ----------
    cache
        Where rows and adapter wait between messages.
    """

    def __init__(self, cache: WeightCache | None = None) -> None:
        self._cache = cache or WeightCache()
        self._studies: dict[Place, Study] = {}
        self._held: dict[Place, _Held] = {}

    def study(self, _message: Message, context: Context, work: Learning) -> RecordDict:
        """Begin, or go on, with what was not asked yet."""
        return self._asked(self._study(context, work))

    def lesson(self, message: Message, context: Context, work: Learning) -> RecordDict:
        """Keep the rows of a sequence, and ask about the next."""
        study = self._study(context, work)
        study.take_in(read_answer(config_of(message), tensors_of(message)))
        return self._asked(study)

    def train(self, message: Message, context: Context, work: Learning) -> RecordDict:
        """Train the adapter that came for one round."""
        said = config_of(message)
        seed = derive_seed(int(said["seed"]), "hat", int(said["round"]), work.device)
        study = self._study(context, work)
        done = learn(work.model, tensors_of(message), study.lessons(), _course(said), float(said["held_out"]), seed)
        return make_content(done.to_config(), done.weights)

    def keep(self, message: Message, context: Context, work: Learning) -> RecordDict:
        """Draft with an adapter from now on; what it was trained with is no longer needed."""
        place, weights = _place(context), tensors_of(message)
        adapter, digest = drafting(work.model, weights), ""
        if not stays():
            digest = self._cache.save(*place, weights)
            context.state[STATE] = ConfigRecord({"digest": digest})
        self._held[place] = _Held(digest, adapter)
        self._studies.pop(place, None)
        shutil.rmtree(self._folder(context), ignore_errors=True)
        return make_content({"device": work.device})

    def adapter(self, context: Context, work: Learning) -> Adapter | None:
        """Return the adapter that was sent last, if one was."""
        place, noted = _place(context), context.state.config_records.get(STATE)
        digest = "" if noted is None else str(noted["digest"])
        held = self._held.get(place)
        if digest and (held is None or held.digest != digest):
            held = self._held[place] = _Held(digest, drafting(work.model, self._cache.load(*place, digest)))
        return held.adapter if held else None

    def forget(self, context: Context) -> None:
        """Let go of all that is kept for a run that has ended."""
        place = _place(context)
        self._studies.pop(place, None)
        self._held.pop(place, None)
        self._cache.drop(*place)
        context.state.pop(STATE, None)

    def _study(self, context: Context, work: Learning) -> Study:
        place = _place(context)
        if place not in self._studies or not stays():
            if work.texts is None:
                raise ReplyError(f"{work.device} has no text to train the adapter on")
            self._studies[place] = Study(work.model, work.texts, None if stays() else self._folder(context))
        return self._studies[place]

    def _folder(self, context: Context) -> Path:
        run, node = _place(context)
        return self._cache.folder / str(run) / f"{node}-lessons"

    @staticmethod
    def _asked(study: Study) -> RecordDict:
        upload = study.next()
        return make_content({"end": True}) if upload is None else make_content(*write_upload(upload))


def _place(context: Context) -> Place:
    return context.run_id, context.node_id


def _course(said: Mapping[str, Any]) -> Course:
    return Course(
        steps=int(said["steps"]),
        batch_size=int(said["batch_size"]),
        rate=float(said["rate"]),
        token_weight=float(said["token_weight"]),
    )
