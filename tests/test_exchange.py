"""One exchange with many devices: waiting until they are there."""

from __future__ import annotations

from typing import Any

import pytest

from fl_edge.errors import TrainingError
from fl_edge.strategies.exchange import wait_for_nodes


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
