"""Keeping what transformers says about loading and saving off the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show no progress bars, and no report about a head that is new."""
    from transformers.utils import logging as module  # noqa: PLC0415 - heavy

    logging: Any = module  # untyped
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
