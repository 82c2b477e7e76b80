"""What a run leaves behind: whole files, checkpoints, the run folder, events, pictures, the round's line."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fl_edge.checkpoints import load_checkpoint, save_checkpoint
from fl_edge.errors import RunFolderError, TrainingError
from fl_edge.files import write_whole
from fl_edge.mergesfl.observers import Lines, Recorder, TensorBoard
from fl_edge.mergesfl.pictures import draw
from fl_edge.mergesfl.report import Lost, RoundReport, summarise
from fl_edge.runs import RunFolder, saved_config, versions
from fl_edge.strategies.exchange import wait_for_nodes
from tests.tiny import same_bits


def report(server_round: int = 1, **changes: Any) -> RoundReport:
    standard = RoundReport(
        server_round=server_round,
        learning_rate=0.1,
        train_loss=1.5,
        train_accuracy=0.4,
        test_accuracy=0.5,
        test_loss=1.25,
        kl=0.04,
        kl_reached=True,
        label_mix=[0.5, 0.25, 0.25],
        reference=[1 / 3] * 3,
        devices=["device-0", "device-10"],
        batch_sizes=[4, 32],
        iteration_s=[0.5, 0.25],
        waiting_s=0.75,
        virtual_s=10.0 * server_round,
        real_s=0.5,
        up_bytes=3_000_000,
        down_bytes=1_000_000,
        lost=[],
    )
    return replace(standard, **changes)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_content_and_no_part_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "kept.txt"
    write_whole(file, "old")
    monkeypatch.setattr(step, full_disk)
    with pytest.raises(RunFolderError, match=r"kept\.txt: No space left on device"):
        write_whole(file, "new, and longer than what stood there")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_never_came_back_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed between writing and replacing: nothing of ours runs any more."""

    class Killed(BaseException):
        pass

    def kill(_: int) -> None:
        raise Killed

    file = tmp_path / "rounds.jsonl"
    write_whole(file, b"old")
    monkeypatch.setattr(os, "fsync", kill)
    with pytest.raises(Killed):
        write_whole(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    write_whole(file, "nouveau: é")
    assert file.read_text(encoding="utf-8") == "nouveau: é"


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file" / "below.txt", tmp_path / "nowhere" / "below.txt"):
        with pytest.raises(RunFolderError, match=r"^cannot write .*below\.txt: [^\n]*$"):
            write_whole(place, "text")


# ---------------------------------------------------------------------------------------------------- checkpoints

WEIGHTS = {
    "float": torch.tensor([0.1, -0.0, 1e-45, float("inf")]),
    "double": torch.tensor([[1 / 3]], dtype=torch.float64),
    "counter": torch.tensor(7),
    "bfloat": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "strided": torch.arange(6.0).reshape(2, 3).T,
    "empty": torch.empty(0, 3),
}
RECORD = {"clock": 0.1 + 0.2, "tiny": 5e-324, "devices": {"device-é": [1, 2.5, None, True]}, "seed": 2**62 + 1}


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "deep" / "checkpoints", 3, WEIGHTS, RECORD)
    kept = load_checkpoint(tmp_path / "deep" / "checkpoints")
    assert kept is not None
    assert kept.server_round == 3
    assert kept.record == RECORD
    assert same_bits(kept.weights, WEIGHTS)
    assert torch.signbit(kept.weights["float"][1])
    assert all(kept.weights[name].dtype == WEIGHTS[name].dtype for name in WEIGHTS)


def test_the_newest_two_checkpoints_are_kept_in_the_order_of_rounds(tmp_path: Path) -> None:
    for server_round in (8, 9, 10, 11):  # by name, 10 would come before 9
        save_checkpoint(tmp_path, server_round, WEIGHTS, {"round": server_round})
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "round-000010.safetensors",
        "round-000011.safetensors",
    ]
    kept = load_checkpoint(tmp_path)
    assert kept is not None
    assert kept.record == {"round": 11}


def cut(data: bytes) -> bytes:
    return data[:-1]


def no_record(data: bytes) -> bytes:
    return data.replace(b'"record"', b'"recoil"')


def no_json(data: bytes) -> bytes:
    return data.replace(rb"{\"round\"", rb"[\"round\"")


def pickled(data: bytes) -> bytes:
    """What would make a folder if anything unpickled it."""
    return b"cos\nmkdir\n(S'unpickled'\ntR."


