"""Whether this process was started for one message, or stays for many.

A client that keeps files for the next process can spare them while it stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_stays: ContextVar[bool] = ContextVar("fl_edge_stays", default=False)


def stays() -> bool:
    """Return True inside a handler that a resident client calls."""
    return _stays.get()


@contextmanager
def staying() -> Iterator[None]:
    """Mark what runs inside as a resident client's."""
    token = _stays.set(True)
    try:
        yield
    finally:
        _stays.reset(token)
