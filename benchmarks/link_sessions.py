"""Runs of Flower Apps on a SuperLink and SuperNodes of this machine, for :mod:`benchmarks.link`."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from simulations.deployment import Deployment
from simulations.processes import DeploymentError

ROOT = Path(__file__).resolve().parent.parent
PROBE = ROOT / "benchmarks/apps/link"
FEDAVG = ROOT / "tests/apps/fedavg"
# All that makes an app resident.
LINES = {
    "client_app.py": ("from flwr.clientapp import ClientApp", "from fl_edge.link.resident import ClientApp"),
    "server_app.py": (
        "from flwr.serverapp import Grid, ServerApp",
        "from fl_edge.link.resident import Grid, ServerApp",
    ),
}
_TIMEOUT_S = 1800.0


class Sessions:
    """Deployments with TLS and node keys, one at a time: with another number of nodes the last one is ended.

    The last one is ended with the process, whatever ends it, or by :meth:`close`.
    """

    def __init__(self) -> None:
        self._kept = ExitStack()
        self._deployment: Deployment | None = None
        self.folder = Path()
        atexit.register(self.close)

    def deployment(self, nodes: int) -> Deployment:
        """Return a deployment with so many nodes, none of which has done anything that is still under way."""
        if self._deployment is None or len(self._deployment.supernodes) != nodes:
            self.close()
            self.folder = Path(self._kept.enter_context(tempfile.TemporaryDirectory(prefix="fl_edge-link-")))
            made = Deployment(self.folder, nodes, environment={"PYTHONPATH": str(ROOT)})
            self._deployment = self._kept.enter_context(made)
        return self._deployment

    def close(self) -> None:
        """End the deployment, if there is one."""
        self._deployment = None
        self._kept.close()

    def probe(self, nodes: int, *, resident: bool, **config: Any) -> dict[str, Any]:
        """Run the probe app, resident or as it is, and return what it measured."""
        deployment = self.deployment(nodes)
        out = self.folder / "outcome.json"
        out.unlink(missing_ok=True)
        names = {name.replace("_", "-"): value for name, value in config.items()}
        app = resident_copy(PROBE, self.folder / "probe") if resident else PROBE
        self.run(deployment, app, {"nodes": nodes, "out": str(out), **names})
        return dict(json.loads(out.read_text()))

    def run(self, deployment: Deployment, app: Path, config: Mapping[str, Any]) -> float:
        """Run an app to its end, printing what it says of its progress, and return its seconds from submission on.

        Raises
        ------
        DeploymentError
            The run has failed, or takes half an hour.
        """
        started = time.perf_counter()
        run = deployment.start(app, config)
        said = 0
        while run.stream.process.poll() is None:
            if time.perf_counter() - started > _TIMEOUT_S:
                raise DeploymentError(f"the run is not done after {_TIMEOUT_S:g} s; {run.stream.last_lines()}")
            lines = progress(run.log)
            for line in lines[said:]:
                print(f"  {line}", flush=True)
            said = len(lines)
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        outcome = run.wait()
        if outcome.status != "finished:completed":
            raise DeploymentError(f"a run of {app.name} is {outcome.status}:\n{outcome.log[-3000:]}")
        return seconds


def progress(log: str) -> list[str]:
    """Return the lines of a log that say how far a run is: the probe's own, and the rounds of Flower's strategies."""
    found = []
    for line in log.splitlines():
        for mark in ("link-probe: ", "[ROUND "):
            if mark in line:
                found.append(line[line.index(mark) :].removeprefix("link-probe: ").strip())
    return found


def resident_copy(app: Path, folder: Path) -> Path:
    """Copy an app, with one import changed on each side: its clients stay."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(app, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, (stock, resident) in LINES.items():
        (file,) = folder.rglob(name)
        text = file.read_text()
        if text.count(f"{stock}\n") != 1:
            raise ValueError(f"{app.name}: {name} must have the line {stock!r} once")
        file.write_text(text.replace(stock, resident))
    return folder
