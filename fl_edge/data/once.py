"""What is made once on a machine and then read by every process: collected texts, tokenizers, pretrained models.

Ray workers and SuperNodes start together and want the same thing at the same moment. One of them makes it, in a folder
beside, under a lock that the system takes back from a process that dies; the others wait. A folder counts as made when
its list of checksums is there and right, so what a crash or a full disk left behind is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fl_edge.errors import DataError
from fl_edge.files import default_folder, write_whole

log = logging.getLogger("flwr.fl_edge")

_CHECKSUMS = "checksums.json"
_SHORT_S = 1.0  # what takes no longer is not worth a message


def content_key(*parts: object) -> str:
    """Return a short name for everything that a result depends on; parts must have a faithful `repr`."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=10).hexdigest()


def made_once(kind: str, key: str, make: Callable[[Path], None], what: str) -> Path:
    """Return the folder of something kept on disk; make it first if it is not there or damaged.

    Parameters
    ----------
    kind, key
        Folder below the caches' folder, and the name in it (see :func:`content_key`).
    make
        Writes its files into the empty folder it is given. Called by one process at a time and key.
    what
        For messages, for example ``the texts of numpy``.

    Raises
    ------
    DataError
        The folder cannot be written. Whatever ``make`` raises.
    """
    folder = default_folder() / kind / key
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with folder.with_name(f".{key}.lock").open("w") as lock:
            _wait(lock, what)
            if not is_whole(folder):  # nobody made it while we waited
                _make(folder, make)
    except OSError as error:
        raise DataError(
            f"cannot keep {what} in {folder.parent}: {error.strerror or error}; set FL_EDGE_CACHE"
        ) from None
    return folder


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds all files of its list of checksums, unchanged."""
    try:
        checksums: dict[str, str] = json.loads((folder / _CHECKSUMS).read_text())
        return all(_checksum(folder / name) == value for name, value in checksums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _wait(lock: IO[str], what: str) -> None:
    deadline = time.monotonic() + _SHORT_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return
    log.info("another process makes %s; waiting for it", what)
    fcntl.flock(lock, fcntl.LOCK_EX)


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    for leftover in (partial, folder):  # of a process that was killed, or damaged
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        make(partial)
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        checksums = {file.relative_to(partial).as_posix(): _checksum(file) for file in files}
        write_whole(partial / _CHECKSUMS, json.dumps(checksums))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
