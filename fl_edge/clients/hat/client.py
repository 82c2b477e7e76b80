"""The HAT client: generates text together with the cloud, which sees hidden states and never a token.

Five messages, beside those of the adapter's training (`fl_edge.clients.hat.learning`); `arrays` holds one packed array
(see `fl_edge.link.packing`) with the rows of hidden states:

===================  ==================================  =============================================================
message type         asks with                           answers with
===================  ==================================  =============================================================
query.hat_describe   which model it has, if it likes     device, what its part of the model is of
query.hat_begin      request, tokens that it may have    first chunk of the prompt of this number, or a later one
query.hat_go_on      nothing: the chunk is there         next chunk of the prompt
query.hat_answer     rows after the middle submodel      rows to verify next; after the last, the request's account
query.hat_refused    why an upload was not taken         nothing
===================  ==================================  =============================================================

Where the process stays (`fl_edge.link.resident`), the device drafts on while the cloud verifies. Where it may not live
from one message to the next, the text so far waits in `Context.state`, which does not leave the device either, and the
caches are computed again; so does what was measured of link and cloud, from one prompt to the next.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_edge.clients.answering import answering
from fl_edge.clients.cache import WeightCache
from fl_edge.clients.hat.learning import AdapterLearner
from fl_edge.errors import ConfigError, ReplyError
from fl_edge.hat.adapter import Adapter
from fl_edge.hat.config import HatConfig
from fl_edge.hat.medusa import MedusaHeads
from fl_edge.hat.messages import Upload
from fl_edge.hat.session import DeviceSession
from fl_edge.hat.split import DeviceModel
from fl_edge.hat.wire import check_model, read_answer, write_upload
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.resident.staying import stays

STATE, MEASURED = "hat", "hat_measured"  # this client's records in Context.state: of a request, and over all of them

log = logging.getLogger("flwr.fl_edge")


def _logged(request: int, reason: str) -> None:
    log.warning("request %d is not answered: %s", request, reason)


@dataclass(frozen=True)
class HatWorkload:
    """What a device generates, and with what.

    Attributes
    ----------
    device
        Its name, the same in every run.
    model
        Its part of the model (`fl_edge.hat.split.load_device`).
    adapter
        To draft with (`fl_edge.hat.adapter.load_adapter`, `fl_edge.hat.medusa.load_heads`) until the server sends one;
        without one nothing is drafted.
    prompt
        Number -> tokens (n,) int64 of the prompt with that number, from 0 on; nothing when there are no more. It may
        wait, for a person at a keyboard.
    hear
        Called with the number of a prompt and new tokens, as they come; with none when the answer begins.
    tell
        Called with the number of a prompt that is not answered, and why.
    config
        How text is generated.
    seed
        Of all draws on this device.
    stops
        Tokens that end a text.
    texts
        (s, n) int64, sequences of full length that the adapter is trained on; they do not leave the device. Without
        any, a device takes no part in that.
    threads
        Threads of torch.
    """

    device: str
    model: DeviceModel
    adapter: Adapter | MedusaHeads | None
    prompt: Callable[[int], Tensor | None]
    hear: Callable[[int, Sequence[int]], None]
    tell: Callable[[int, str], None] = _logged
    config: HatConfig = field(default_factory=HatConfig)
    seed: int = 0
    stops: Collection[int] = ()
    texts: Tensor | None = None
    threads: int = 1


class HatClient:
    """Answers HAT's messages on a device.

    Parameters
    ----------
    load
        Context -> HatWorkload. Called for every message, so it should remember what is slow to make.
    cache
        Where a trained adapter waits between messages, and what it is trained with.

    Examples
    --------
    In a Flower project of one's own::

        app = ClientApp()
        HatClient(load).register(app)
    """

    def __init__(self, load: Callable[[Context], HatWorkload], *, cache: WeightCache | None = None) -> None:
        self._load = load
        self._learner = AdapterLearner(cache)
        self._live: dict[tuple[int, int], DeviceSession] = {}

    def register(self, app: ClientApp) -> None:
        """Add the nine handlers to a ClientApp, beside whatever else it does."""
        app.query("hat_study")(answering(self._load, self._learner.study))
        app.query("hat_lesson")(answering(self._load, self._learner.lesson))
        app.train("hat_adapter")(answering(self._load, self._learner.train))
        app.query("hat_keep")(answering(self._load, self._learner.keep))
        app.query("hat_describe")(answering(self._load, self._describe))
        app.query("hat_begin")(answering(self._load, self._begin))
        app.query("hat_go_on")(answering(self._load, self._go_on))
        app.query("hat_answer")(answering(self._load, self._answer))
        app.query("hat_refused")(answering(self._load, self._refused))

    def _describe(self, message: Message, _context: Context, work: HatWorkload) -> RecordDict:
        model = json.dumps(work.model.identity)
        if (server := config_of(message).get("model")) is not None:
            check_model(model, json.loads(server))
        return make_content({"device": work.device, "model": model})

    def _begin(self, message: Message, context: Context, work: HatWorkload) -> RecordDict:
        config = config_of(message)
        number, known = int(config["request"]), self._live.get((context.run_id, context.node_id))
        session = known if known and number else self._new(context, work, int(config["capacity"]))
        return self._next(session, number, context, work)

    def _go_on(self, _message: Message, context: Context, work: HatWorkload) -> RecordDict:
        session = self._found(context, work)
        return self._uploaded(session, session.go_on(), context)

    def _answer(self, message: Message, context: Context, work: HatWorkload) -> RecordDict:
        session = self._found(context, work)
        answer = read_answer(config_of(message), tensors_of(message))
        upload = session.answer(answer)
        if upload is not None:
            return self._uploaded(session, upload, context)
        self._over(session, context)
        return make_content({"account": session.account.to_text(), "next": True})

    def _refused(self, message: Message, context: Context, work: HatWorkload) -> RecordDict:
        session, config = self._found(context, work), config_of(message)
        session.give_up()
        work.tell(int(config["request"]), str(config["reason"]))
        self._over(session, context)
        return make_content({"next": True})

    @staticmethod
    def _over(session: DeviceSession, context: Context) -> None:
        context.state.pop(STATE, None)
        if not stays():
            context.state[MEASURED] = ConfigRecord({"session": json.dumps(session.measured())})

    def _next(self, session: DeviceSession, number: int, context: Context, work: HatWorkload) -> RecordDict:
        """Begin with the next prompt that can be answered, or say that there are no more."""
        while (prompt := work.prompt(number)) is not None:
            try:
                upload = session.begin(number, prompt)
            except ConfigError as error:
                work.tell(number, str(error))
                number += 1
            else:
                work.hear(number, ())
                return self._uploaded(session, upload, context)
        self._live.pop((context.run_id, context.node_id), None)
        self._learner.forget(context)
        for name in (STATE, MEASURED):
            context.state.pop(name, None)
        return make_content({"end": True})

    def _uploaded(self, session: DeviceSession, upload: Upload, context: Context) -> RecordDict:
        if stays():
            session.look_ahead()
        else:
            record = json.dumps({"context": session.context, **session.to_record()})
            context.state[STATE] = ConfigRecord({"session": record})
        return make_content(*write_upload(upload))

    def _new(self, context: Context, work: HatWorkload, tokens: int) -> DeviceSession:
        adapter = self._learner.adapter(context, work) or work.adapter
        session = DeviceSession(work.model, adapter, work.config, tokens, work.seed, work.stops, work.hear)
        if (noted := self._noted(context, MEASURED)) is not None:
            session.remember(noted)
        self._live[context.run_id, context.node_id] = session
        return session

    def _found(self, context: Context, work: HatWorkload) -> DeviceSession:
        """Return the session as the last message left it: in memory, or as noted by another process."""
        record = self._noted(context, STATE)
        live = self._live.get((context.run_id, context.node_id))
        if live is not None and (record is None or live.stands_at(record)):
            return live
        prompt = None if record is None else work.prompt(int(record["request"]))
        if record is None or prompt is None:
            raise ReplyError("the cloud speaks of a request that is not under way on this device")
        session = self._new(context, work, int(record["context"]))
        session.restore(record, prompt)
        return session

    @staticmethod
    def _noted(context: Context, name: str) -> Any:
        """Return what another process noted, or nothing."""
        noted: Any = context.state.config_records.get(name)
        return None if noted is None else json.loads(noted["session"])
