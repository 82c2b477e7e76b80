"""Flower's ClientApp that stays when it is invited: the same name from another module.

::

    from fl_edge.link.resident import ClientApp  # was: from flwr.clientapp import ClientApp
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import flwr.clientapp
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from fl_edge.errors import ReplyError
from fl_edge.link.flower import CLIENT_APP_RAISED_EXCEPTION
from fl_edge.link.resident.client import LinkClient
from fl_edge.link.resident.codec import decode, encode
from fl_edge.link.resident.compression import Compressor
from fl_edge.link.resident.frames import Buffer
from fl_edge.link.resident.invitation import STAY, read_invitation
from fl_edge.link.resident.staying import staying

Answer = Callable[[Message, Context], Message]

log = logging.getLogger("flwr.fl_edge")


class ClientApp(flwr.clientapp.ClientApp):
    """Flower's ClientApp, which stays when a :class:`~fl_edge.link.resident.ResidentGrid` invites it.

    Handlers, mods, lifespan and ``Context`` are as in Flower, for each message; only the process remains from one to
    the next, with everything it has imported and loaded.
    """

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message; an invitation is answered when the server lets the client go."""
        if message.metadata.message_type == STAY:
            return _stay(super().__call__, message, context)
        return super().__call__(message, context)


def _stay(answer: Answer, message: Message, context: Context) -> Message:
    """Answer messages from the stream until the server lets go; return the reply to the invitation."""
    invitation, scheme = read_invitation(message)
    compressor = None if scheme == "none" else Compressor(scheme)  # type: ignore[arg-type]
    client = LinkClient(invitation)
    served = 0
    try:
        with staying():
            for chunks in client.messages():
                client.send(reply_to(answer, chunks, context, compressor, invitation.max_message_bytes))
                served += 1
                del chunks  # or it would live until the next message is there
    finally:
        client.close("its process ends")
    left = ConfigRecord({"served": served, "reason": client.reason})
    return Message(RecordDict({"fl_edge.link": left}), reply_to=message)


def reply_to(
    answer: Answer, chunks: list[Buffer], context: Context, compressor: Compressor | None, max_bytes: int
) -> list[Buffer]:
    """Let the app answer one message; what goes wrong becomes an error reply, as Flower words it."""
    message = decode(chunks)
    try:
        reply = answer(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the handler returned {type(reply).__name__}, not a Message")
        parts = encode(reply, compressor)
        if (size := sum(map(len, parts))) > max_bytes:
            raise ReplyError(f"the reply has {size} bytes; {max_bytes} are allowed (max_message_mib)")
    except Exception as error:
        # logged where Flower logs: on the device, with its traceback; the server gets one line
        log.error("ClientApp raised an exception", exc_info=error)
        reason = f"{type(error)}:<'{error}'>"
        return encode(Message(Error(CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message))
    return parts
