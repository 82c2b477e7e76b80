"""The package as a whole: what importing costs, who may import whom, what stands where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import fl_edge

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fl_edge"
SYSTEMS = {"fedspine", "mergesfl", "hat", "comp", "imbnas"}
BELOW = {"pruning", "edge", "models", "data"}  # the rooms that every system shares
FLOWER = {"strategies", "clients", "link"}  # the rooms of fl_edge that know Flower
PUBLIC_FLOWER = ("flwr.app", "flwr.serverapp", "flwr.clientapp")

# Room of fl_edge -> rooms that its modules may import beside their own and the package's root ("").
MAY_IMPORT: dict[str, set[str]] = {
    "": set(),
    **dict.fromkeys(BELOW, BELOW),
    **dict.fromkeys(SYSTEMS, BELOW),
    "link": set(),
    "strategies": SYSTEMS | BELOW | {"link"},
    "clients": SYSTEMS | BELOW | {"link"},
}
# One command line for both ends of a system: it loads the server's end only to serve.
BOTH_ENDS = {"fl_edge/clients/hat/__main__.py": {"strategies"}}

SHIPPED = sorted(file for folder in ("fl_edge", "simulations", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
MODULES = [file for file in SHIPPED if file.is_relative_to(PACKAGE)]


def named(file: Path) -> str:
    return str(file.relative_to(ROOT))


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0] if file.parent != PACKAGE else ""


def imports(file: Path) -> Iterator[str]:
    """Every name that a module imports, also inside functions, as `package.module.name`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(file)} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def committed() -> list[Path]:
    """The files that git knows; the test is skipped where there is no git."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, fl_edge; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, cwd=ROOT).stdout
    assert "fl_edge" in loaded.split()
    assert not {"torch", "numpy", "flwr", "omegaconf", "matplotlib"} & set(loaded.split())


@pytest.mark.parametrize("file", MODULES, ids=named)
def test_a_room_imports_only_the_rooms_below_it(file: Path) -> None:
    """No system imports another; what is shared knows no system; algorithms know neither strategies nor clients."""
    own = room(file)
    assert own in MAY_IMPORT, f"fl_edge/{own} is not in the design"
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    for name in imports(file):
        package, _, rest = name.partition(".")
        assert package not in ("simulations", "benchmarks", "tests", "strategies", "clients")
        if package == "fl_edge" and (target := rest.partition(".")[0]) in rooms - {own}:
            assert target in MAY_IMPORT[own] | BOTH_ENDS.get(named(file), set()), (
                f"fl_edge/{own} must not import {name}"
            )


@pytest.mark.parametrize("file", [file for file in SHIPPED if "benchmarks" not in file.parts], ids=named)
def test_only_the_rooms_of_flower_import_flower_and_only_its_public_parts(file: Path) -> None:
    found = [name for name in imports(file) if name == "flwr" or name.startswith("flwr.")]
    if file.is_relative_to(PACKAGE) and room(file) not in FLOWER:
        assert found == []
    if named(file) == "fl_edge/link/flower.py":
        # the one exception: Flower has no public way to make a message of one's own say which task it belongs to
        found.remove("flwr.supercore.task_identity.TaskIdentity")
    assert [name for name in found if not name.startswith(PUBLIC_FLOWER)] == []


@pytest.mark.parametrize("file", SHIPPED, ids=named)
def test_nothing_is_unpickled(file: Path) -> None:
    unsafe = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert not unsafe & {name.partition(".")[0] for name in imports(file)}
    assert not {"torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load"} & set(imports(file))
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load"}
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"


@pytest.mark.parametrize("file", SHIPPED, ids=named)
def test_a_module_can_be_read_in_one_sitting(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 400


def test_the_top_level_is_that_of_the_design() -> None:
    assert {file.relative_to(ROOT).parts[0] for file in committed()} <= {
        *("README.md", "LICENSE", "Makefile", "pyproject.toml", ".gitignore", ".ci"),
        *("fl_edge", "strategies", "clients", "simulations", "benchmarks", "tests"),
    }


@pytest.mark.parametrize("name", ["strategies", "clients"])
def test_the_two_folders_people_come_for_stand_at_the_top(name: str) -> None:
    assert (ROOT / name).is_symlink()
    assert (ROOT / name).readlink() == Path("fl_edge") / name


def test_no_committed_file_knows_the_machine_it_was_written_on() -> None:
    # a path below somebody's home or work folder, or the address of a package index
    foreign = re.compile(
        r"(?<![\w.$}])/(?:home|root|work|Users)/\w|py[p]i\.org|python[h]osted\.org|[i]ndex-url|download\.py[t]orch\.org"
    )
    found = []
    for file in committed():
        if file.name == "LICENSE" or file.is_symlink() or b"\0" in (content := file.read_bytes()):
            continue
        text = content.decode()
        found += [f"{named(file)}: {match.group()}" for match in foreign.finditer(text)]
    assert found == []


def test_the_package_and_its_metadata_have_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["version"] == fl_edge.__version__
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["fl_edge"]