@pytest.mark.parametrize("damage", [cut, no_record, no_json, pickled, lambda data: b""])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints"
    files = [save_checkpoint(folder, server_round, WEIGHTS, {"round": server_round}) for server_round in (1, 2)]
    assert damage(files[1].read_bytes()) != files[1].read_bytes()
    files[1].write_bytes(damage(files[1].read_bytes()))
    kept = load_checkpoint(folder)
    assert kept is not None
    assert (kept.server_round, kept.record) == (1, {"round": 1})

    files[0].write_bytes(damage(files[0].read_bytes()))
    with pytest.raises(RunFolderError, match=r"^no checkpoint in .* can be read; the newest is round-000002"):
        load_checkpoint(folder)
    assert not (tmp_path / "unpickled").exists()


def test_a_folder_without_checkpoints_holds_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_that_cannot_be_written_keeps_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for server_round in (1, 2):
        save_checkpoint(tmp_path, server_round, WEIGHTS, {})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunFolderError, match="No space left"):
        save_checkpoint(tmp_path, 3, WEIGHTS, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"round-{one:06d}.safetensors" for one in (1, 2)]


# ----------------------------------------------------------------------------------------------------- run folder


def test_a_run_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = RunFolder.create(tmp_path / "empty", "seed: 1\n")  # an empty folder is as good as none
    assert saved_config(folder.path).read_text() == "seed: 1\n"
    with pytest.raises(RunFolderError, match=r"is there already; choose another name, or resume it with resume="):
        RunFolder.create(folder.path, "seed: 2\n")
    assert saved_config(folder.path).read_text() == "seed: 1\n"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="is there already"):
        RunFolder.create(tmp_path / "file", "seed: 2\n")


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunFolderError, match=r"^cannot make the run folder [^\n]*$"):
        RunFolder.create(tmp_path / name, "seed: 1\n")
    with pytest.raises(RunFolderError, match=r"is not a run folder: it holds no config\.yaml$"):
        saved_config(tmp_path / name)


def test_a_run_folder_without_its_configuration_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunFolderError, match="No space left"):
        RunFolder.create(tmp_path / "run", "seed: 1\n")
    assert list(tmp_path.iterdir()) == []


def test_reopening_forgets_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "seed: 1\n")
    for server_round in (1, 2, 3):
        folder.add_round({"server_round": server_round, "from": "first"})
    file = folder.path / "rounds.jsonl"
    with file.open("a") as stream:
        stream.write("{damaged, and beyond the checkpoint\n")
    reopened = RunFolder.reopen(folder.path, 2, "seed: 3\n")
    reopened.add_round({"server_round": 3, "from": "second"})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["server_round"], line["from"]) for line in lines] == [(1, "first"), (2, "first"), (3, "second")]
    assert RunFolder.reopen(folder.path, 0, "seed: 3\n").rounds == []


def test_reopening_refuses_rounds_that_are_missing_or_damaged(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "seed: 1\n")
    with pytest.raises(RunFolderError, match=r"^cannot read .*rounds\.jsonl"):
        RunFolder.reopen(folder.path, 1, "seed: 3\n")
    folder.add_round({"server_round": 1})
    with pytest.raises(RunFolderError, match="holds 1 rounds; the checkpoint is of round 2"):
        RunFolder.reopen(folder.path, 2, "seed: 3\n")
    (folder.path / "rounds.jsonl").write_text("{damaged\n")
    with pytest.raises(RunFolderError, match=r"^cannot read .*rounds\.jsonl"):
        RunFolder.reopen(folder.path, 1, "seed: 3\n")


def test_a_checkpoint_never_knows_a_round_that_the_records_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path / "run", "seed: 1\n")
    recorder = Recorder(folder, lambda: (WEIGHTS, {"some": "state"}))
    recorder(report(1))
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunFolderError, match=r"rounds\.jsonl: No space left"):
        recorder(report(2))
    kept = load_checkpoint(folder.checkpoints)
    assert kept is not None
    assert kept.server_round == 1
    monkeypatch.undo()
    assert RunFolder.reopen(folder.path, 1, "seed: 3\n").rounds == [report(1).to_record()]
    assert (folder.path / "config.yaml").read_text() == "seed: 3\n"  # a resumed run may have more rounds


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"has \d+\.\d MB left; a run of this model needs 1000000000000\.0 MB"):
        RunFolder.create(tmp_path / "run", "seed: 1\n", needs_bytes=10**18)
    assert list(tmp_path.iterdir()) == []


