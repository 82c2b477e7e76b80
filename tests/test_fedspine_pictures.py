"""Pictures of a FedSpine run."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fl_edge.fedspine import pictures
from fl_edge.fedspine.pictures import draw
from fl_edge.fedspine.report import RoundReport
from tests.tiny_fedspine_report import run

BLUE, GREY, ORANGE, WHITE = (43, 108, 176), (113, 128, 150), (221, 107, 32), (255, 255, 255)


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int)


def coloured(png: bytes, rgb: tuple[int, int, int], within: int = 30) -> int:
    """Pixels of about that colour."""
    return int((np.abs(pixels(png) - rgb).max(axis=2) <= within).sum())


def size(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.mark.parametrize(
    ("reports", "accuracy"),
    [
        (run(rounds=1), (1408, 660)),
        (run(devices=3, rounds=200), (1408, 660)),
        (run(first=7, tested=False, virtual=False), (704, 660)),
        ([*run(rounds=2), *run(rounds=2, first=3, virtual=False)], (704, 660)),
        (run(never=(1,)), (1408, 660)),
        (run(devices=2, never=(0, 1)), (1408, 660)),
        (run(devices=0), (1408, 660)),
        (run(devices=1, ranks=(8,)), (1408, 660)),
    ],
    ids=["one round", "many rounds", "no test, real clock, resumed", "both clocks", "one always absent",
         "all always absent", "no device", "one device of one rank"],
)  # fmt: skip
def test_three_pictures_are_drawn_of_any_run(reports: list[RoundReport], accuracy: tuple[int, int]) -> None:
    found = draw(reports)
    assert {name: size(png) for name, png in found.items()} == {
        "accuracy.png": accuracy,
        "choices.png": (1760, 396),
        "times.png": (1408, 660),
    }


def test_devices_without_time_and_reward_are_not_blank() -> None:
    (report,) = run(rounds=1)
    idle = [replace(device, compute_s=0.0, transfer_s=0.0, reward=0.0) for device in report.devices]
    drawn, blank = draw([replace(report, devices=idle, waiting_s=0.0)]), draw(run(rounds=1, never=range(4)))
    for name in ("times.png", "choices.png"):
        assert coloured(drawn[name], WHITE) < coloured(blank[name], WHITE) - 50_000


def test_what_is_not_known_is_not_drawn() -> None:
    whole, untested = pictures._accuracy(run(rounds=9)), pictures._accuracy(run(rounds=9, tested=False))
    assert coloured(untested, BLUE) == 0
    assert coloured(whole, BLUE) > 1000
    nobody = pictures._accuracy(run(rounds=9, never=range(4)))
    assert coloured(nobody, ORANGE) == 0
    for png in (whole, untested):
        assert coloured(png, ORANGE) > 500
        assert coloured(png, GREY) > coloured(nobody, GREY) + 200  # letters have grey edges


def test_absent_devices_are_white() -> None:
    def blank(**changes: Any) -> int:
        reports = run(devices=10, rounds=10, **changes)
        return coloured(pictures._choices(reports, pictures._fleet(reports)), WHITE, 0)

    nothing = blank()
    cell = (blank(never=range(10)) - nothing) / 100
    assert cell > 500
    assert blank(never=(3,)) - nothing == pytest.approx(10 * cell, rel=0.05)


def test_devices_are_ordered_by_their_speed_and_those_never_seen_come_last() -> None:
    reports = run(devices=30, rounds=5, missing=0.3, never=(4, 11))
    busy: dict[str, list[float]] = {}
    for report in reports:
        for device in report.devices:
            busy.setdefault(device.device, []).append(device.busy_s)
    order = pictures._fleet(reports)
    assert order[-2:] == ["device-4", "device-11"]
    assert order[:-2] == sorted(busy, key=lambda name: float(np.mean(busy[name])))


def test_a_table_holds_each_devices_value_in_its_row_and_round() -> None:
    reports = run(devices=6, rounds=4, first=3, missing=0.4)
    fleet = pictures._fleet(reports)
    table = pictures._table(reports, fleet, lambda device: device.ratio)
    assert table.shape == (6, 4)
    for column, report in enumerate(reports):
        given = {device.device: device.ratio for device in report.devices}
        for name, value in zip(fleet, table[:, column], strict=True):
            assert value == given[name] if name in given else np.isnan(value)


def test_every_device_of_eighty_has_its_name_and_thousands_still_fit() -> None:
    many = draw(run(devices=80, rounds=2))
    assert size(many["choices.png"]) == (1760, round(110 * (80 * 0.16 + 1.2)))
    assert size(many["times.png"]) == (1408, 990)
    crowd = run(devices=2000, rounds=2)
    assert size(pictures._choices(crowd, pictures._fleet(crowd))) == (1760, 1650)
