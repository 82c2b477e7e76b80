from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Results
from benchmarks.harness_report import summarize
from benchmarks.link import BENCHMARK, LARGE, MEMORY, MIDDLE, MODEL, SMALL, WHOLE, read_memory, read_model, spread
from benchmarks.link_bare import BareLoop
from benchmarks.link_figure import figure
from benchmarks.link_memory import measure_memory
from benchmarks.link_sessions import FEDAVG, LINES, PROBE, progress, resident_copy

QUIET: dict[str, dict[str, Any]] = {
    SMALL: {**spread([1.0, 2.0, 3.0], "ours"), **spread([1.0, 1.0], "bare"), **spread([6000.0, 6400.0], "flower")},
    MIDDLE: {**spread([6.0, 8.0, 10.0], "ours"), **spread([4.0, 5.0, 6.0], "bare")},
    LARGE: {**spread([20.0, 30.0], "ours"), **spread([20.0, 20.0], "bare"), "bytes_ratio": 0.8},
    MODEL: {"ours_ms": 3.0, "ours_p99_ms": 9.0, "flower_ms": 9000.0, "flower_p99_ms": 9500.0},
    MEMORY: {"growth_mib": 1.5, "rss_mib": 700.0, "curve": [[10, 690.0, 420.0], [20, 700.0, 420.0]], "ours_ms": 170.0},
    WHOLE: {"rounds": 10, "ours_ms": 12_000.0, "flower_ms": 150_000.0},
}


def results(values: dict[str, dict[str, Any]]) -> Results:
    raw = [{"case": case, "seed": 0, "repetition": 0, "values": found} for case, found in values.items()]
    return Results(raw, summarize(raw, BENCHMARK.columns), {})


def test_each_line_of_the_table_is_a_target() -> None:
    assert {case.name for case in BENCHMARK.cases} == set(QUIET)
    made = BENCHMARK.targets(results(QUIET))
    assert [target.value for target in made] == pytest.approx([3100, 8.0, 9.96, 1.6, 0.8, 3.0, 1.5, 12.5])
    assert all(target.holds for target in made)
    assert "FedAvg, 4 nodes, 10 rounds" in made[-1].measure


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (SMALL, {"flower_ms": 3000.0}),
        (MIDDLE, {"ours_ms": 8.1}),
        (MIDDLE, {"ours_p99_ms": 41.0}),
        (LARGE, {"bytes_ratio": 0.69}),
        (MODEL, {"ours_ms": 21.0}),
        (MEMORY, {"growth_mib": 5.1}),
        (WHOLE, {"ours_ms": 16_000.0}),
    ],
)
def test_one_line_that_is_missed_is_the_only_one(case: str, change: dict[str, float]) -> None:
    made = BENCHMARK.targets(results(QUIET | {case: QUIET[case] | change}))
    assert [case in target.measure for target in made if not target.holds] == [True]


def test_what_was_not_measured_does_not_hold() -> None:
    assert not any(target.holds for target in BENCHMARK.targets(results({})))


def test_the_picture_takes_what_there_is(tmp_path: Path) -> None:
    for name, values in (("all", QUIET), ("one", {MODEL: QUIET[MODEL]})):
        figure(results(values), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_times_are_summed_up_by_percentiles() -> None:
    found = spread([float(each) for each in range(101)], "ours")
    assert (found["ours_ms"], found["ours_p99_ms"], found["ours_exchanges"]) == (50, 99, 101)
    assert found["ours_percentiles_ms"] == {str(share): share for share in (0, 1, 5, 25, 50, 75, 95, 99, 100)}


def stamps(sent: float, *steps: float, process: int) -> dict[str, float]:
    names = ("started_at", "entered_at", "imported_at", "ready_at")
    return {"sent_at": sent, **dict(zip(names, steps, strict=True)), "process": process, "parameters": 20_010_000}


def test_message_to_handler_is_that_of_the_slower_client_without_the_first_round() -> None:
    warm = [[stamps(100 * r, -9, -8, -7, 100 * r + r * (1 + n) / 100, process=n) for n in (0, 1)] for r in (1, 2, 3)]
    found = read_model(warm, "ours")
    assert (found["ours_ms"], found["ours_p99_ms"], found["ours_second_ms"]) == pytest.approx((50, 60, 40))
    assert found["ours_first_ms"] == pytest.approx(20)
    assert found["ours_processes"] == 2
    cold = [[stamps(100 * r, 100 * r + 2, 100 * r + 5, 100 * r + 6, 100 * r + 6.5, process=r)] for r in (1, 2)]
    found = read_model(cold, "flower")
    parts = [found[f"flower_{part}_ms"] for part in ("wait", "start", "torch", "model")]
    assert parts == pytest.approx([2000, 3000, 1000, 500])
    assert sum(parts) == pytest.approx(found["flower_ms"])


def test_growth_is_that_of_the_last_hundred_exchanges_over_the_early_ones() -> None:
    curve = [
        (number, 500.0 + (number > 50) * 200 + (number > 900) * 7, 400.0 + (number > 900))
        for number in range(10, 1001, 10)
    ]
    found = read_memory({"curve": curve, "times_ms": [3.0, 1.0, 2.0]})
    assert (found["rss_mib"], found["growth_mib"], found["held_growth_mib"]) == (707, 7, 1)


@pytest.mark.parametrize("app", [PROBE, FEDAVG], ids=lambda app: str(app.name))
def test_two_lines_make_an_app_resident(app: Path, tmp_path: Path) -> None:
    copy = resident_copy(app, tmp_path / "copy")
    changed = []
    for file in app.rglob("*.py"):
        before, after = (each.read_text().splitlines() for each in (file, copy / file.relative_to(app)))
        changed += [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert sorted(changed) == sorted(LINES.values())


def test_progress_is_what_the_run_says_of_itself() -> None:
    log = "INFO : Starting\nlink-probe: exchange 3 of 9\nINFO :      [ROUND 1/3]\nINFO : configure_train\n"
    assert progress(log) == ["exchange 3 of 9", "[ROUND 1/3]"]


def test_the_bare_loop_brings_every_byte_back_and_leaves_no_process() -> None:
    with BareLoop(2) as loop:
        for size in (1, 70_000):
            payload = bytes(range(256)) * (size // 256) or b"x"
            assert loop.exchange([payload] * 2) == [payload] * 2
    assert all(process.poll() is not None for process in loop._processes)


def test_memory_is_measured_in_a_real_server_process() -> None:
    outcome = measure_memory(nodes=4, size=2**16, exchanges=20, processes=2)
    assert [number for number, *_ in outcome["curve"]] == [10, 20]
    assert len(outcome["times_ms"]) == 20
    assert all(0 <= held < resident < 2000 for _, resident, held in outcome["curve"])
