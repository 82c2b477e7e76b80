"""A SuperLink and SuperNodes as real processes of this machine, for tests, benchmarks and the curious.

::

    with Deployment(folder, nodes=4) as deployment:
        outcome = deployment.run(app_folder, {"rounds": 3})
        print(outcome.status, outcome.log)

It gives the commands that a user gives on machines of their own: `flower-superlink`, `flwr supernode register`,
`flower-supernode`, `flwr run`. Everything listens on loopback.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from fl_edge.link.certificates import make_certificates
from simulations.certificates import make_node_key
from simulations.launch import SWITCHES
from simulations.processes import DeploymentError, Service, end, find, marked

_BIN = Path(sys.executable).parent
_START_S = 120.0  # on a busy machine, importing Flower takes its time


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the status is `finished:completed`, `finished:failed` or `finished:stopped`."""

    run_id: int
    status: str
    log: str


@dataclass
class Run:
    """A run that was submitted; `stream` is the `flwr run --stream` that follows it."""

    deployment: Deployment
    run_id: int
    stream: Service

    @property
    def log(self) -> str:
        """What the ServerApp has printed until now."""
        return self.stream.text()

    def status(self) -> str:
        """Ask the SuperLink, which takes about a second."""
        listed = self.deployment.flwr("list", "--run-id", str(self.run_id), "--format", "json")
        return str(json.loads(listed)["runs"][0]["status"])

    def wait(self, timeout_s: float = 240.0) -> Outcome:
        """Wait for the end of the run.

        Raises
        ------
        DeploymentError
            The SuperLink has died, or the run has not ended in time.
        """
        seen = ""

        def ended() -> bool:
            # the stream ends with the run, or because the connection broke: the SuperLink has the last word
            nonlocal seen
            seen = seen if self.stream.process.poll() is None else self.status()
            return seen.startswith("finished")

        self.deployment.until(ended, self.stream, timeout_s)
        return Outcome(self.run_id, seen, self.log)