def test_result_and_versions_are_plain_json(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "seed: 1\n")
    folder.write_result({"summary": summarise([report()]), "versions": versions(["torch", "no-such-package"])})
    result = json.loads((folder.path / "result.json").read_text())
    assert result["versions"]["no-such-package"] == "not installed"
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert result["summary"]["up_bytes"] == 3_000_000


# ------------------------------------------------------------------------------------------------------- observers


def events(path: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator: Any = EventAccumulator(str(path), size_guidance={"scalars": 0, "histograms": 0})
    return accumulator.Reload()


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    with TensorBoard(tmp_path, 1) as board:
        board(report(1, test_accuracy=None, test_loss=None, virtual_s=None))
        board(report(2, test_accuracy=0.75, batch_sizes=[4, 4], lost=[Lost("device-7", 3, "gone")]))
    found = events(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("accuracy/test")] == [(2, 0.75)]
    assert [event.step for event in found.Scalars("time/virtual_s")] == [2]
    assert [event.value for event in found.Scalars("control/cohort")] == [2, 2]
    assert [event.value for event in found.Scalars("control/lost")] == [0, 1]
    first, second = found.Histograms("devices/batch_size")
    assert (first.histogram_value.min, first.histogram_value.max, first.histogram_value.num) == (4, 32, 2)
    assert (second.histogram_value.min, second.histogram_value.max) == (4, 4)
    assert [event.step for event in found.Histograms("devices/iteration_s")] == [1, 2]


def test_tensorboard_hides_what_a_killed_run_wrote_beyond_its_checkpoint(tmp_path: Path) -> None:
    with TensorBoard(tmp_path, 1) as killed:
        for server_round in (1, 2, 3):
            killed(report(server_round, kl=0.5))
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.out.tfevents.1.host.1.0")  # both files could bear the same second
    with TensorBoard(tmp_path, 3) as resumed:
        resumed(report(3, kl=0.25))
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("control/kl")] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
    ]


def test_tensorboard_without_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunFolderError, match=r"^cannot write TensorBoard events in [^\n]*$"):
        TensorBoard(tmp_path / "file" / "run", 1)


def test_lines_are_written_with_the_time_that_is_left() -> None:
    lines: list[str] = []
    observer = Lines(30, lines.append)
    observer(report(21, real_s=10.0))  # resumed after round 20
    observer(report(22, real_s=20.0))
    assert lines[0].endswith("left 1:30")  # 9 rounds of 10 s
    assert lines[1].endswith("left 2:40")  # 8 rounds of 20 s: the first one waited for processes to start


# ---------------------------------------------------------------------------------------------------------- report


def test_a_report_survives_json() -> None:
    given = report(3, kl=0.1 + 0.2, lost=[Lost("device-1", 4, "no answer")], virtual_s=None, test_accuracy=None)
    assert RoundReport.from_record(json.loads(json.dumps(given.to_record()))) == given


def test_the_line_of_a_round_says_what_is_known_and_nothing_else() -> None:
    line = report(7, lost=[Lost("device-1", 4, "no answer")]).line(250, 59.7)
    parts = ["round   7/250", "acc 0.500", "loss 1.250", "KL 0.0400", "cohort  2", "batch  4-32", "waiting   0.75 s"]
    for part in [*parts, "virtual     70.0 s", "4.00 MB", "lost 1", "left 1:00"]:
        assert part in line
    bare = report(test_accuracy=None, test_loss=None, virtual_s=None).line(9, 3605)
    assert not any(word in bare for word in ("acc", "loss", "virtual", "lost", "None"))
    assert bare.startswith("round 1/9  KL")
    assert bare.endswith("left 60:05")
    assert "acc 0.500  KL" in report(test_loss=None).line(9, 0)  # an evaluation that returns accuracy alone


def test_the_summary_of_a_run() -> None:
    reports = [
        report(1, test_accuracy=None, test_loss=None, batch_sizes=[2, 8], kl=0.2),
        report(2, test_accuracy=0.9, aborted=2, lost=[Lost("a", 0, ""), Lost("b", 1, "")], devices=["a"], kl=0.1,
               batch_sizes=[64]),
        report(3, test_accuracy=0.8, real_s=2.0),
    ]  # fmt: skip
    summary = summarise(reports)
    assert (summary["rounds"], summary["test_accuracy"], summary["best_test_accuracy"]) == (3, 0.8, 0.9)
    assert (summary["batch_size_min"], summary["batch_size_max"]) == (2, 64)
    assert (summary["lost"], summary["aborted"], summary["virtual_s"], summary["real_s"]) == (2, 2, 30.0, 3.0)
    assert summary["cohort_mean"] == pytest.approx(5 / 3)
    assert summary["kl_mean"] == pytest.approx((0.2 + 0.1 + 0.04) / 3)
    assert (summary["up_bytes"], summary["down_bytes"]) == (9_000_000, 3_000_000)
    assert summarise(reports[:1])["best_test_accuracy"] is None


