"""Who waits for which reply, and what happens when nobody does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fl_edge.link.flower import identify_process
from fl_edge.link.resident.inbox import Inbox

identify_process(1)
PATIENCE_S = 30.0  # a safety net only
A_MOMENT_S = 0.05  # long enough for a thread to do what it must not do

pytestmark = pytest.mark.usefixtures("in_time")


def question(name: str, node: int = 1) -> Message:
    message = Message(RecordDict(), node, "train")
    message.metadata.__dict__["_message_id"] = name
    return message


class Office:
    """An inbox in which some messages are expected."""

    def __init__(self, names: str = "abcde", limit_bytes: int = 100) -> None:
        self.inbox = Inbox(limit_bytes)
        self.asked = {name: question(name, node) for node, name in enumerate(names, 1)}
        for message in self.asked.values():
            self.inbox.expect(message)

    def settle(self, names: Iterable[str], size: int = 0) -> None:
        for name in names:
            self.inbox.settle(Message(RecordDict(), reply_to=self.asked[name]), size)

    def wait(self, names: Iterable[str], timeout: float | None = 0.0) -> str:
        return answered(self.inbox.wait(names, timeout))

    def pull(self, names: Iterable[str]) -> tuple[str, list[str]]:
        replies, unknown = self.inbox.pull(names)
        return answered(replies), unknown


def answered(replies: list[Message]) -> str:
    return "".join(reply.metadata.reply_to_message_id for reply in replies)


def spawn(act: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Do something in a thread that holds up nothing if it never ends."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(act(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


@contextmanager
def aside(act: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Do something in a thread while the body runs; afterwards it must have ended."""
    future = spawn(act)
    yield future
    future.result(PATIENCE_S)


def blocked(future: Future[Any]) -> bool:
    threading.Event().wait(A_MOMENT_S)
    return not future.done()


def waiting(office: Office, count: int = 1) -> None:
    """Return when so many threads wait for replies."""
    while len(office.inbox._waiters) < count:
        threading.Event().wait(0.001)


@pytest.mark.parametrize("arrival", list(permutations("abc")))
def test_replies_are_in_the_order_of_the_messages(arrival: tuple[str, ...]) -> None:
    office = Office()
    office.settle(arrival[0], 10)
    with aside(lambda: office.wait("abc", PATIENCE_S)) as waited:
        waiting(office)
        office.settle(arrival[1:], 10)
        assert waited.result(PATIENCE_S) == "abc"
    assert office.pull("abc") == ("", ["a", "b", "c"])


def test_a_late_reply_is_pulled_later_and_once() -> None:
    office = Office()
    office.settle("b")
    assert office.wait("abc") == "b"
    assert office.pull("abc") == ("", ["b"])  # a and c are still awaited
    office.settle("ca")
    assert office.pull("cab") == ("ca", ["b"])
    assert office.pull("cab") == ("", ["c", "a", "b"])


def test_a_late_reply_can_be_waited_for_again() -> None:
    office = Office()
    assert office.wait("ab") == ""
    with aside(lambda: office.wait("ab", PATIENCE_S)) as waited:
        waiting(office)
        office.settle("ba")
        assert waited.result(PATIENCE_S) == "ab"


def test_what_was_never_sent_is_not_waited_for() -> None:
    office = Office()
    office.settle("a")
    assert office.wait(["a", "x", "a"], None) == "a"
    assert office.pull(["x"]) == ("", ["x"])
    assert office.wait([], None) == ""


def test_a_second_reply_is_ignored() -> None:
    office = Office()
    office.settle("a", 10)
    office.settle("a", 1000)  # would block for ever if it were kept
    assert office.wait("a") == "a"
    office.settle("a", 10)
    assert office.pull("a") == ("", ["a"])
    office.settle("b", 100)  # there is room for exactly what the limit says
    assert office.pull("b") == ("b", [])


def test_what_is_owed_and_by_whom() -> None:
    office = Office("ab")
    another = question("z", 1)
    office.inbox.expect(another)
    assert office.inbox.asked("a") is office.asked["a"]
    assert office.inbox.owed_by(1) == [office.asked["a"], another]
    office.settle("a")
    assert office.inbox.asked("a") is None
    assert office.inbox.owed_by(1) == [another]
    assert office.inbox.owed_by(3) == []


