"""The content of fl_edge's messages: one ConfigRecord of plain values, and at most one packed array of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fl_edge.link.packing import pack, unpack

CONFIG, ARRAYS, PACKED = "config", "arrays", "packed"


def make_content(config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> RecordDict:
    """Build a message's content from plain values (numbers, text, or lists of one kind) and named tensors."""
    content = RecordDict({CONFIG: ConfigRecord(dict(config))})
    if tensors is not None:
        content[ARRAYS] = ArrayRecord({PACKED: pack(tensors)})
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
