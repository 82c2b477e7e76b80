"""What a benchmark writes down: each measurement as it ends, and at the end one JSON file and one picture."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Partial:
    """The measurements of an unfinished run, one line of JSON each, under a name that holds settings and code.

    Parameters
    ----------
    folder
        Where unfinished runs live.
    stem
        The benchmark's name, with ``.quick`` for the quick variant.
    key
        Fingerprint of everything that the numbers depend on; a file with another one is not resumed.
    """

    def __init__(self, folder: Path, stem: str, key: str) -> None:
        self.folder, self.stem = folder, stem
        self.path = folder / f"{stem}@{key}.jsonl"
        self.others = [path for path in self._files() if path != self.path]
        lines = _complete_lines(self.path)
        headers = [line for line in lines if "started" in line]
        self.records = [line for line in lines if "case" in line]
        self.resumed = len(self.records)
        self.started: str = headers[0]["started"] if headers else now()
        self.sittings = len(headers) + 1
        self._append({"started": now() if headers else self.started})

    @property
    def done(self) -> set[tuple[str, int, int]]:
        """The (case, seed, repetition) that need not be measured again."""
        return {(record["case"], record["seed"], record["repetition"]) for record in self.records}

    def describe(self) -> list[str]:
        """Say what is taken over from an earlier run, and what is not."""
        lines = [f"going on after {self.resumed} measurements"] if self.resumed else []
        if self.others:
            lines.append(
                f"not resumed: {len(self.others)} unfinished run(s) of {self.stem} with other settings or code"
            )
        return lines

    def append(self, record: dict[str, Any]) -> None:
        """Write down one measurement; it is on disk when this returns."""
        self._append(record)
        self.records.append(json.loads(json.dumps(record)))

    def remove(self) -> None:
        """Remove this run's file and those of earlier unfinished runs of the same benchmark."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("*.jsonl")) if path.name.rsplit("@", 1)[0] == self.stem]

    def _append(self, record: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("ab") as file:
            file.write((b"\n" if torn else b"") + json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """Return the file's records; a line that was torn by a crash is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def write_whole(json_path: Path, document: Mapping[str, Any], png_path: Path, draw: Callable[[Path], None]) -> None:
    """Write the results and their picture; each file appears whole, and neither does if the other cannot be made."""
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_part, png_part = (path.with_name(f".{path.stem}.part{path.suffix}") for path in (json_path, png_path))
    try:
        json_part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        draw(png_part)
        os.replace(png_part, png_path)
        os.replace(json_part, json_path)
    finally:
        json_part.unlink(missing_ok=True)
        png_part.unlink(missing_ok=True)


def fingerprint(settings: Mapping[str, Any], sources: Sequence[Path]) -> str:
    """Return 12 hexadecimal digits that change with the settings and with any source file."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def now() -> str:
    """Return the time of day in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Return the installed version of each distribution, None for one that is absent."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe_machine() -> dict[str, Any]:
    """Return what times depend on: processor, cores, memory, system, Python; no host name and no paths."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": cpu,
        "cores": usable,
        "memory_gib": round(memory / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average_at_end": [round(load, 2) for load in os.getloadavg()],
    }


def describe_source() -> dict[str, Any]:
    """Return the commit that was measured, and whether files differed from it (results aside)."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"id": commit, "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
