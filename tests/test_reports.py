"""A round's report: its line, its record, TensorBoard events and pictures."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fl_edge.errors import RunFolderError
from fl_edge.mergesfl.pictures import draw
from fl_edge.mergesfl.report import Lost, RoundReport, summarise
from fl_edge.observers import Lines, TensorBoard
from tests.tiny_report import report

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
        report(3, test_accuracy=0.8, real_s=2.0, kl_reached=False),
    ]  # fmt: skip
    summary = summarise(reports)
    assert (summary["rounds"], summary["test_accuracy"], summary["best_test_accuracy"]) == (3, 0.8, 0.9)
    assert (summary["batch_size_min"], summary["batch_size_max"]) == (2, 64)
    assert (summary["lost"], summary["aborted"], summary["virtual_s"], summary["real_s"]) == (2, 2, 30.0, 3.0)
    assert summary["kl_above_target"] == 1
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
