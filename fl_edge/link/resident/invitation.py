"""The invitation that asks a node by Flower's own way to come and stay; and the one for a client without Flower."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Message, RecordDict

from fl_edge.errors import ReplyError
from fl_edge.link.resident.client import Invitation

if TYPE_CHECKING:
    from fl_edge.link.resident.config import LinkConfig  # a device has no use for it

STAY = "query.fl_edge_stay"  # type of the message
_RECORD, _VERSION = "fl_edge.link", 1
_TTL_S = 30 * 86_400.0  # of the invitation, and so the longest stay


def make_invitation(node_id: int, token: bytes, address: str, authority: bytes, config: LinkConfig) -> Message:
    """Return the message that invites a node."""
    record = ConfigRecord(
        {
            "version": _VERSION,
            "address": address,
            "authority": authority,
            "token": token,
            "grace_s": config.grace_s,
            "heartbeat_s": config.heartbeat_s,
            "frame_bytes": config.frame_bytes,
            "max_message_bytes": config.max_message_bytes,
            "compression": config.compression,
        }
    )
    return Message(RecordDict({_RECORD: record}), node_id, STAY, ttl=_TTL_S)


def read_invitation(message: Message) -> tuple[Invitation, str]:
    """Return what a client needs to come, and the compression that was agreed on.

    Raises
    ------
    ReplyError
        It comes from another version of fl_edge.
    """
    record = dict(message.content.config_records.get(_RECORD, {}))
    if record.pop("version", None) != _VERSION:
        raise ReplyError("the server has another version of fl_edge than this device; install the same on both")
    compression = str(record.pop("compression"))
    return Invitation(node_id=message.metadata.dst_node_id, **record), compression  # type: ignore[arg-type]


def own_invitation(address: str, token: bytes, authority: bytes, config: LinkConfig) -> Invitation:
    """Return what a client needs to come to an :class:`~fl_edge.link.resident.open.OpenGrid` by itself.

    Parameters
    ----------
    address
        ``host:port``.
    token
        That the server lets devices in with.
    authority
        PEM to trust; empty for a connection in the clear.
    config
        Time-outs; the rest must be as the server has it.
    """
    number = 1 + secrets.randbelow(2**62)  # nobody is told it; two devices draw the same hardly ever
    return Invitation(
        address=address,
        node_id=number,
        authority=authority,
        token=token,
        grace_s=config.grace_s,
        heartbeat_s=config.heartbeat_s,
        frame_bytes=config.frame_bytes,
        max_message_bytes=config.max_message_bytes,
    )