class Deployment:
    """A SuperLink and its SuperNodes; as a context manager, it leaves no process behind.

    Parameters
    ----------
    folder
        Where keys, logs and Flower's own files go; made if it is not there.
    nodes
        How many SuperNodes.
    secure
        TLS, and SuperNodes that are known by their keys; else neither.
    node_configs
        Added to the `partition-id` and `num-partitions` of each SuperNode.
    environment
        Added to the environment of SuperLink (and so of the ServerApp) and SuperNodes (and so of ClientApps).

    Attributes
    ----------
    superlink, supernodes
        The processes; SuperNodes in the order of their `partition-id`.
    environment
        Of every process; with it, Flower's commands find this SuperLink.
    """

    superlink: Service

    def __init__(
        self,
        folder: Path,
        nodes: int = 4,
        *,
        secure: bool = True,
        node_configs: Sequence[Mapping[str, Any]] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder.absolute()
        self.supernodes: list[Service] = []
        own = node_configs or [{}] * nodes
        self._node_configs = [{"partition-id": i, "num-partitions": nodes, **own[i]} for i in range(nodes)]
        self._services: list[Service] = []
        self._secure, self._mark = secure, uuid.uuid4().hex
        self._port, *self._node_ports = free_ports(1 + nodes)
        tls = self.folder / "tls"
        self._authority, self._certificate, self._key = tls / "ca.pem", tls / "server.pem", tls / "server.key"
        path = f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}"  # Flower looks its own commands up there
        own_home = {"PATH": path, "PYTHONUNBUFFERED": "1", "FLWR_HOME": str(self.folder / "flwr")}
        self.environment = {**os.environ, **SWITCHES, **(environment or {}), **own_home, **marked(self._mark)}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self.end)
            for name in ("flwr", "logs", "nodes", "tls"):
                (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            if self._secure:
                make_certificates(self._authority, self._certificate, self._key)
            self._start_superlink()
            indices = range(len(self._node_configs))
            if self._secure:
                with ThreadPoolExecutor() as pool:
                    list(pool.map(self._register, indices))
            self.supernodes = [self._start_supernode(index) for index in indices]
            for service in self.supernodes:
                self._wait_online(service)
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def run(self, app: Path, config: Mapping[str, Any] | None = None, timeout_s: float = 240.0) -> Outcome:
        """Run a Flower App to its end; `config` is its `--run-config`."""
        return self.start(app, config).wait(timeout_s)

    def start(self, app: Path, config: Mapping[str, Any] | None = None) -> Run:
        """Submit a run, and return while it is at work.

        Raises
        ------
        DeploymentError
            A process of the deployment has died, or the SuperLink does not take the run.
        """
        for service in self.supernodes:
            service.check()
        settings = _write_toml(self.folder / "logs" / f"run-{len(self._services)}.toml", config or {})
        stream = self._start(
            "run", "flwr", "run", app.absolute(), "--stream", *(["--run-config", settings] if config else [])
        )
        started = re.compile(r"started run (\d+)")
        self.until(lambda: started.search(stream.text()) is not None, stream, _START_S, alive=True)
        return Run(self, int(started.findall(stream.text())[0]), stream)

    def restart(self, index: int) -> None:
        """End a SuperNode and start it again with the same key; return when it is online.

        When it did not end by itself but was killed, this takes a minute: so long the SuperLink takes it for alive, and
        lets nobody else in with its key.
        """
        self.supernodes[index].end()
        deadline = time.monotonic() + _START_S
        while True:
            self.supernodes[index] = self._start_supernode(index)
            try:
                return self._wait_online(self.supernodes[index])
            except DeploymentError:
                if time.monotonic() > deadline:
                    raise

    def processes(self, command: str = "") -> list[Any]:
        """Return all processes of this deployment (psutil.Process), or those of a command like `flwr-clientapp`.

        One that is killed in its first two seconds was not at work yet: Flower starts another, half a minute later.
        """
        return find(self._mark, command)

    def flwr(self, *arguments: str) -> str:
        """Call Flower's command line, and return what it prints."""
        command = [str(_BIN / "flwr"), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).split())
            raise DeploymentError(f"flwr {' '.join(arguments)} has failed: {said}")
        return done.stdout

    def until(self, done: Callable[[], bool], service: Service, timeout_s: float, *, alive: bool = False) -> None:
        """Wait until something is done; raise when it takes too long, or the SuperLink (or the service) has died."""
        deadline = time.monotonic() + timeout_s
        while not done():
            self.superlink.check()
            if alive:
                service.check()
            if time.monotonic() > deadline:
                raise DeploymentError(f"{service.name} is not done after {timeout_s:g} s; {service.last_lines()}")
            time.sleep(0.05)

    def end(self) -> None:
        """End every process of the deployment."""
        while family := self.processes():  # one may start another while it ends
            end(family)
        for service in self._services:
            service.process.poll()

    def _start(self, name: str, command: str, *arguments: str | Path, **variables: str) -> Service:
        log = self.folder / "logs" / f"{name}-{len(self._services)}.log"
        full = [str(part) for part in (_BIN / command, *arguments)]
        service = Service.start(name, full, log, {**self.environment, **variables})
        self._services.append(service)
        return service

    def _start_superlink(self) -> None:
        """Start the SuperLink, and tell Flower's command line where it is."""
        address = f"127.0.0.1:{self._port}"
        connection: dict[str, Any] = {"address": address, "insecure": True}
        options: list[str | Path] = ["--insecure"]
        link: dict[str, str] = {}
        if self._secure:
            connection = {"address": address, "root-certificates": str(self._authority)}
            options = ["--ssl-ca-certfile", self._authority, "--ssl-certfile", self._certificate]
            options += ["--ssl-keyfile", self._key, "--enable-supernode-auth"]
            # ResidentGrid, which runs in the ServerApp, shows the same certificate
            files = {"CA": self._authority, "CERTIFICATE": self._certificate, "KEY": self._key}
            link = {f"FL_EDGE_LINK_{name}": str(file) for name, file in files.items()}
        settings = {"default": "deployment", **{f"deployment.{key}": value for key, value in connection.items()}}
        _write_toml(self.folder / "flwr/config.toml", {f"superlink.{key}": value for key, value in settings.items()})
        place = ["--host", "127.0.0.1", "--port", str(self._port)]
        self.superlink = self._start("superlink", "flower-superlink", *place, *options, **link)
        self.until(self._healthy, self.superlink, _START_S)

    def _healthy(self) -> bool:
        trust = ssl.create_default_context(cafile=self._authority) if self._secure else True
        address = f"{'https' if self._secure else 'http'}://127.0.0.1:{self._port}/health"
        with suppress(httpx.TransportError):
            return httpx.get(address, verify=trust, timeout=5, trust_env=False).is_success
        return False

    def _register(self, index: int) -> None:
        self.flwr("supernode", "register", str(make_node_key(self.folder / "nodes" / f"{index}.key")))

    def _start_supernode(self, index: int) -> Service:
        nodes = self.folder / "nodes"
        options: list[str | Path] = ["--insecure"]
        if self._secure:
            options = ["--root-certificates", self._authority]
            options += ["--auth-supernode-private-key", nodes / f"{index}.key"]
        config = ["--node-config", _write_toml(nodes / f"{index}.toml", self._node_configs[index])]
        place = ["--superlink", f"127.0.0.1:{self._port}", "--port", str(self._node_ports[index])]
        return self._start(f"supernode-{index}", "flower-supernode", *place, *config, *options)

    def _wait_online(self, service: Service) -> None:
        # a SuperNode prints its id once it is online; to ask `flwr supernode list` takes most of a second each time
        self.until(lambda: "SuperNode ID:" in service.text(), service, _START_S, alive=True)


def _write_toml(file: Path, values: Mapping[str, Any]) -> str:
    """Write plain values, which JSON spells as TOML does, and return the path."""
    file.write_text("".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()))
    return str(file)


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that are free now, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
