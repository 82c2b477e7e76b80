"""The scenario as `flwr run` and the launcher read it, and the mistakes that end before anything starts."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import flatten_dict, parse_config_args

from fl_edge.config import flatten, to_yaml
from fl_edge.errors import ConfigError, RunFolderError, TrainingError
from fl_edge.link import LocalGrid
from fl_edge.mergesfl.config import MergeSFLConfig, released
from fl_edge.runs import RunFolder
from simulations import launch
from simulations.client_app import app
from simulations.mergesfl import run_mergesfl
from simulations.scenario import (
    CompScenario,
    FedSpineScenario,
    HatScenario,
    ImbNasScenario,
    MergeSFLScenario,
    read_scenario,
)
from tests.scenarios import mergesfl_scenario

ROOT = Path(__file__).parent.parent


def flower_defaults() -> dict[str, Any]:
    """What Flower hands to the app when nothing is overridden: the table of pyproject.toml, flattened."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return dict(flatten_dict(table))


def test_flower_accepts_every_key_of_the_scenario_and_no_other() -> None:
    defaults = flower_defaults()
    scenarios = (MergeSFLScenario, FedSpineScenario, CompScenario, HatScenario, ImbNasScenario)
    assert defaults.keys() == {key for scenario in scenarios for key in flatten(scenario)}
    assert set(defaults.values()) == {""}


def test_empty_text_means_as_the_scenario_has_it() -> None:
    assert read_scenario(flower_defaults()) == read_scenario({})
    scenario = mergesfl_scenario(flower_defaults() | {"rounds": 3, "mergesfl.tau": "4"})
    assert (scenario.rounds, scenario.mergesfl.tau) == (3, 4)
    assert scenario.mergesfl.batch_size == 32  # of the YAML; the dataclass has 64


def test_an_unknown_scenario_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^simulation=nothing is not there; it must be one of mergesfl"):
        read_scenario({"simulation": "nothing"})


def test_an_unknown_key_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^unknown key tau in the overrides; did you mean mergesfl\.tau\?$"):
        read_scenario({"tau": 3})


def test_the_released_variant_has_the_settings_of_the_released_code() -> None:
    paper, variant = mergesfl_scenario({}), mergesfl_scenario({"variant": "released"})
    assert variant == replace(paper, variant="released", mergesfl=released(paper.mergesfl))
    changed = {key for key, value in asdict(variant.mergesfl).items() if value != asdict(paper.mergesfl)[key]}
    assert changed == {"selection", "batches", "aggregation", "scale", "tuning", "fill", "min_workers"}
    assert released(MergeSFLConfig(tau=7)).tau == 7


def test_more_workers_than_devices_are_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"mergesfl\.min_workers=14 asks for more than the 3 devices"):
        read_scenario({"devices": 3})


# ---------------------------------------------------------------------------------------------------------- resume


def run_folder(path: Path, **overrides: Any) -> Path:
    """Make the folder of a run as the server does, and return it."""
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return RunFolder.create(path / "run", to_yaml(read_scenario(given))).path


def test_a_resumed_run_has_the_configuration_of_its_folder(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, seed=9, mergesfl__tau=3, mergesfl__batch_size=16, name="mine")
    before = read_scenario({"seed": 9, "mergesfl.tau": 3, "mergesfl.batch_size": 16, "name": "mine"})
    after = read_scenario(flower_defaults() | {"resume": str(folder)})
    assert after == replace(before, resume=str(folder))
    same = read_scenario({"resume": str(folder), "seed": 9, "mergesfl.tau": 3})  # said again, it is no change
    assert same == after


def test_a_resumed_run_of_the_released_variant_stays_what_it_was(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, variant="released")
    resumed = read_scenario({"resume": str(folder)})
    assert resumed == replace(read_scenario({"variant": "released"}), resume=str(folder))


def test_rounds_and_patience_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, rounds=5)
    scenario = read_scenario({"resume": str(folder), "rounds": 50, "patience_s": 1, "exchange_timeout_s": 2})
    assert (scenario.rounds, scenario.patience_s, scenario.exchange_timeout_s) == (50, 1.0, 2.0)


