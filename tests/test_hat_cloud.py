"""HAT's cloud: what devices are owed, whatever others do, and what it says to uploads that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_edge.errors import ConfigError, ReplyError
from fl_edge.hat.cloud import Cloud, Refusal
from fl_edge.hat.messages import Answer, Upload
from fl_edge.hat.middle import Item, Middle
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.split import load_middle
from fl_edge.seeding import torch_rng
from tests.tiny_hat import CPU, save_model

WIDTH, CAPACITY, SLOTS, LEASE_S = 32, 40, 4, 10.0
LIMITS = (Limits(), Limits(tokens=16), Limits(tokens=24, chunk=4))


@cache
def folder() -> Path:
    return save_model(Path(mkdtemp()) / "model", layers=4)


@cache
def plain() -> Any:
    return load_middle(folder(), 2, CPU)


def new_cloud(limits: Limits = LIMITS[0], clock: Callable[[], float] = lambda: 0.0) -> Cloud:
    return Cloud(Middle(load_middle(folder(), 2, CPU), CAPACITY, SLOTS * CAPACITY), limits, LEASE_S, clock)


@pytest.fixture
def cloud() -> Cloud:
    return new_cloud()


def states(count: int, *name: int | str) -> Tensor:
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=torch_rng(0, "states", *name))


def close(found: Tensor, due: Tensor) -> None:
    torch.testing.assert_close(found, due, atol=1e-11, rtol=0.0)


def reference(rows: Tensor) -> Tensor:
    found: Tensor = plain()(rows[None])[0]
    return found


def answered(cloud: Cloud, now: float = 0.0) -> dict[str, Answer]:
    """What one batch gives, to devices with one request each."""
    answers = {}
    for device, answer in cloud.step(now):
        assert isinstance(answer, Answer), answer
        answers[device] = answer
    return answers


def begin(cloud: Cloud, device: str, count: int = 6) -> Tensor:
    """A request 0 whose prompt has been run."""
    rows = states(count, device)
    cloud.submit(device, Upload(0, 0, rows, verify=False), 0.0)
    close(answered(cloud)[device].rows, reference(rows)[-1:])
    return rows


def still_right(cloud: Cloud, device: str, held: Tensor) -> None:
    """What the cloud has of a request is what the device thinks it has."""
    rows = states(2, device, "more")
    cloud.submit(device, Upload(0, len(held), rows), 0.0)
    close(answered(cloud)[device].rows, reference(torch.cat([held, rows]))[len(held) :])


def test_inner_chunks_give_no_rows_and_the_last_one_gives_one(cloud: Cloud) -> None:
    rows = states(9, "chunks")
    for start, end in ((0, 4), (4, 7)):
        cloud.submit("a", Upload(0, start, rows[start:end], last=False), 0.0)
        assert answered(cloud)["a"].rows.shape == (0, WIDTH)
    cloud.submit("a", Upload(0, 7, rows[7:], verify=False), 0.0)
    close(answered(cloud)["a"].rows, reference(rows)[-1:])
    still_right(cloud, "a", rows)


def test_chunks_may_come_before_the_ones_before_them_are_answered(cloud: Cloud) -> None:
    rows = states(9, "chunks")
    for start, end in ((0, 4), (4, 7), (7, 9)):
        cloud.submit("a", Upload(0, start, rows[start:end], last=end == 9, verify=False), 0.0)
    assert cloud.waiting == 9
    assert [len(answered(cloud)["a"].rows) for _ in range(2)] == [0, 0]
    close(answered(cloud)["a"].rows, reference(rows)[-1:])
    assert cloud.step(0.0) == []


def test_answers_say_how_long_the_upload_waited_and_what_its_last_batch_was() -> None:
    cloud = new_cloud(Limits(tokens=8), iter(range(100)).__next__)
    cloud.submit("a", Upload(0, 0, states(10, "a"), verify=False), 1.0)
    assert cloud.step(1.5) == []
    cloud.submit("b", Upload(0, 0, states(3, "b")), 2.0)
    answers = answered(cloud, 2.5)
    assert {name: (each.wait_s, each.batch_tokens, each.batch_s) for name, each in answers.items()} == {
        "a": (1.5, 5, 1.0),
        "b": (0.5, 5, 1.0),
    }


@dataclass
class Device:
    """Does to one request what a device may do, as the data say; ``held`` is what holds for it."""

    name: str
    data: st.DataObject
    held: Tensor
    sent: Upload | None = None
    wanted: Tensor | None = None
    kept: tuple[int, ...] | None = None

    def upload(self) -> Upload:
        number, base = self.data.draw(st.integers(0, 99)), len(self.held)
        rows = states(self.data.draw(st.integers(1, min(6, CAPACITY - base))), self.name, number)
        kind = self.data.draw(st.sampled_from(("inner", "last", "chain", "tree")))
        parents = (
            tuple(self.data.draw(st.integers(-1, row - 1)) for row in range(len(rows))) if kind == "tree" else None
        )
        upload = Upload(0, base, rows, kind != "inner", kind in ("chain", "tree"), parents, self.kept)
        self.sent, self.wanted = upload, {"inner": rows[:0], "last": rows[-1:]}.get(kind, rows)
        return upload

    def take_in(self, answer: Answer | Refusal) -> None:
        """Compare with transformers, and go on from some row that was sent, or cut back."""
        assert isinstance(answer, Answer)
        assert self.sent is not None
        rows, parents, self.kept = self.sent.rows, self.sent.parents, None
        if parents is None:
            due = reference(torch.cat([self.held, rows]))[len(self.held) :]
            close(
                answer.rows,
                {(True, True): due, (True, False): due[-1:]}.get((self.sent.last, self.sent.verify), due[:0]),
            )
            self.held = torch.cat([self.held, rows])
            self.held = self.held[: self.data.draw(st.integers(max(0, len(self.held) - 9), len(self.held)))]
        else:
            path = [self.data.draw(st.integers(0, len(rows) - 1))]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            due = reference(torch.cat([self.held, rows[path]]))[len(self.held) :]
            close(answer.rows[path], due)
            self.held, self.kept = torch.cat([self.held, rows[path]]), tuple(path)
        if len(self.held) == CAPACITY:
            self.held, self.kept = self.held[:1], None


@given(st.data(), st.sampled_from(LIMITS))
@settings(max_examples=25, deadline=None)
def test_each_device_gets_what_it_would_get_alone(data: st.DataObject, limits: Limits) -> None:
    cloud = new_cloud(limits)
    devices = {name: Device(name, data, states(0)) for name in "abcd"}
    idle = set(devices)
    for _ in range(12):
        for name in sorted(idle):
            if data.draw(st.booleans()):
                cloud.submit(name, devices[name].upload(), 0.0)
                idle.remove(name)
        for name, answer in cloud.step(0.0):
            devices[name].take_in(answer)
            idle.add(name)
    assert cloud.requests <= SLOTS


TREE = (-1, -1, 0, 2, 1)  # 0 - 2 - 3 and 1 - 4
BASE = 6


def bad(rows: Tensor | int = 2, base: int = BASE, **more: Any) -> Upload:
    return Upload(more.pop("request", 0), base, states(rows, "bad") if isinstance(rows, int) else rows, **more)


@pytest.mark.parametrize(
    ("upload", "reason"),
    [
        (bad(request=7), r"request 7 goes on at row 6, but is unknown: .* begin anew at row 0$"),
        (bad(request=8, base=0, kept=(0,)), r"request 8 goes on at row 0; with 1 kept rows behind 0 it is 1"),
        (bad(base=12), r"goes on at row 12; the cloud has its rows 0 to 11"),
        (bad(base=-1), r"goes on at row -1; the cloud has its rows 0 to 11"),
        (bad(base=8), r"kept rows must be a path of the 5 rows sent before, not the first ones"),
        (bad(torch.zeros(2, 31)), r"shape \(2, 31\) and type float32; floats of shape \(n, 32\)"),
        (bad(torch.zeros(32)), r"shape \(32,\) and type float32; floats"),
        (bad(torch.zeros(0, 32)), r"shape \(0, 32\) and type float32; .* n at least 1"),
        (bad(torch.zeros(2, 32, dtype=torch.long)), r"type int64; floats"),
        (bad(torch.full((2, 32), torch.nan)), r"the rows are not all finite numbers"),
        (bad(torch.full((2, 32), torch.inf)), r"the rows are not all finite numbers"),
        (bad(CAPACITY - BASE + 1), r"would have 41 rows with rows at 6; a request may have 40"),
        (bad(1, base=10**12), r"would have 1000000000001 rows .*; a request may have 40"),
        (bad(parents=(-1,)), r"the parents are no tree; each of 2 rows"),
        (bad(parents=(-1, 1)), r"the parents are no tree"),
        (bad(parents=(-2, 0)), r"the parents are no tree"),
        (bad(parents=(-1, 0), verify=False), r"a prompt is no draft tree"),
        (bad(parents=(-1, 0), last=False), r"a prompt is no draft tree"),
        (bad(base=7, kept=(5,)), r"a path of the 5 rows sent before, not \[5\]"),
        (bad(base=7, kept=(-1,)), r"a path of the 5 rows sent before, not \[-1\]"),
        (bad(base=8, kept=(0, 4)), r"a path of the 5 rows sent before, not \[0, 4\]"),
        (bad(base=7, kept=(2,)), r"a path of the 5 rows sent before, not \[2\]"),
        (bad(base=8, kept=(1, 4, 3)), r"goes on at row 8; with 3 kept rows behind 6 it is 9"),
        (bad(base=9, kept=(0, 2, 2)), r"a path of the 5 rows sent before, not \[0, 2, 2\]"),
    ],
)
def test_an_upload_that_cannot_be_used_changes_nothing(cloud: Cloud, upload: Upload, reason: str) -> None:
    prompts = {name: begin(cloud, name) for name in ("a", "b")}
    tree = states(5, "tree")
    cloud.submit("a", Upload(0, BASE, tree, parents=TREE), 0.0)
    answered(cloud)
    with pytest.raises(ReplyError, match=reason) as raised:
        cloud.submit("a", upload, 0.0)
    assert "\n" not in str(raised.value)
    assert (cloud.waiting, cloud.requests) == (0, 2)
    more = states(1, "after")
    cloud.submit("a", Upload(0, BASE + 2, more, kept=(1, 4)), 0.0)
    found = answered(cloud)["a"].rows
    close(found, reference(torch.cat([prompts["a"], tree[[1, 4]], more]))[-1:])
    still_right(cloud, "b", prompts["b"])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Upload(0, 6, states(2, 1)), Upload(0, 8, states(2, 2))),
        (Upload(0, 6, states(2, 1)), Upload(0, 6, states(2, 2), verify=False)),
        (Upload(0, 6, states(2, 1), verify=False), Upload(0, 8, states(2, 2), last=False)),
        (Upload(0, 6, states(2, 1), last=False), Upload(0, 8, states(2, 2))),
        (Upload(0, 6, states(2, 1), last=False), Upload(0, 7, states(2, 2), last=False)),
    ],
)
def test_an_upload_out_of_turn_is_refused(cloud: Cloud, first: Upload, second: Upload) -> None:
    prompt = begin(cloud, "a")
    cloud.submit("a", first, 0.0)
    with pytest.raises(ReplyError, match=r"request 0: the upload before this one is not answered yet"):
        cloud.submit("a", second, 0.0)
    cloud.submit("b", replace(first, base=0), 0.0)  # the same number, another device
    answers = answered(cloud)
    assert len(answers["b"].rows) == len(answers["a"].rows)
    still_right(cloud, "a", torch.cat([prompt, first.rows]))


def test_without_room_nobody_is_let_in_until_a_request_ends(cloud: Cloud) -> None:
    prompts = {name: begin(cloud, name) for name in "abcd"}
    with pytest.raises(ReplyError, match="request 0: all 4 requests that the cloud has memory for are under way; try"):
        cloud.submit("e", Upload(0, 0, states(2, "e")), 0.0)
    still_right(cloud, "c", prompts["c"])
    cloud.end("b", 0)
    cloud.end("b", 0)
    cloud.end("nobody", 3)
    assert cloud.requests == 3
    begin(cloud, "e")
    with pytest.raises(ReplyError, match="request 0 goes on at row 6, but is unknown"):
        cloud.submit("b", Upload(0, 6, states(2, "b")), 0.0)
    with pytest.raises(ConfigError, match="a cache of 39 tokens holds no request of 40; it must be"):
        Middle(plain(), CAPACITY, CAPACITY - 1)


def test_a_request_that_ends_while_it_waits_is_not_run(cloud: Cloud) -> None:
    for name in "ab":
        cloud.submit(name, Upload(0, 0, states(3, name)), 0.0)
    cloud.end("a", 0)
    assert set(answered(cloud)) == {"b"}


def test_a_device_that_is_silent_for_its_lease_loses_its_requests(cloud: Cloud) -> None:
    prompts = {name: begin(cloud, name) for name in ("gone", "slow", "here")}
    cloud.submit("gone", Upload(1, 0, states(2, "gone")), 1.0)
    cloud.step(1.0)
    cloud.submit("slow", Upload(0, 6, states(2, "slow")), 2.0)
    with pytest.raises(ReplyError, match="not all finite"):  # somebody who says nonsense is there
        cloud.submit("here", Upload(0, 6, states(2, "here") * torch.nan), 8.0)
    assert cloud.expire(11.0) == []
    assert cloud.expire(13.0) == ["gone"]  # and not the one that waits for an answer
    assert (cloud.requests, cloud.expire(13.0)) == (2, [])
    assert set(answered(cloud, 14.0)) == {"slow"}
    still_right(cloud, "here", prompts["here"])
    assert cloud.expire(25.0) == ["slow", "here"]
    assert cloud.requests == 0
    for name in "abcd":
        begin(cloud, name)


class Failing:
    """A middle submodel that has memory for so many rows only, or for none."""

    def __init__(self, middle: Middle, most: int) -> None:
        self._run, self._most = middle.run, most

    def __call__(self, items: Sequence[Item]) -> list[Tensor]:
        if sum(item.span.count for item in items) > self._most:
            raise RuntimeError("out of memory\nand much more")
        return self._run(items)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Cloud:
    middle = Middle(load_middle(folder(), 2, CPU), CAPACITY, SLOTS * CAPACITY)
    monkeypatch.setattr(middle, "run", Failing(middle, 7))
    return Cloud(middle, Limits(), LEASE_S)


def test_a_batch_that_fails_is_run_one_by_one_and_who_is_at_fault_is_told(small: Cloud) -> None:
    prompts = {name: begin(small, name) for name in "ab"}
    small.submit("a", Upload(0, 6, states(5, 1)), 0.0)
    small.submit("b", Upload(0, 6, states(8, 2), last=False), 0.0)
    small.submit("b", Upload(0, 14, states(3, 3), last=False), 0.0)
    found = small.step(0.0)
    assert [device for device, _ in found] == ["a", "b", "b"]
    answer, *refusals = (each for _, each in found)
    assert isinstance(answer, Answer)
    close(answer.rows, reference(torch.cat([prompts["a"], states(5, 1)]))[6:])
    assert refusals == [Refusal(0, "the cloud could not run the rows: out of memory")] * 2
    assert small.waiting == 0
    still_right(small, "a", torch.cat([prompts["a"], states(5, 1)[:2]]))
    still_right(small, "b", prompts["b"])


def test_rows_that_overflow_on_the_way_are_refused_and_leave_nothing_behind(cloud: Cloud) -> None:
    prompts = {name: begin(cloud, name) for name in "ab"}
    cloud.submit("a", Upload(0, 4, torch.full((9, WIDTH), 1e200, dtype=torch.float64)), 0.0)
    cloud.submit("b", Upload(0, 6, states(3, 1)), 0.0)
    refusal, answer = (each for _, each in cloud.step(0.0))
    assert refusal == Refusal(0, "the rows lead to numbers that are not finite")
    assert isinstance(answer, Answer)
    cloud.submit("b", Upload(0, 9, states(9, 4)), 0.0)  # so that the other one is padded
    still_right(cloud, "a", prompts["a"][:4])
