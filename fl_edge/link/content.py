"""The content of fl_edge's messages: one ConfigRecord of plain values, and at most one packed array of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fl_edge.link.packing import pack, unpack

CONFIG, ARRAYS, PACKED = "config", "arrays", "packed"


def make_content(config: Mapping[str, Any], tensors: Mapping[str, Tensor] | Array | None = None) -> RecordDict:
    """Build a message's content.

    Parameters
    ----------
    config
        Plain values: numbers, text, or lists of one kind.
    tensors
        Named tensors, or an array in which they are packed already, for several messages to share.
    """
    content = RecordDict({CONFIG: ConfigRecord(dict(config))})
    if tensors is not None:
        content[ARRAYS] = ArrayRecord({PACKED: tensors if isinstance(tensors, Array) else pack(tensors)})
    return content


def config_of(message: Message) -> dict[str, Any]:
    """Return the plain values of a message, empty if it has none."""
    return dict(message.content.config_records.get(CONFIG, {}))


def tensors_of(message: Message) -> dict[str, Tensor]:
    """Return the tensors of a message, empty if it has none.

    Raises
    ------
    ReplyError
        Bytes that are not a packed array.
    """
    record = message.content.array_records.get(ARRAYS)
    return unpack(record[PACKED]) if record and PACKED in record else {}
