from __future__ import annotations

import io
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.__main__ import catalogue, main
from benchmarks.harness import Benchmark, Case, Column, Results, Target
from benchmarks.harness_report import interval, quartiles, tables
from benchmarks.harness_run import run_benchmark


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the garbage of all other tests where it is: collecting it before each measurement takes seconds here."""
    monkeypatch.setattr("benchmarks.harness_run.gc.collect", lambda: 0)


class Fake:
    """A benchmark whose measurements are counted, and may be interrupted."""

    def __init__(self, interrupt_at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.calls: list[tuple[str, int]] = []
        self.prepared = 0
        self.interrupt_at, self.error = interrupt_at, error

    def measure(self, case: str, seed: int, quick: bool) -> Mapping[str, Any]:
        if len(self.calls) == self.interrupt_at:
            raise self.error
        self.calls.append((case, seed))
        return {"seconds": len(self.calls) + (case == "loop"), "virtual": 2.0 * seed, "accuracy": 0.9 + 0.01 * seed}

    def prepare(self, seeds: Sequence[int], quick: bool) -> None:
        self.prepared += 1

    def benchmark(self, **changes: Any) -> Benchmark:
        parts: dict[str, Any] = {
            "cases": (Case("ours", 3, 1), Case("loop", 2, 1), Case("peer", 2, 1, needs=("no_such_peer",))),
            "columns": {
                "seconds": Column("rounds", "real_s", 1),
                "virtual": Column("rounds", "virtual_s"),
                "accuracy": Column("accuracy"),
            },
            "measure": self.measure,
            "targets": targets,
            "figure": figure,
            "prepare": self.prepare,
            "seeds": (1, 2),
            "settings": {"rounds": 20},
            "packages": ("rich", "no-such-peer"),
        }
        return Benchmark(**(parts | changes))


def targets(results: Results) -> list[Target]:
    return [
        Target.at_most("ours / loop", results.ratio("ours", "loop", "seconds"), 9.0),
        Target.at_least("accuracy", results.center("ours", "accuracy"), 0.99),
        Target.at_most("ours / peer", results.ratio("ours", "peer", "seconds"), 1.0),
    ]


def figure(results: Results, path: Path) -> None:
    assert len(results.values("ours", "seconds")) > 0
    path.write_bytes(b"\x89PNG")


def run(fake: Fake, folder: Path, **options: Any) -> tuple[int, str]:
    changes = options.pop("changes", {})
    console = Console(file=io.StringIO(), width=160)
    status = run_benchmark(fake.benchmark(**changes), "fake", folder, console=console, **options)
    return status, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_interleaves_and_writes_json_and_png(tmp_path: Path) -> None:
    fake = Fake()
    status, text = run(fake, tmp_path)
    assert status == 0
    one_seed = ["ours", "loop", "ours", "loop", "ours"]
    assert fake.calls == [(case, seed) for seed in (1, 2) for case in one_seed]
    assert fake.prepared == 1
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["fake.json", "fake.png"]
    assert (tmp_path / "fake.png").read_bytes().startswith(b"\x89PNG")
    assert "[10/10] ours, seed 2, repetition 3" in text


def test_the_json_says_what_was_run_where_and_what_came_out(tmp_path: Path) -> None:
    run(Fake(), tmp_path)
    text = (tmp_path / "fake.json").read_text()
    document = json.loads(text)
    assert set(document) == {
        "benchmark",
        "quick",
        "command",
        "started",
        "ended",
        "sittings",
        "commit",
        "machine",
        "versions",
        "seeds",
        "settings",
        "targets",
        "missing",
        "columns",
        "summary",
        "raw",
    }
    assert document["command"] == "python -m benchmarks fake --seeds 1 2"
    assert document["seeds"] == [1, 2]
    assert set(document["machine"]) == {"cpu", "cores", "memory_gib", "os", "python", "load_average_at_end"}
    assert set(document["commit"]) == {"id", "dirty"}
    assert document["versions"]["rich"]
    assert document["versions"]["no-such-peer"] is None
    assert document["settings"] == {"rounds": 20}
    assert document["columns"] == {
        "seconds": "rounds (real s)",
        "virtual": "rounds (virtual s)",
        "accuracy": "accuracy",
    }
    assert len(document["raw"]) == 10
    assert document["raw"][0] == {
        "case": "ours",
        "seed": 1,
        "repetition": 0,
        "values": {"seconds": 1, "virtual": 2.0, "accuracy": 0.91},
    }
    assert document["summary"]["ours"]["seconds"] == {"median": 5.5, "q1": 3.5, "q3": 7.5, "n": 6}
    accuracy = document["summary"]["ours"]["accuracy"]
    assert (accuracy["mean"], accuracy["n"]) == (pytest.approx(0.915), 2)
    assert accuracy["high"] - accuracy["mean"] == pytest.approx(12.706 * 0.01 / 2, rel=1e-3)
    assert [target["holds"] for target in document["targets"]] == [True, False, False]
    assert document["targets"][0] == {
        "measure": "ours / loop",
        "value": pytest.approx(5.5 / 6.5),
        "target": "at most 9",
        "holds": True,
    }
    assert document["targets"][2]["value"] is None
    for private in (socket.gethostname(), str(Path.cwd()), str(tmp_path), str(Path.home())):
        assert f'"{private}' not in text
        assert f"{private}/" not in text


def test_a_missing_peer_is_named_with_its_command(tmp_path: Path) -> None:
    status, text = run(Fake(), tmp_path)
    document = json.loads((tmp_path / "fake.json").read_text())
    install = 'pip install ".[bench]"'
    assert status == 0
    assert document["missing"] == [{"case": "peer", "needs": ["no_such_peer"], "install": install}]
    rows = [line for line in text.splitlines() if "peer" in line]
    assert "not installed" in rows[0]
    assert rows[1] == f"peer: not installed (no_such_peer); {install}"
    assert "ours / peer: not measured, target at most 1: DOES NOT HOLD" in text


def test_the_table_names_spread_and_kind_of_time(tmp_path: Path) -> None:
    _, text = run(Fake(), tmp_path)
    assert "rounds (real s)" in text
    assert "rounds (virtual s)" in text
    assert "5.5 [3.5, 7.5]" in text
    assert "median [quartiles]" in text
    assert "0.915 ± 0.064" in text
    assert "accuracy: 0.915, target at least 0.99: DOES NOT HOLD" in text


def test_cases_of_other_columns_are_in_another_table() -> None:
    columns = {"a": "xy", "b": "x", "c": "z", "d": "zx", "e": "y"}
    summary: dict[str, dict[str, dict[str, Any]]] = {case: {key: {} for key in columns[case]} for case in columns}
    raw = [{"case": case, "seed": 0, "repetition": 0, "values": {}} for case in summary]
    found = tables(["a", "absent", "b", "not asked", "c", "d", "e"], Results(raw, summary, {"absent": ["peer"]}))
    assert found == [(["a", "absent", "b"], {"x", "y"}), (["c", "d"], {"x", "z"}), (["e"], {"y"})]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Fake(interrupt_at=4), tmp_path)
    (partial,) = (tmp_path / "partial").iterdir()
    partial.write_bytes(partial.read_bytes() + b'{"case": "ours", "se')  # torn by a crash
    assert not (tmp_path / "fake.json").exists()
    second = Fake()
    _, text = run(second, tmp_path)
    assert second.calls == [("ours", 1), *[(case, 2) for case in ["ours", "loop", "ours", "loop", "ours"]]]
    assert "going on after 4 measurements" in text
    document = json.loads((tmp_path / "fake.json").read_text())
    assert len(document["raw"]) == 10
    assert document["sittings"] == 2
    assert list((tmp_path / "partial").iterdir()) == []
    third = Fake()
    run(third, tmp_path)
    assert len(third.calls) == 10


@pytest.mark.parametrize("change", ["settings", "seeds", "code"])
def test_a_changed_run_starts_anew_and_says_so(tmp_path: Path, change: str) -> None:
    source = tmp_path / "code.py"
    source.write_text("a = 1")
    with pytest.raises(KeyboardInterrupt):
        run(Fake(interrupt_at=4), tmp_path, sources=[source])
    options: dict[str, Any] = {"sources": [source]}
    if change == "settings":
        options["changes"] = {"settings": {"rounds": 21}}
    elif change == "seeds":
        options["seeds"] = [1, 3]
    else:
        source.write_text("a = 2")
    second = Fake()
    _, text = run(second, tmp_path, **options)
    assert len(second.calls) == 10
    assert "not resumed: 1 unfinished run(s) of fake with other settings or code" in text
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_failed_measurement_ends_with_one_and_keeps_the_rest(tmp_path: Path) -> None:
    status, text = run(Fake(interrupt_at=4, error=ZeroDivisionError), tmp_path)
    assert status == 1
    assert "failed: ZeroDivisionError" in text
    assert not (tmp_path / "fake.json").exists()
    second = Fake()
    assert run(second, tmp_path)[0] == 0
    assert len(second.calls) == 6


def test_nothing_is_written_when_the_picture_fails(tmp_path: Path) -> None:
    def broken(results: Results, path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"):
        run(Fake(), tmp_path, changes={"figure": broken})
    assert [path.name for path in tmp_path.iterdir()] == ["partial"]


def test_quick_has_its_own_files_and_repetitions(tmp_path: Path) -> None:
    fake = Fake()
    run(fake, tmp_path, quick=True, seeds=[5, 5])
    assert fake.calls == [("ours", 5), ("loop", 5)]
    assert (tmp_path / "fake.quick.png").exists()
    document = json.loads((tmp_path / "fake.quick.json").read_text())
    assert (document["quick"], document["command"]) == (True, "python -m benchmarks fake --quick --seeds 5")
    assert document["summary"]["ours"]["accuracy"]["low"] is None


def test_an_unknown_name_is_one_line_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("no benchmark 'no-such': there are ")
    assert captured.err.count("\n") == 1
    assert all(name in captured.err for name in catalogue())


def test_the_list_has_one_line_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(catalogue())
    (tmp_path / "one.py").write_text('"""First line.\n\nMore."""\nBENCHMARK: object = 1\n')
    (tmp_path / "helper.py").write_text("import no_such_module\n")
    assert catalogue(tmp_path) == {"one": "First line."}


@pytest.mark.parametrize("function", [interval, quartiles])
def test_one_value_has_a_center(function: Callable[[Sequence[float]], dict[str, Any]]) -> None:
    summary = function([3.0])
    assert summary.get("mean", summary.get("median")) == 3.0


def test_the_runners_do_the_same_work() -> None:
    from benchmarks.runner_flower import run_local_grid
    from benchmarks.runner_job import Job, run_loop

    job = Job(seed=3, clients=6, per_round=3, rounds=4)
    outcomes = [run_loop(job), run_loop(job, reuse=False), run_local_grid(job)]
    assert {outcome.steps for outcome in outcomes} == {job.steps} == {36}
    assert len({outcome.accuracy for outcome in outcomes}) == 1
    assert outcomes[0].accuracy > 0.15
