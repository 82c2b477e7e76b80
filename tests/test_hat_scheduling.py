"""What goes into the cloud's next batch: the order, the budget, and that nobody waits for ever."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_edge.hat.scheduling import Limits, Waiting, next_batch

HAT, U_SHAPE, U_SARATHI = Limits(tokens=32), Limits(), Limits(tokens=32, chunk=8)

uploads = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 60), st.booleans()).map(
        lambda each: Waiting(each[0], min(each[1], 9) if each[2] else each[1], each[2])
    ),
    max_size=20,
)
limits = st.builds(Limits, tokens=st.sampled_from((0, 1, 16, 64)), chunk=st.sampled_from((0, 1, 8)))


@dataclass
class Queue:
    """What waits, by arrival; those that a batch has not run as a whole stay in place."""

    waiting: list[Waiting]

    def run(self, limits: Limits) -> list[tuple[Waiting, int]]:
        chosen = next_batch(self.waiting, limits)
        done = [(self.waiting[index], rows) for index, rows in chosen]
        for index, rows in chosen:
            self.waiting[index] = replace(self.waiting[index], rows=self.waiting[index].rows - rows, started=True)
        self.waiting = [each for each in self.waiting if each.rows]
        return done


def verify(request: str, rows: int) -> Waiting:
    return Waiting(request, rows, verify=True)


def prompt(request: str, rows: int, started: bool = False) -> Waiting:
    return Waiting(request, rows, verify=False, started=started)


MIXED = (prompt("new", 20), prompt("under way", 10, started=True), verify("a", 5), verify("b", 4))


@pytest.mark.parametrize(
    ("waiting", "rule", "due"),
    [
        ((), HAT, []),
        (MIXED, HAT, [(2, 5), (3, 4), (1, 10), (0, 13)]),
        (MIXED, U_SHAPE, [(2, 5), (3, 4), (1, 10), (0, 20)]),
        (MIXED, U_SARATHI, [(2, 5), (3, 4), (1, 8), (0, 8)]),
        (MIXED, Limits(tokens=9), [(2, 5), (3, 4)]),
        (MIXED, Limits(tokens=8), [(2, 5), (1, 3)]),
        ((verify("a", 5), verify("b", 5), verify("c", 3)), Limits(tokens=8), [(0, 5), (2, 3)]),
        ((verify("a", 50), verify("b", 5), prompt("c", 3)), HAT, [(0, 50)]),
        ((prompt("a", 500), prompt("b", 500)), U_SHAPE, [(0, 500), (1, 500)]),
        ((prompt("a", 5), prompt("a", 6), prompt("b", 7)), HAT, [(0, 5), (2, 7)]),
    ],
)
def test_what_a_batch_takes(waiting: Sequence[Waiting], rule: Limits, due: list[tuple[int, int]]) -> None:
    assert next_batch(waiting, rule) == due


@given(uploads, limits)
def test_a_batch_keeps_to_its_limits(waiting: list[Waiting], rule: Limits) -> None:
    chosen = next_batch(waiting, rule)
    assert bool(chosen) == bool(waiting)
    assert len({waiting[index].request for index, _ in chosen}) == len(chosen)
    for index, rows in chosen:
        assert 0 < rows <= waiting[index].rows
        assert rows == waiting[index].rows or not waiting[index].verify
        assert waiting[index].verify or not rule.chunk or rows <= rule.chunk
        assert all(waiting[before].request != waiting[index].request for before in range(index))
    assert not rule.tokens or sum(rows for _, rows in chosen) <= rule.tokens or len(chosen) == 1


@given(uploads, limits)
def test_everything_is_run_once_and_in_order(waiting: list[Waiting], rule: Limits) -> None:
    queue, run = Queue(list(waiting)), defaultdict[object, int](int)
    due = defaultdict[object, int](int)
    for each in waiting:
        due[each.request] += each.rows
    batches = 0
    while queue.waiting:
        for each, rows in queue.run(rule):
            run[each.request] += rows
        batches += 1
    assert run == due
    assert batches <= sum(each.rows for each in waiting)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 5))
def test_prompts_go_on_while_devices_verify_without_end(prompts: list[int], devices: int, rows: int) -> None:
    left_over = 7
    rule, batches = Limits(tokens=devices * rows + left_over), 0
    queue = Queue([prompt(f"prompt {number}", count) for number, count in enumerate(prompts)])
    while any(not each.verify for each in queue.waiting):
        queue.waiting = [each for each in queue.waiting if not each.verify]
        queue.waiting += [verify(f"device {device}", rows) for device in range(devices)]
        assert sum(each.verify for each, _ in queue.run(rule)) == devices
        batches += 1
    assert batches == -(-sum(prompts) // left_over)
