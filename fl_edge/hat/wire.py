"""Uploads and answers as plain values and one tensor, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.hat.messages import Answer, Upload

ROWS = "rows"
_UPLOAD = {"request": int, "base": int, "last": bool, "verify": bool}
_ANSWER = {"request": int, "wait_s": float, "batch_tokens": int, "batch_s": float}

Plain = dict[str, Any]


def write_upload(upload: Upload) -> tuple[Plain, dict[str, Tensor]]:
    """Return an upload's plain values and its tensor."""
    plain: Plain = {name: getattr(upload, name) for name in _UPLOAD}
    for name in ("parents", "kept"):
        if (numbers := getattr(upload, name)) is not None:
            plain[name] = list(numbers)
    return plain, {ROWS: upload.rows.cpu()}


def read_upload(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Upload:
    """Undo :func:`write_upload`.

    Raises
    ------
    ReplyError
        What a device cannot mean; whether it fits what the cloud has is for :class:`fl_edge.hat.cloud.Cloud` to say.
    """
    trees: Plain = {name: _numbers(plain, name) for name in ("parents", "kept") if name in plain}
    return Upload(rows=_rows(tensors), **_read(plain, _UPLOAD), **trees)


def write_answer(answer: Answer) -> tuple[Plain, dict[str, Tensor]]:
    """Return an answer's plain values and its tensor."""
    return {name: getattr(answer, name) for name in _ANSWER}, {ROWS: answer.rows.cpu()}


def read_answer(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Answer:
    """Undo :func:`write_answer`; raises ReplyError as :func:`read_upload`."""
    return Answer(rows=_rows(tensors), **_read(plain, _ANSWER))


def check_model(device: Any, server: Mapping[str, Any]) -> None:
    """See that a device's part is of the server's model and cut.

    Parameters
    ----------
    device
        What the device says: JSON of the `identity` of its :class:`~fl_edge.hat.split.DeviceModel`.
    server
        What is due, as :func:`~fl_edge.hat.split.identify` has it.

    Raises
    ------
    ReplyError
        It is of another one.
    """
    try:
        model = json.loads(device)
    except (ValueError, TypeError, RecursionError):
        model = None
    if model != server:
        told = {key: model.get(key) if isinstance(model, dict) else None for key in server}
        differ = ", ".join(
            key if key == "weights" else f"{key} ({_short(told[key])} and not {due})"
            for key, due in server.items()
            if told[key] != due
        )
        raise ReplyError(f"the device's part of the model is not of the server's model: {differ} differ")


def _short(value: Any) -> str:
    return repr(value)[:20]


def _read(plain: Mapping[str, Any], kinds: Mapping[str, type]) -> Plain:
    for name, kind in kinds.items():
        if type(plain.get(name)) is not kind:
            raise ReplyError(
                f"{name}={plain.get(name)!r} is not allowed in a message of HAT; it must be {kind.__name__}"
            )
    return {name: plain[name] for name in kinds}


def _numbers(plain: Mapping[str, Any], name: str) -> tuple[int, ...]:
    numbers = plain[name]
    if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
        raise ReplyError(f"{name} of an upload must be a list of integers")
    return tuple(numbers)


def _rows(tensors: Mapping[str, Tensor]) -> Tensor:
    rows = tensors.get(ROWS)
    if rows is None or tensors.keys() != {ROWS} or rows.ndim != 2 or not _numeric(rows):
        raise ReplyError("a message of HAT carries one tensor, rows of hidden states (n, d)")
    return rows


def _numeric(rows: Tensor) -> bool:
    return rows.is_floating_point() or rows.dtype == torch.int8