@pytest.mark.parametrize("how", ["pull", "wait"])
def test_a_full_inbox_makes_devices_wait_until_somebody_takes(how: str) -> None:
    office = Office()
    office.settle("ab", 50)
    with aside(lambda: office.settle("c", 1)) as third, aside(lambda: office.settle("d", 1)) as fourth:
        assert blocked(third)
        assert blocked(fourth)
        assert (office.pull("a")[0] if how == "pull" else office.wait("a")) == "a"
        third.result(PATIENCE_S)
        fourth.result(PATIENCE_S)
    assert office.pull("bcd") == ("bcd", [])


def test_a_reply_larger_than_the_inbox_is_kept_and_waits_itself() -> None:
    office = Office()
    with aside(lambda: office.settle("a", 101)) as large:
        assert blocked(large)
        assert office.pull("a") == ("a", [])


def test_somebody_who_waits_needs_no_room() -> None:
    office = Office()
    office.settle("a", 100)
    with aside(lambda: office.wait("bc", PATIENCE_S)) as waited:
        waiting(office)
        office.settle("bc", 1000)
        assert waited.result(PATIENCE_S) == "bc"
    assert office.pull("a") == ("a", [])


def test_an_error_that_this_end_found_does_not_wait_for_room() -> None:
    office = Office()
    with aside(lambda: office.settle("a", 200)):
        while office.inbox.asked("a"):
            threading.Event().wait(0.001)
        office.settle("b")
        assert office.pull("ab") == ("ab", [])


def test_replies_that_were_given_up_make_room() -> None:
    office = Office()
    assert office.wait("abc") == ""
    office.settle("a", 60)
    office.settle("d", 40)  # nobody has waited for it; it may still be pulled
    office.settle("b", 30)  # room for it: a goes
    assert office.pull("abd") == ("bd", ["a"])
    office.settle("c", 10)
    assert office.pull("c") == ("c", [])


def test_the_oldest_given_up_goes_first_and_no_more_than_needed() -> None:
    office = Office()
    assert office.wait("abcd") == ""
    for name in "bad":
        office.settle(name, 33)
    office.settle("c", 33)
    assert office.pull("abcd") == ("acd", ["b"])


def test_a_given_up_reply_makes_room_however_late_it_comes() -> None:
    """While room was short, c had not arrived; it must go when it has, or devices would wait for ever."""
    office = Office()
    assert office.wait("ca") == ""
    office.settle("a", 80)
    office.settle("b", 80)  # a goes
    with aside(lambda: office.settle("c", 80)) as late:
        late.result(PATIENCE_S)  # it goes at once
        assert office.pull("bc") == ("b", ["c"])


def test_a_given_up_reply_larger_than_the_inbox_blocks_nobody() -> None:
    office = Office()
    assert office.wait("a") == ""
    with aside(lambda: office.settle("a", 1000)) as late:
        late.result(PATIENCE_S)
    office.settle("b", 100)
    assert office.pull("ab") == ("b", ["a"])


def test_each_waiter_gets_its_own() -> None:
    names = [chr(code) for code in range(ord("a"), ord("a") + 24)]
    office = Office("".join(names))
    groups = [names[start::6] for start in range(6)]
    waits = [spawn(office.wait, group, PATIENCE_S) for group in groups]
    waiting(office, 6)
    settles = [spawn(office.settle, names[start::4], 50) for start in (3, 1, 2, 0)]
    assert [wait.result(PATIENCE_S) for wait in waits] == ["".join(group) for group in groups]
    assert [settle.result(PATIENCE_S) for settle in settles] == [None] * 4
    assert office.inbox._waiters == []


def test_a_closed_inbox_lets_nobody_wait() -> None:
    office = Office()
    office.settle("e", 100)
    with aside(lambda: office.wait("ab", None)) as waited, aside(lambda: office.settle("c", 1)) as device:
        waiting(office)
        office.settle("b", 5)
        assert blocked(waited)
        assert blocked(device)
        office.inbox.close()
        assert waited.result(PATIENCE_S) == "b"
        device.result(PATIENCE_S)
    office.settle("d", 1000)
    assert office.wait("a", None) == ""
    assert office.pull("cde") == ("cde", [])
