"""The run folder: all that a run leaves behind, every file whole.

::

    runs/<name>/
        config.yaml      the resolved configuration
        rounds.jsonl     one record a round
        result.json      summary, versions, whether the run is complete
        *.png            pictures
        events.*         TensorBoard scalars and histograms
        checkpoints/     what the next round depends on
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fl_edge.errors import RunFolderError
from fl_edge.files import write_whole

_CONFIG, _ROUNDS, _RESULT = "config.yaml", "rounds.jsonl", "result.json"


class RunFolder:
    """A run's folder.

    Use :meth:`create` for a new run and :meth:`reopen` for one that is to go on.
    """

    def __init__(self, path: Path, rounds: list[dict[str, Any]]) -> None:
        self.path = path
        self.rounds = rounds

    @classmethod
    def create(cls, path: Path, config_yaml: str, needs_bytes: int = 0) -> RunFolder:
        """Make the folder of a new run.

        Parameters
        ----------
        needs_bytes
            Room that the disk must have for it.

        Raises
        ------
        RunFolderError
            It exists and is not empty, cannot be made, or the disk is too full; then nothing is left behind.
        """
        path = path.expanduser().absolute()
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise RunFolderError(f"{path} is there already; choose another name, or resume it with resume={path}")
            path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path).free
        except OSError as error:
            raise RunFolderError(f"cannot make the run folder {path}: {error.strerror}") from None
        if free < needs_bytes:
            path.rmdir()
            raise RunFolderError(
                f"the disk of {path} has {free / 1e6:.1f} MB left; a run of this model needs {needs_bytes / 1e6:.1f} MB"
            )
        try:
            write_whole(path / _CONFIG, config_yaml)
        except RunFolderError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return cls(path, [])

    @classmethod
    def reopen(cls, path: Path, last_round: int, config_yaml: str) -> RunFolder:
        """Open the folder of a run that is to go on after `last_round`; what was recorded beyond it is forgotten.

        The configuration is written anew: a resumed run may have more rounds.

        Raises
        ------
        RunFolderError
            The records up to `last_round` are not all there, or cannot be read.
        """
        file = path / _ROUNDS
        try:
            rounds = [json.loads(line) for line in file.read_text().splitlines()[:last_round]] if last_round else []
        except (OSError, ValueError) as error:
            raise RunFolderError(f"cannot read {file}: {error}") from None
        if len(rounds) != last_round:
            raise RunFolderError(f"{file} holds {len(rounds)} rounds; the checkpoint is of round {last_round}")
        write_whole(path / _CONFIG, config_yaml)
        return cls(path, rounds)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def add_round(self, record: Mapping[str, Any]) -> None:
        """Append a round's record to rounds.jsonl."""
        self.rounds.append(dict(record))
        write_whole(self.path / _ROUNDS, "".join(json.dumps(one) + "\n" for one in self.rounds))

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that ended before its first round did: there is nothing in it to keep."""
        if not self.rounds:
            shutil.rmtree(self.path, ignore_errors=True)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json."""
        write_whole(self.path / _RESULT, json.dumps(result, indent=2) + "\n")


def saved_config(path: Path) -> Path:
    """Return the configuration file of a run folder.

    Raises
    ------
    RunFolderError
        The path is not a run folder.
    """
    file = path.expanduser().absolute() / _CONFIG
    if not os.path.isfile(file):  # Path.is_file raises for a name that is too long
        raise RunFolderError(f"{path} is not a run folder: it holds no {_CONFIG}")
    return file


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each package, or that it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow, and rarely needed

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
