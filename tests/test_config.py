"""Configuration: precedence, and one clear line for everything that cannot be run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fl_edge.config import check, flatten, resolve, setting, to_yaml
from fl_edge.errors import ConfigError
from simulations.scenario import MergeSFLScenario, scenario_class

SIMULATIONS = Path(__file__).parent.parent / "simulations"


@dataclass
class Inner:
    rate: float = setting(0.5, "a rate", low=0.0, high=1.0)
    mode: str = setting("slow", "a mode", choices=("slow", "fast"))
    on: bool = setting(True, "a switch")


@dataclass
class Outer:
    count: int = setting(3, "a count", low=1)
    most: int = setting(9, "an upper limit of count")
    name: str = setting("", "a name")
    inner: Inner = field(default_factory=Inner)

    def contradictions(self) -> str | None:
        return f"count={self.count} is above most={self.most}" if self.count > self.most else None


def refusal(source: Any, overrides: dict[Any, Any]) -> str:
    """Resolve, expect a refusal, and return its one line."""
    with pytest.raises(ConfigError) as caught:
        resolve(Outer, source, overrides)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


def yaml(folder: Path, text: str) -> Path:
    file = folder / "given.yaml"
    file.write_text(text)
    return file


def test_overrides_go_before_yaml_and_yaml_before_defaults(tmp_path: Path) -> None:
    source = yaml(tmp_path, "count: 4\ninner:\n  rate: 0.25\n  mode: fast\n")
    config = resolve(Outer, source, {"count": 5, "inner.rate": 0.75})
    assert config == Outer(5, 9, "", Inner(0.75, "fast", True))


def test_text_is_read_as_yaml_reads_it_and_text_stays_text() -> None:
    config = resolve(Outer, None, {"count": "7", "inner.rate": "1e-1", "inner.on": "false", "name": "007"})
    assert config == Outer(7, 9, "007", Inner(0.1, "slow", False))
    assert resolve(Outer, {"count": 4.0, "name": 12}, {}) == Outer(4, 9, "12")


def test_an_empty_file_and_an_empty_section_change_nothing(tmp_path: Path) -> None:
    assert resolve(Outer, yaml(tmp_path, "# nothing yet\n"), {}) == Outer()
    assert resolve(Outer, yaml(tmp_path, "count: 2\ninner:\n  # rate: 1\n"), {}) == Outer(2)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("cuont", "did you mean count?"),
        ("inner.rte", "did you mean inner.rate"),
        ("rate", "did you mean inner.rate?"),  # the right name in the wrong section
        ("zzzz", "there are count, inner.*, most, name"),  # nothing is near: say what there is, not all keys of all
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_what_is_near(tmp_path: Path, key: str, near: str) -> None:
    assert refusal(None, {key: 1}).startswith(f"unknown key {key} in the overrides; {near}")
    section, _, last = key.rpartition(".")
    text = f"{section}:\n  {last}: 1\n" if section else f"{last}: 1\n"
    assert refusal(yaml(tmp_path, text), {}).startswith(f"unknown key {key} in given.yaml; {near}")


def test_a_misspelt_section_is_named_with_its_key() -> None:
    assert refusal({"iner": {"rate": 1}}, {}) == "unknown key iner.rate in the configuration; did you mean inner.rate?"


@pytest.mark.parametrize("source", [{"unknown": {}}, {"inner": 5}, {"inner": []}, {3: 4}, {"inner": {3: 4}}])
def test_what_is_no_section_is_not_skipped(source: dict[Any, Any]) -> None:
    assert "unknown key" in refusal(source, {})


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("count", "many", "an integer, at least 1"),
        ("count", 2.5, "an integer, at least 1"),
        ("count", "2.5", "an integer, at least 1"),
        ("count", True, "an integer, at least 1"),
        ("count", math.nan, "an integer, at least 1"),
        ("count", math.inf, "an integer, at least 1"),
        ("count", None, "an integer, at least 1"),
        ("count", [1], "an integer, at least 1"),
        ("count", {}, "an integer, at least 1"),
        ("count", {"a": 1}, "an integer, at least 1"),
        ("count", 0, "an integer, at least 1"),
        ("most", 10**400, "an integer"),
        ("inner.rate", 1.5, "a number, at least 0.0 and at most 1.0"),
        ("inner.rate", math.nan, "a number, at least 0.0 and at most 1.0"),
        ("inner.rate", -math.inf, "a number, at least 0.0 and at most 1.0"),
        ("inner.rate", 10**400, "a number, at least 0.0 and at most 1.0"),
        ("inner.rate", False, "a number, at least 0.0 and at most 1.0"),
        ("inner.mode", "quick", "one of slow, fast"),
        ("inner.mode", "Slow", "one of slow, fast"),
        ("inner.on", 1, "true or false"),
        ("inner.on", "2", "true or false"),
        ("inner.on", "maybe", "true or false"),
        ("name", ["a"], "text"),
        ("name", True, "text"),  # what YAML makes of name=on
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    section, _, last = key.rpartition(".")
    for source, overrides in ((None, {key: value}), ({section: {last: value}} if section else {last: value}, {})):
        line = refusal(source, overrides)
        assert line.startswith(f"{key}=")
        assert line.endswith(f"is not allowed; it must be {allowed}")


def test_infinity_is_refused_where_there_is_no_upper_limit() -> None:
    with pytest.raises(ConfigError, match=r"^patience_s=inf is not allowed"):
        resolve(MergeSFLScenario, None, {"patience_s": math.inf})


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert refusal({"most": 2}, {}) == "configuration: count=3 is above most=2"
    with pytest.raises(ConfigError, match=r"^mergesfl: max_workers=2 is below min_workers=3$"):
        resolve(MergeSFLScenario, None, {"mergesfl.max_workers": 2, "mergesfl.min_workers": 3})


def test_a_dataclass_filled_by_hand_is_checked_as_well() -> None:
    with pytest.raises(ConfigError, match=r"^inner\.rate=2 is not allowed"):
        check(Outer(inner=Inner(rate=2)))
    text: Any = "5"
    with pytest.raises(ConfigError, match=r"^count=5 is not allowed; it must be an integer"):
        check(Outer(count=text))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- 1\n", "must hold keys and values"),
        ("5\n", "must hold keys and values"),
        ("count: 1\ncount: 2\n", "is not YAML (line 2): found duplicate key count"),
        ("count: [\n", "is not YAML (line 2)"),
        ("a: &x [*x]\n", "is not YAML (line 1)"),
        ("--- 1\n--- 2\n", "is not YAML"),
        ("count: \x00", "is not YAML"),
        ("count: !!python/object/apply:os.getpid []", "is not YAML (line 1): could not determine a constructor"),
        ("name: ${nobody}\n", "name has no value"),
        ("name: ???\n", "name has no value"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, why: str) -> None:
    assert why in refusal(yaml(tmp_path, text), {})


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml", {}).endswith("none.yaml: No such file or directory")
    assert refusal(tmp_path, {}).endswith("Is a directory")
    assert refusal(Path("two\nlines.yaml"), {}).startswith("cannot read the configuration two lines.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bytes.yaml is not YAML" in refusal(tmp_path / "bytes.yaml", {})


def test_a_long_or_ragged_value_does_not_spill_over_the_line() -> None:
    line = refusal(None, {"count": "first\nsecond " + "x" * 9999})
    assert line.startswith("count=first second x")
    assert len(line) < 400


@given(
    st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "${" not in text and text != "???"),
    st.integers(1, 2**62),
    st.floats(0, 1),
    st.booleans(),
)
@example("1e5", 1, 1e-300, False)
@example("null", 1, 5e-324, True)
@example("on", 1, 0.1, True)
@example("2020-01-01", 1, 0.1, True)
def test_to_yaml_reads_back_as_the_same_configuration(name: str, count: int, rate: float, on: bool) -> None:
    config = Outer(count, 2**62, name, Inner(rate, "fast", on))
    loaded = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    assert isinstance(loaded, dict)
    assert loaded == asdict(config)
    assert resolve(Outer, {str(key): value for key, value in loaded.items()}, {}) == config


ATOMS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
    | st.sampled_from(["${count}", "${", "???", "${inner}", "${oc.env:NO}", 10**400, "true", "0x10", "fast", "\x85"])
)  # fmt: skip
KEYS = st.sampled_from([*flatten(Outer), "inner", "rate", "count.x", "."]) | st.text(max_size=5) | st.integers()
GARBAGE = st.dictionaries(
    KEYS, st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2))
)


@given(GARBAGE, GARBAGE)
def test_any_mapping_is_a_configuration_or_one_line(source: dict[Any, Any], overrides: dict[Any, Any]) -> None:
    try:
        config = resolve(Outer, source, overrides)
    except ConfigError as error:
        lines = str(error).splitlines()
        assert len(lines) == 1
        return
    assert type(config.count) is int
    assert 1 <= config.count <= config.most
    assert type(config.inner.rate) is float
    assert 0 <= config.inner.rate <= 1
    assert type(config.inner.on) is bool
    assert config.inner.mode in ("slow", "fast")
    assert type(config.name) is str


@pytest.mark.parametrize("file", sorted(SIMULATIONS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_scenario_resolves(file: Path) -> None:
    assert resolve(scenario_class(file.stem), file, {}).simulation == file.stem


def test_there_are_shipped_scenarios() -> None:
    assert list(SIMULATIONS.rglob("*.yaml"))
