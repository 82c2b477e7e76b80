"""What the codec asks of every value before it uses it, on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from types import NoneType
from typing import Any

from fl_edge.link.resident.compression import RAW, SCHEMES

_INT64, _UINT64 = 2**63, 2**64
_MAX_TEXT = _MAX_AXES = 64
_ENCODINGS = frozenset((RAW, *SCHEMES))
# Kind of record -> the exact types of its values.
KINDS = {"config": frozenset((bool, int, float, str, bytes)), "metric": frozenset((int, float))}
# Field of Metadata, in the order of its constructor -> the types it may have. Integers are unsigned.
METADATA: dict[str, tuple[type, ...]] = {
    "run_id": (int,),
    "message_id": (str,),
    "src_node_id": (int,),
    "dst_node_id": (int,),
    "reply_to_message_id": (str,),
    "group_id": (str,),
    "created_at": (float,),
    "ttl": (float,),
    "message_type": (str,),
    "src_task_id": (int, NoneType),
    "dst_task_id": (int, NoneType),
}
# The usual types of all fields together, so that one look tells: task ids may be there or not.
_USUAL_METADATA = frozenset(product(*METADATA.values()))


def is_plain(value: Any, scalars: frozenset[type]) -> bool:
    """Whether a value is of exactly one of the types, or a list of one of them, and its integers fit into 64 bits."""
    if type(value) is int:
        return -_INT64 <= value < _UINT64
    if type(value) is list:
        kinds = set(map(type, value))
        return not kinds or (len(kinds) == 1 and kinds <= scalars and (kinds != {int} or in_range(value)))
    return type(value) in scalars


def in_range(values: list[int]) -> bool:
    """Whether one 64-bit type, with or without sign, holds all these integers."""
    low, high = min(values), max(values)
    return low >= -_INT64 and high < (_UINT64 if low >= 0 else _INT64)


def describes_array(dtype: Any, shape: Any, stype: Any) -> bool:
    """Whether these can be the description of an array."""
    return (
        type(dtype) is type(stype) is str
        and max(len(dtype), len(stype)) <= _MAX_TEXT
        and isinstance(shape, tuple)
        and len(shape) <= _MAX_AXES
        and all(type(axis) is int and 0 <= axis < _INT64 for axis in shape)
    )


def check_array(value: Any, name: str, key: str) -> None:
    """Raise ValueError unless a value of the header describes an array."""
    dtype, shape, stype, length, encoding = sequence(value, 5, "array")
    if not describes_array(dtype, shape, stype) or type(length) is not int or length < 0:
        raise ValueError(f"{place(name, key)}dtype, shape, stype or length are damaged")
    if type(encoding) is not str or encoding not in _ENCODINGS:
        raise ValueError(f"{place(name, key)}the encoding {shown(encoding)} is unknown")


def check_metadata(values: Sequence[Any]) -> None:
    """Raise ValueError unless these can be the fields of Metadata, in the order of its constructor."""
    integers = [value for value in values if type(value) is int]
    if tuple(map(type, values)) in _USUAL_METADATA and min(integers) >= 0 and max(integers) < _UINT64:
        return
    for (field, kind), value in zip(METADATA.items(), values, strict=True):
        if not isinstance(value, kind) or type(value) is bool or (type(value) is int and not 0 <= value < _UINT64):
            raise ValueError(f"{field} cannot be {shown(value)}")


def check_error(error: Any) -> None:
    """Raise ValueError unless this is an error's code and reason."""
    code, reason = sequence(error, 2, "error")
    is_code = isinstance(code, int) and type(code) is not bool and -_INT64 <= code < _INT64
    if not is_code or not isinstance(reason, str | None):
        raise ValueError(f"an error cannot have code {shown(code)}, reason {shown(reason)}")


def check_count(count: int, limit: int, what: str) -> None:
    """Raise ValueError when there is more than allowed."""
    if count > limit:
        raise ValueError(f"{count} {what}, at most {limit} are allowed")


def sequence(value: Any, length: int | None, what: str) -> Any:
    """Return a value that must be a tuple, of this length if one is given."""
    if type(value) is not tuple or (length is not None and len(value) != length):
        raise ValueError(f"{what} cannot be {shown(value)}")
    return value


def place(name: str, key: str) -> str:
    """Return where in a message something stands, to begin a line with."""
    return f"record {shown(name)}, key {shown(key)}: "


def place_of(text: str, records: list[Any]) -> str:
    """Return where in the records a text stands; nothing if it stands in the metadata or the error."""
    for _, name, keys, values in records:
        for key, value in zip(keys, values, strict=True):
            if text in (name, key, value) or (isinstance(value, list | tuple) and text in value):
                return place(name, key)
    return ""


def shown(value: Any) -> str:
    """Return a value as it may stand in a line, whoever sent it: no line breaks, no length, no depth."""
    if isinstance(value, str | bytes):
        return repr(value[:60])
    return repr(value) if isinstance(value, int | float | None) else f"a {type(value).__name__}"