# -------------------------------------------------------------------------------------------------------- pictures

CLASSES = ["cat", "dog", "a rather long name of a class"]


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int)


def coloured(png: bytes, rgb: tuple[int, int, int]) -> int:
    """Pixels of about that colour."""
    return int((np.abs(pixels(png) - rgb).max(axis=2) < 40).sum())


BLUE, GREY, ORANGE = (43, 108, 176), (113, 128, 150), (221, 107, 32)


@pytest.mark.parametrize(
    "reports",
    [
        [report(1)],
        [report(one) for one in range(1, 251)],
        [report(one, test_accuracy=None, test_loss=None, virtual_s=None) for one in (4, 5)],  # a real clock, resumed
        [report(1, kl=0.0, devices=["a"], batch_sizes=[1], iteration_s=[0.0])],
    ],
    ids=["one round", "many rounds", "no test, real clock", "all the same"],
)
def test_three_pictures_are_drawn_of_any_run(reports: list[RoundReport]) -> None:
    pictures = draw(reports, CLASSES)
    assert sorted(pictures) == ["accuracy.png", "devices.png", "labels.png"]
    for name, png in pictures.items():
        width, height = struct.unpack(">II", png[16:24])
        assert (width, height) == ((704, 396) if name == "accuracy.png" else (1408, 396))
    assert coloured(pictures["accuracy.png"], GREY) > 100
    assert coloured(pictures["labels.png"], ORANGE) > 500


def test_a_test_accuracy_is_drawn_wherever_there_is_one() -> None:
    none = draw([report(one, test_accuracy=None) for one in range(1, 9)], CLASSES)["accuracy.png"]
    some = draw([report(one, test_accuracy=None if one % 2 else 0.5) for one in range(1, 9)], CLASSES)["accuracy.png"]
    assert coloured(none, BLUE) == 0
    assert coloured(some, BLUE) > 200


def test_one_round_leaves_a_point_for_the_merged_batches() -> None:
    high, low = (draw([report(train_accuracy=value)], CLASSES)["accuracy.png"] for value in (0.9, 0.1))
    assert (pixels(high) != pixels(low)).any()


def test_every_device_of_many_has_its_row_and_thousands_still_fit() -> None:
    def crowd(devices: int) -> int:
        names = [f"device-{index}" for index in range(devices)]
        many = report(devices=names, batch_sizes=[1] * devices, iteration_s=[1.0] * devices)
        return len(pixels(draw([many], CLASSES)["devices.png"]))

    assert 80 * 12 < crowd(80) < 2000
    assert crowd(5000) < 3000


def test_a_hundred_classes_are_drawn_without_their_names() -> None:
    mix = np.full(100, 0.01).tolist()
    picture = draw([report(label_mix=mix, reference=mix)], [f"class {index}" for index in range(100)])["labels.png"]
    assert coloured(picture, ORANGE) > 500


# -------------------------------------------------------------------------------------------------------- waiting


class Joining:
    """A grid whose nodes come in one look after another."""

    def __init__(self, *looks: int) -> None:
        self.looks = list(looks)

    def get_node_ids(self) -> list[int]:
        return list(range(self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]))


def test_waiting_for_nodes_ends_when_no_more_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_edge.strategies.exchange.time.sleep", lambda _: None)
    grid: Any = Joining(0, 1, 3, 4, 6, 6, 9)
    wait_for_nodes(grid, 3, 1e9)
    assert grid.looks == [9]


def test_waiting_for_nodes_that_never_come_does_not_hammer_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def look() -> float:
        clock[0] += 1e-3
        return clock[0]

    monkeypatch.setattr("fl_edge.strategies.exchange.time.sleep", sleep)
    monkeypatch.setattr("fl_edge.strategies.exchange.time.monotonic", look)
    looks = 0

    class Nobody:
        def get_node_ids(self) -> list[int]:
            nonlocal looks
            looks += 1
            return []

    grid: Any = Nobody()
    with pytest.raises(TrainingError, match="2 devices are asked for and 0 connected within 10 s"):
        wait_for_nodes(grid, 2, 10.0)
    assert looks < 60
