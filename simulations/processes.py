"""Processes that belong together: started with one mark in their environment, found by it, ended all."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fl_edge.errors import FlEdgeError

_MARK = "FL_EDGE_DEPLOYMENT"
_PATIENCE_S = 10.0  # between asking a process to end and ending it


class DeploymentError(FlEdgeError):
    """A process that does not start or has died, or a run that does not start or end."""


@dataclass
class Service:
    """A process and the file that its output goes to.

    Attributes
    ----------
    process
        A psutil.Popen: `pid`, `poll()`, `terminate()`, `suspend()`, ...
    """

    name: str
    process: Any
    log: Path

    @classmethod
    def start(cls, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Service:
        """Start a command in the folder of its log."""
        with log.open("wb") as output:
            process = psutil.Popen(
                command, env=environment, cwd=log.parent,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return cls(name, process, log)

    def text(self) -> str:
        """Return what the process has printed until now, without Flower's colours."""
        return re.sub(r"\x1b\[\d+m", "", self.log.read_text(errors="replace"))

    def last_lines(self) -> str:
        """Return the end of what it has printed, in one line."""
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        return f"{self.log} ends with: {' | '.join(lines[-8:]) or 'nothing'}"

    def check(self) -> None:
        """Raise when the process has ended."""
        if (status := self.process.poll()) is not None:
            raise DeploymentError(f"{self.name} has ended with status {status}; {self.last_lines()}")

    def kill(self) -> None:
        """End the process and all that it started at once, as when the power fails."""
        _kill(self._family())
        self.process.wait()

    def end(self) -> None:
        """Ask the process and all that it started to end, and insist after a while."""
        end(self._family())
        self.process.poll()

    def _family(self) -> list[Any]:
        with suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return []


def marked(mark: str) -> dict[str, str]:
    """Return the variable that marks a process and all that it will start, orphans too."""
    return {_MARK: mark}


def find(mark: str, command: str = "") -> list[Any]:
    """Return the processes with a mark (psutil.Process), all or those of a command like `flwr-serverapp`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone in the meantime, or another user's
            if process.environ().get(_MARK) == mark:
                names = [Path(part).name for part in process.cmdline()[:2]]  # interpreter and script
                found += [process] if not command or command in names else []
    return found


def end(processes: list[Any]) -> None:
    """Ask processes to end, and insist after a while."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_PATIENCE_S)
    _kill(alive)
    psutil.wait_procs(alive, timeout=_PATIENCE_S)


def _kill(processes: list[Any]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
