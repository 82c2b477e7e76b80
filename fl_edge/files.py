"""Files that are written whole or not at all, and where caches lie."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fl_edge.errors import RunFolderError


def default_folder() -> Path:
    """Return the folder of the caches: $FL_EDGE_CACHE, else fl_edge in the user's cache folder."""
    chosen = os.environ.get("FL_EDGE_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fl_edge"


def write_whole(file: Path, content: bytes | str) -> None:
    """Write a file so that at any moment either the old or the new content stands there, also after a crash.

    Raises
    ------
    RunFolderError
        The disk is full, the folder is read-only, or it is gone.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RunFolderError(f"cannot write {file}: {error.strerror}; what stood there before is unchanged") from None
