"""Runs a scenario through the real `flwr run`, and tells the truth about how it ended.

`flwr run` returns 0 for a run that failed, and leaves a local SuperLink behind. This launcher checks the configuration
before anything starts, follows the run, reads its status, and stops the SuperLink if it was started for this run.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from fl_edge.errors import ConfigError, FlEdgeError
from simulations.scenario import Scenario, read_scenario

APP = Path(__file__).parent.parent
SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # run on the environment that is installed, instead of building one for every run
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_ENDED = "finished:completed"


def run(overrides: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run the scenario with overrides like `rounds=5` and return 0 if it was completed, else 1.

    Raises
    ------
    ConfigError
        An override that is not key=value, an unknown key, or a value out of range.
    """
    values = parse(overrides)
    if not values.get("runs") and not values.get("resume"):
        values["runs"] = str(APP / "runs")
    for key in ("runs", "resume"):  # the SuperLink's working directory is not ours
        if values.get(key):
            values[key] = str(Path(values[key]).expanduser().absolute())
    scenario = read_scenario(values)
    env = {**os.environ, **SWITCHES, **(environment or {})}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"  # flower-superlink is looked up
    port = _port(env)
    ours = not _superlink_there(port)
    if not ours:
        print(f"a SuperLink is there already on port {port}: it runs this in its own environment, and is left alone")
    try:
        return 0 if _flwr_run(values, scenario, env) == _ENDED else 1
    finally:
        if ours:
            stop_superlink(port)


def parse(overrides: Sequence[str]) -> dict[str, str]:
    """Turn `key=value` texts into a mapping; values stay text, which the configuration reads by the field's type."""
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{override} is not an override; it must be key=value, for example rounds=5")
        if '"' in text or not text.isprintable():
            raise ConfigError(
                f"{key}={text!r} cannot be passed on; a value must be printable and without double quotes"
            )
        values[key.strip()] = text.strip()
    return values


def stop_superlink(port: int, patience_s: float = 10.0) -> None:
    """End the local SuperLink that listens on a port, and all that it started, and wait until they are gone."""
    family = superlink_family(port)
    for process in family[:1]:  # the others end with it
        process.terminate()
    _, alive = psutil.wait_procs(family, timeout=patience_s)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=patience_s)


def superlink_family(port: int) -> list[psutil.Process]:
    """Return the process that listens on a local port, then all that it started."""
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            listener = psutil.Process(connection.pid)
            return [listener, *listener.children(recursive=True)]
    return []


def _flwr_run(values: Mapping[str, str], scenario: Scenario, env: Mapping[str, str]) -> str:
    """Submit the run, show its output, and return its final status."""
    config = " ".join(f"{key}={_toml(value)}" for key, value in values.items())
    federation = f"num-supernodes={scenario.devices} client-resources-num-cpus=1"
    flwr = str(Path(sys.executable).with_name("flwr"))
    command = [flwr, "run", str(APP), "--stream", "--federation-config", federation, "--run-config", config]
    print("$ " + " ".join(f"'{part}'" if " " in part else part for part in ["flwr", *command[1:]]), flush=True)
    run_id, folder, status = "", Path(), "not started"
    try:
        with subprocess.Popen(
            command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                print(line, end="", flush=True)
                if found := re.search(r"started run (\d+)", line):
                    run_id = found.group(1)
                if found := re.match(r"run folder (.+?)(, resumed after round \d+)?$", line):
                    folder = Path(found.group(1))
        status = _status(flwr, run_id, env) if run_id else status
    finally:
        if status != _ENDED and (folder / "checkpoints").is_dir():
            print(f'to go on where it stopped: make run ARGS="resume={folder}"', flush=True)
    return status


def _status(flwr: str, run_id: str, env: Mapping[str, str]) -> str:
    """Return the run's status, once it has ended."""
    deadline = time.monotonic() + 60  # the log stream ends a little before the status changes
    status = "unknown"
    while time.monotonic() < deadline:
        listed = subprocess.run(
            [flwr, "list", "--run-id", run_id, "--format", "json"],
            env=dict(env),
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            status = str(json.loads(listed.stdout)["runs"][0]["status"])
        except (ValueError, KeyError, IndexError):
            status = "unknown"
        if status.startswith("finished"):
            break
        time.sleep(0.5)
    print(f"run {run_id}: {status}", flush=True)
    return status


def _toml(text: str) -> str:
    """Write a value for `--run-config`: numbers and truth values as they are, all else in quotes."""
    return text if re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?|true|false", text) else f'"{text}"'


def _port(env: Mapping[str, str]) -> int:
    text = env.get("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "39091")
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ConfigError(f"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT={text} is not a port; it must be from 1 to 65535")
    return int(text)


def _superlink_there(port: int) -> bool:
    """Return whether a SuperLink answers; raise when something else holds the port."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success
    except httpx.HTTPError:
        pass
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ConfigError(
                f"port {port} is in use by something that is not a SuperLink; set FLWR_LOCAL_SUPERLINK_HTTP_API_PORT "
                "to a free port"
            )
    return False


def main() -> int:
    """Run from the command line; print a mistake in one line."""
    try:
        return run(sys.argv[1:])
    except FlEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