@pytest.mark.parametrize(("key", "value"), [("seed", 1), ("mergesfl.tau", 11), ("data.alpha", 0.5), ("name", "other")])
def test_what_changes_the_result_cannot_change_when_a_run_is_resumed(tmp_path: Path, key: str, value: Any) -> None:
    folder = run_folder(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_scenario({"resume": str(folder), key: value, "rounds": 50})
    assert str(caught.value).startswith(f"{key}={value} cannot change when a run is resumed, it was ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_is_no_run_folder_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"is not a run folder: it holds no config\.yaml$"):
        read_scenario({"resume": str(tmp_path)})
    folder = run_folder(tmp_path)
    (folder / "config.yaml").write_text("rounds: [\n")
    with pytest.raises(ConfigError, match=r"config\.yaml is not YAML \(line 2\)"):
        read_scenario({"resume": str(folder)})


def test_a_device_that_cannot_see_the_run_folder_goes_by_the_run_configuration(tmp_path: Path) -> None:
    gone = str(tmp_path / "on another machine")
    config = {"resume": gone, "seed": 9, "mergesfl.tau": 3}
    assert read_scenario(config, on_device=True) == read_scenario({"seed": 9, "mergesfl.tau": 3})
    with pytest.raises(RunFolderError):
        read_scenario(config)
    folder = str(run_folder(tmp_path, seed=9))
    assert read_scenario({"resume": folder}, on_device=True).seed == 9


# -------------------------------------------------------------------------------------------------------- launcher


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the launcher starts a process."""

    def started(*command: Any, **_: Any) -> None:
        raise AssertionError(f"{command} was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(subprocess, "run", started)


def test_overrides_stay_text_until_the_field_says_what_they_are() -> None:
    given = ["rounds=5", "mergesfl.learning_rate=0.5", "mergesfl.fill=false", "name=a=b", "resume=", " seed =7"]
    assert launch.parse(given) == {
        "rounds": "5",
        "mergesfl.learning_rate": "0.5",
        "mergesfl.fill": "false",
        "name": "a=b",
        "resume": "",
        "seed": "7",
    }
    scenario = mergesfl_scenario(launch.parse(given))
    assert (scenario.rounds, scenario.mergesfl.learning_rate, scenario.mergesfl.fill) == (5, 0.5, False)


@pytest.mark.parametrize("name", ["007", "1:30", "[a", "@x", "*a", "on", "1e3"])
def test_a_name_is_passed_on_as_it_was_written(name: str) -> None:
    values = launch.parse([f"name={name}"])
    assert read_scenario(values).name == name
    passed = parse_config_args([f"name={launch._toml(values['name'])}"])  # as Flower reads its --run-config
    assert str(passed["name"]) == name


def test_released_contradicted_by_a_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mergesfl\.selection=greedy contradicts variant=released, which has random"):
        read_scenario({"variant": "released", "mergesfl.selection": "greedy"})


def test_a_port_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for port in ("abc", "99999", "0"):
        monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", port)
        with pytest.raises(ConfigError, match=f"HTTP_API_PORT={port} is not a port"):
            launch.run([])


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("rounds", "rounds is not an override; it must be key=value, for example rounds=5"),
        ("=5", "=5 is not an override"),
        ("--help", "--help is not an override"),
        ("runds=5", "unknown key runds in the overrides; did you mean rounds, runs?"),
        ("rounds=0", "rounds=0 is not allowed; it must be an integer, at least 1"),
        ("rounds=many", "rounds=many in the overrides is not allowed"),
        ("mergesfl.tuning=null", "mergesfl.tuning=null is not allowed; it must be one of greedy"),
        ("devices=2", "configuration: mergesfl.min_workers=14 asks for more than the 2 devices"),
        ("simulation=other", "simulation=other is not there"),
    ],
)
@pytest.mark.usefixtures("nothing_starts")
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, line: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulations", argument])
    assert launch.main() == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {line}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.usefixtures("nothing_starts")
def test_a_run_folder_to_resume_that_is_not_there_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulations", f"resume={tmp_path / 'none'}"])
    assert launch.main() == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'} is not a run folder: it holds no config.yaml\n"


@pytest.fixture
def foreign_port() -> Iterator[int]:
    """A port on which something answers that does not speak HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        ended = threading.Event()

        def answer() -> None:
            while not ended.is_set():
                try:
                    caller, _ = server.accept()
                except TimeoutError:
                    continue
                with caller:
                    caller.sendall(b"220 not a SuperLink\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield server.getsockname()[1]
        ended.set()
        thread.join()


@pytest.mark.usefixtures("nothing_starts")
def test_a_port_held_by_something_else_is_one_line_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, foreign_port: int
) -> None:
    def stop(port: int) -> None:
        raise AssertionError("what listens there is not ours")

    monkeypatch.setattr(launch, "stop_superlink", stop)
    monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", str(foreign_port))
    with pytest.raises(ConfigError, match=f"^port {foreign_port} is in use by something that is not a SuperLink"):
        launch.run([])


def test_a_run_that_fails_before_its_first_round_leaves_nothing_behind(tmp_path: Path) -> None:
    config = {"runs": str(tmp_path / "runs"), "devices": 200, "mergesfl.min_workers": 5, "rounds": 2}
    with pytest.raises(TrainingError, match=r"no device can take part: device \d+ of 200 would hold 0 of 1437 samples"):
        run_mergesfl(LocalGrid(app, 200, run_config=config), mergesfl_scenario(config))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_folder_stays_below_the_folder_of_the_runs(tmp_path: Path) -> None:
    for name in ("../outside", str(tmp_path / "elsewhere"), ".."):
        with pytest.raises(ConfigError, match="must be the name of one folder below"):
            run_mergesfl(None, mergesfl_scenario({"runs": str(tmp_path / "runs"), "name": name}))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
