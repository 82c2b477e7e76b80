"""Frames, and streams of messages over connections that break."""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fl_edge.errors import ReplyError
from fl_edge.link.resident.frames import (
    FAREWELL_BYTES,
    HEADER_BYTES,
    Buffer,
    Frame,
    Kind,
    Position,
    make_frame,
    make_welcome,
    read_farewell,
    read_frame,
    read_welcome,
)
from fl_edge.link.resident.stream import Stream

FRAME_BYTES, MAX_BYTES = 8, 100
PATIENCE_S = 30.0  # a safety net only

pytestmark = pytest.mark.usefixtures("in_time")


def data_frame(payload: bytes = b"abc", *, message: int = 1, part: int = 0, total: int = 3, acked: int = 0) -> Frame:
    return read_frame(make_frame(Kind.DATA, acked, [payload], message=message, part=part, total=total))


def acknowledgement(number: int) -> Frame:
    return read_frame(make_frame(Kind.ACKNOWLEDGEMENT, number))


def fields(frame: Frame) -> tuple[Any, ...]:
    return frame.kind, frame.part, frame.message, frame.acknowledged, frame.total, bytes(frame.payload)


# --- frames ---


@given(
    st.lists(st.binary(max_size=20), min_size=1).filter(any),
    st.integers(1, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32),
)
def test_a_data_frame_comes_back_as_it_was(
    payload: list[bytes], message: int, part: int, acknowledged: int, more: int
) -> None:
    whole = b"".join(payload)
    total = len(whole) + more
    views = [memoryview(each) for each in payload]
    made = make_frame(Kind.DATA, acknowledged, views, message=message, part=part, total=total)
    assert len(made) == HEADER_BYTES + len(whole)
    frame = read_frame(made)
    assert fields(frame) == (Kind.DATA, part, message, acknowledged, total, whole)
    assert frame.payload.obj is made  # a view, no copy


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_a_welcome_comes_back_as_it_was(token: bytes, messages: int, parts: int) -> None:
    frame = read_frame(make_welcome(token, Position(messages, parts)))
    assert (frame.kind, frame.acknowledged) == (Kind.WELCOME, messages)
    assert read_welcome(frame) == (token, Position(messages, parts))


def test_the_layout_is_the_documented_one() -> None:
    made = make_frame(Kind.DATA, 5, [b"xyz"], message=6, part=7, total=8)
    assert made == b"FE\x01\x02" + struct.pack("<IQQQ", 7, 6, 5, 8) + b"xyz"
    assert make_welcome(b"t" * 32, Position(3, 2))[32:] == b"t" * 32 + struct.pack("<QI", 3, 2)
    assert fields(acknowledgement(9)) == (Kind.ACKNOWLEDGEMENT, 0, 0, 9, 0, b"")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"the run has ended", "the run has ended"),
        (b"forged\n2026 ERROR \x1b[31mline\r", "forged 2026 ERROR  [31mline"),
        ("Größe".encode(), "Größe"),
        (b"cut \xc3", "cut \N{REPLACEMENT CHARACTER}"),
        (b"", ""),
    ],
)
def test_a_farewell_is_one_printable_line(text: bytes, shown: str) -> None:
    assert read_farewell(read_frame(make_frame(Kind.FAREWELL, 0, [text]))) == shown


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes is shorter"),
        (make_frame(Kind.ACKNOWLEDGEMENT, 0)[:-1], "31 bytes is shorter"),
        (b"EF" + make_frame(Kind.ACKNOWLEDGEMENT, 0)[2:], "begins with b'EF' version 1"),
        (b"FE\x02" + make_frame(Kind.ACKNOWLEDGEMENT, 0)[3:], "begins with b'FE' version 2"),
        (b"FE\x01\x00" + make_frame(Kind.ACKNOWLEDGEMENT, 0)[4:], "kind 0"),
        (b"FE\x01\x05" + make_frame(Kind.ACKNOWLEDGEMENT, 0)[4:], "kind 5"),
        (make_frame(Kind.DATA, 0, [b"a"], message=0, total=1), "kind 2, message 0, 1 of 1 bytes"),
        (make_frame(Kind.DATA, 0, [], message=1, total=1), "kind 2, message 1, 0 of 1 bytes"),
        (make_frame(Kind.DATA, 0, [b"ab"], message=1, total=1), "kind 2, message 1, 2 of 1 bytes"),
        (make_frame(Kind.ACKNOWLEDGEMENT, 0, [b"a"]), "kind 3"),
        (make_frame(Kind.ACKNOWLEDGEMENT, 0, part=1), "kind 3"),
        (make_frame(Kind.ACKNOWLEDGEMENT, 0, message=1), "kind 3, message 1"),
        (make_frame(Kind.FAREWELL, 0, [b"bye"], total=3), "kind 4, message 0, 3 of 3 bytes"),
        (make_frame(Kind.FAREWELL, 0, [bytes(FAREWELL_BYTES + 1)]), "kind 4"),
        (make_welcome(bytes(31), Position())[:-1], "kind 1"),
        (make_welcome(bytes(32), Position()) + b"a", "kind 1"),
        (make_frame(Kind.WELCOME, 0, [bytes(44)], message=1), "kind 1, message 1"),
    ],
)
def test_a_frame_that_contradicts_itself_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ReplyError, match=reason) as caught:
        read_frame(data)
    assert "\n" not in str(caught.value)


@settings(max_examples=300)
@given(st.binary(max_size=100) | st.binary(max_size=80).map(lambda tail: b"FE\x01\x02" + tail))
def test_foreign_bytes_are_a_frame_or_a_reply_error(data: bytes) -> None:
    with suppress(ReplyError):
        frame = read_frame(data)
        assert len(frame.payload) == len(data) - HEADER_BYTES


@given(st.integers(0, 10**12), st.integers(0, 10**9))
def test_a_position_comes_back_as_it_was(messages: int, parts: int) -> None:
    assert Position.parse(str(Position(messages, parts))) == Position(messages, parts)


@pytest.mark.parametrize(
    "text",
    ["", ".", "1", "1.", ".1", "1.2.3", "-1.0", "1.-0", "+1.0", "1 .0", "1_0.0", "٣.0", "1.²", "9" * 31 + ".0", "a"],
)
def test_anything_else_is_no_position(text: str) -> None:
    with pytest.raises(ReplyError, match="two numbers"):
        Position.parse(text)


# --- a model of two ends and the network between them ---


class End:
    """A stream, what went into it and what came out, and its frames on the way."""

    def __init__(self) -> None:
        self.stream = Stream(FRAME_BYTES, MAX_BYTES)
        self.sent: list[bytes] = []
        self.memory: list[bytearray] = []
        self.received: list[bytes] = []
        self.frames: Iterator[bytes] = iter(())
        self.connection = 0
        self.flying: deque[bytes] = deque()  # on the connection that stands
        self.late: list[deque[bytes]] = []  # on old ones
        self.ended: list[Iterator[bytes]] = []

    def send(self, content: bytes, cuts: Sequence[int]) -> None:
        memory = bytearray(content)
        self.memory.append(memory)  # it cannot grow as long as somebody refers to its bytes
        self.sent.append(content)
        ends = sorted({min(cut, len(content)) for cut in cuts} | {len(content)})
        self.stream.send([memoryview(memory)[start:end] for start, end in zip([0, *ends], ends, strict=False)])

    def emit(self) -> None:
        self.stream.acknowledge()  # so that there is something to emit
        self.flying.append(next(self.frames))

    def take(self, data: bytes) -> None:
        chunks = self.stream.receive(read_frame(data))
        if chunks is not None:
            assert len(chunks) == -(-sum(map(len, chunks)) // FRAME_BYTES)
            self.received.append(b"".join(chunks))

    def cut(self, *, noticed: bool) -> None:
        if noticed:
            assert self.stream.disconnect(self.connection)
            assert not self.stream.disconnect(self.connection)
        self.ended.append(self.frames)
        self.late.append(self.flying)
        self.flying = deque()

    def freed(self) -> int:
        count = 0
        for memory in self.memory:
            with suppress(BufferError):
                memory.append(0)
                memory.pop()
                count += 1
        return count


class Network(RuleBasedStateMachine):
    """A client and a server; the network delivers what it likes, as late as it likes, until it is cut again."""

    @initialize()
    def begin(self) -> None:
        self.client, self.server = End(), End()
        self.connected = False
        self.seen: list[tuple[End, bytes]] = []

    def ends(self, which: bool) -> tuple[End, End]:
        return (self.client, self.server) if which else (self.server, self.client)

    def deliver(self, receiver: End, data: bytes) -> None:
        receiver.take(data)
        self.seen.append((receiver, data))

    @rule(
        which=st.booleans(), content=st.binary(min_size=1, max_size=60), cuts=st.lists(st.integers(0, 60), max_size=4)
    )
    def send(self, which: bool, content: bytes, cuts: list[int]) -> None:
        self.ends(which)[0].send(content, cuts)

    @precondition(lambda self: self.connected)
    @rule(which=st.booleans(), count=st.integers(1, 8))
    def emit(self, which: bool, count: int) -> None:
        for _ in range(count):
            self.ends(which)[0].emit()

    @precondition(lambda self: self.connected)
    @rule(which=st.booleans(), count=st.integers(1, 8))
    def arrive(self, which: bool, count: int) -> None:
        sender, receiver = self.ends(which)
        for _ in range(min(count, len(sender.flying))):
            self.deliver(receiver, sender.flying.popleft())

    @rule(which=st.booleans(), data=st.data(), count=st.integers(1, 4))
    def arrive_late(self, which: bool, data: st.DataObject, count: int) -> None:
        """Deliver the next frames of an old connection."""
        sender, receiver = self.ends(which)
        sender.late = [late for late in sender.late if late]
        if sender.late:
            late = data.draw(st.sampled_from(sender.late))
            for _ in range(min(count, len(late))):
                self.deliver(receiver, late.popleft())

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def arrive_again(self, data: st.DataObject) -> None:
        receiver, frame = data.draw(st.sampled_from(self.seen[-20:]))
        before = receiver.stream.received
        receiver.take(frame)
        assert receiver.stream.received == before

    @precondition(lambda self: self.connected)
    @rule(client=st.booleans(), server=st.booleans())
    def cut(self, client: bool, server: bool) -> None:
        self.client.cut(noticed=client)
        self.server.cut(noticed=server)
        self.connected = False

    @precondition(lambda self: not self.connected)
    @rule(which=st.booleans(), data=st.data(), lost=st.booleans(), between=st.booleans())
    def connect(self, which: bool, data: st.DataObject, lost: bool, between: bool) -> None:
        position = Position.parse(str(self.client.stream.received))
        if between:
            self.arrive_late(which, data, 3)
        self.server.connection = self.server.stream.connect(position)
        self.server.frames = self.server.stream.frames(self.server.connection)
        welcome = read_frame(make_welcome(bytes(32), self.server.stream.received))
        if lost:  # the welcome does not arrive
            self.server.cut(noticed=between)
            return
        if between:
            self.arrive_late(which, data, 3)
        self.client.connection = self.client.stream.connect(read_welcome(welcome)[1])
        self.client.frames = self.client.stream.frames(self.client.connection)
        self.connected = True
        for end in (self.client, self.server):
            assert not end.flying
            for old in end.ended:
                assert next(old, None) is None  # it has ended
            end.ended = []

    @invariant()
    def nothing_twice_and_in_order(self) -> None:
        if hasattr(self, "client"):
            assert self.server.received == self.client.sent[: len(self.server.received)]
            assert self.client.received == self.server.sent[: len(self.client.received)]

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            return
        if self.connected:
            self.cut(True, True)
        position = self.client.stream.received
        for end, other in ((self.server, position), (self.client, self.server.stream.received)):
            end.connection = end.stream.connect(other)
            end.frames = end.stream.frames(end.connection)
        most = sum(len(content) // FRAME_BYTES + 2 for end in (self.client, self.server) for content in end.sent) + 2
        for _ in range(most):
            for sender, receiver in (self.ends(True), self.ends(False)):
                sender.emit()
                receiver.take(sender.flying.popleft())
        assert self.server.received == self.client.sent
        assert self.client.received == self.server.sent
        for end in (self.client, self.server):
            assert end.freed() == len(end.sent)
            assert end.stream.disconnect(end.connection)


Network.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_network = Network.TestCase


# --- what a stream refuses ---


def connected(received: Position | None = None) -> tuple[Stream, Iterator[bytes]]:
    stream = Stream(FRAME_BYTES, MAX_BYTES)
    return stream, stream.frames(stream.connect(received or Position()))


def test_a_message_is_cut_into_full_frames_and_kept_until_it_is_acknowledged() -> None:
    stream, frames = connected()
    memory = bytearray(b"0123456789abcdefXYZ")
    stream.send([memoryview(memory)[:3], b"", memoryview(memory)[3:17], memoryview(memory)[17:]])
    got = [fields(read_frame(next(frames))) for _ in range(3)]
    assert got == [
        (Kind.DATA, 0, 1, 0, 19, b"01234567"),
        (Kind.DATA, 1, 1, 0, 19, b"89abcdef"),
        (Kind.DATA, 2, 1, 0, 19, b"XYZ"),
    ]
    with pytest.raises(BufferError):
        memory.clear()
    assert stream.receive(acknowledgement(1)) is None
    memory.clear()


def test_a_message_is_freed_as_a_whole_not_before_the_one_in_front() -> None:
    stream, frames = connected()
    memories = [bytearray(b"x"), bytearray(b"y" * FRAME_BYTES), bytearray(b"z")]
    for memory in memories:
        stream.send([memoryview(memory)])
    for _ in memories:
        next(frames)
    stream.receive(acknowledgement(2))
    for memory in memories[:2]:
        memory.clear()
    with pytest.raises(BufferError):
        memories[2].clear()
    stream.receive(acknowledgement(1))  # late; it says nothing new
    stream.receive(acknowledgement(3))
    memories[2].clear()


def test_a_message_of_no_bytes_cannot_be_sent() -> None:
    stream, frames = connected()
    empty: list[list[Buffer]] = [[], [b"", memoryview(b"")]]
    for parts in empty:
        with pytest.raises(ValueError, match="without a byte"):
            stream.send(parts)
    stream.send([b"next"])
    assert read_frame(next(frames)).message == 1


def test_a_message_that_is_too_long_is_refused_at_both_ends() -> None:
    stream, frames = connected()
    with pytest.raises(ValueError, match=r"101 bytes cannot be sent; it must be at most 100 \(max_message_mib\)"):
        stream.send([bytes(50), bytes(51)])
    stream.send([bytes(50), bytes(50)])
    frame = read_frame(next(frames))
    assert (frame.message, frame.total) == (1, 100)
    with pytest.raises(ReplyError, match="101 bytes was announced; 100 are allowed"):
        stream.receive(data_frame(bytes(8), total=101))
    assert stream.received == Position()
    assert stream.receive(data_frame(bytes(8), total=100)) is None
    assert stream.received == Position(0, 1)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (data_frame(b"x" * 8, part=1, total=19), "goes on as one of 19"),
        (data_frame(b"x" * 8, part=1, total=21), "goes on as one of 21"),
        (data_frame(b"x" * 7, part=1, total=20), "part 1.1 of a message of 20 bytes has 7 bytes"),
        (data_frame(b"x" * 9, part=1, total=20), "has 9 bytes"),
        (data_frame(b"x" * 4, part=2, total=20), "part 1.2 was received where 1.1 was due"),
        (data_frame(b"x" * 8, message=2, total=20), "part 2.0 was received where 1.1 was due"),
        (data_frame(b"x" * 8, part=1, total=20, acked=1), "message 1 was acknowledged; only 0 were sent"),
        (acknowledgement(1), "message 1 was acknowledged; only 0 were sent"),
        (acknowledgement(2**64 - 1), "was acknowledged"),
    ],
)
def test_a_frame_that_cannot_follow_is_refused_and_nothing_of_it_taken_in(wrong: Frame, reason: str) -> None:
    stream, _ = connected()
    assert stream.receive(data_frame(b"abcdefgh", total=20)) is None
    for _ in range(2):
        with pytest.raises(ReplyError, match=reason):
            stream.receive(wrong)
        assert stream.received == Position(0, 1)
    assert stream.receive(data_frame(b"ijklmnop", part=1, total=20)) is None
    chunks = stream.receive(data_frame(b"qrst", part=2, total=20))
    assert chunks == [b"abcdefgh", b"ijklmnop", b"qrst"]
    assert stream.received == Position(1)


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (data_frame(b"x" * 7, total=20), "has 7 bytes"),
        (data_frame(b"x" * 9, total=20), "has 9 bytes"),
        (data_frame(b"x" * 3, part=1, total=11), "part 1.1 was received where 1.0 was due"),
        (data_frame(message=2), "part 2.0 was received where 1.0 was due"),
    ],
)
def test_a_first_part_is_checked_as_well(first: Frame, reason: str) -> None:
    stream, _ = connected()
    with pytest.raises(ReplyError, match=reason):
        stream.receive(first)
    assert stream.receive(data_frame()) == [b"abc"]


@pytest.mark.parametrize(
    "claimed", [Position(0), Position(1), Position(1, 3), Position(2, 1), Position(3, 0), Position(2**63, 10**10)]
)
def test_an_end_cannot_be_where_it_never_was(claimed: Position) -> None:
    """Two messages of three parts were sent, of which the first was acknowledged."""
    stream, frames = connected()
    stream.send([bytes(20)])
    stream.send([bytes(20)])
    for _ in range(6):
        next(frames)
    stream.receive(acknowledgement(1))
    if claimed == Position(1):
        stream.connect(claimed)
        return
    with pytest.raises(ReplyError, match=r"^the other end claims"):
        stream.connect(claimed)
    stream.acknowledge()
    assert read_frame(next(frames)).kind == Kind.ACKNOWLEDGEMENT  # the old connection stands, and goes on where it was


def test_a_message_goes_on_at_the_part_that_the_other_end_has_reached() -> None:
    stream, frames = connected()
    stream.send([b"0123456789abcdefXYZ"])
    for _ in range(3):
        next(frames)
    again = stream.frames(stream.connect(Position(0, 2)))
    frame = read_frame(next(again))
    assert (frame.message, frame.part, bytes(frame.payload)) == (1, 2, b"XYZ")
    once_more = stream.frames(stream.connect(Position(0, 0)))
    assert [read_frame(next(once_more)).part for _ in range(3)] == [0, 1, 2]


def test_what_arrived_after_all_is_not_sent_again() -> None:
    """The other end told where it was, and then received more of what was still on its way."""
    stream, _ = connected()
    for content in (b"a", b"b" * 20, b"c"):
        stream.send([content])
    frames = stream.frames(stream.connect(Position(0)))
    stream.receive(acknowledgement(1))
    assert read_frame(next(frames)).message == 2
    stream.receive(acknowledgement(2))
    assert read_frame(next(frames)).message == 3
    stream.receive(acknowledgement(3))
    stream.acknowledge()
    assert read_frame(next(frames)).kind == Kind.ACKNOWLEDGEMENT


def test_a_long_message_is_acknowledged_at_once_a_short_one_by_the_next_frame() -> None:
    stream, frames = connected()
    stream.receive(data_frame(b"abcdefgh", total=11))
    stream.receive(data_frame(b"ijk", part=1, total=11))
    assert fields(read_frame(next(frames))) == (Kind.ACKNOWLEDGEMENT, 0, 0, 1, 0, b"")
    stream.receive(data_frame(message=2))
    stream.send([b"answer"])
    assert read_frame(next(frames)).acknowledged == 2


def test_the_farewell_comes_after_all_that_was_queued_and_nothing_after_it() -> None:
    stream, frames = connected()
    stream.send([bytes(9)])
    stream.finish("ä" * FAREWELL_BYTES)
    stream.send([b"x"])
    stream.acknowledge()
    got = [read_frame(frame) for frame in frames]
    assert [(frame.kind, frame.message, frame.part) for frame in got] == [
        (Kind.DATA, 1, 0),
        (Kind.DATA, 1, 1),
        (Kind.DATA, 2, 0),
        (Kind.FAREWELL, 0, 0),
    ]
    assert bytes(got[-1].payload).decode() == "ä" * (FAREWELL_BYTES // 2)  # cut between two characters
    again = stream.frames(stream.connect(Position(1)))  # it did not arrive: once more
    assert [read_frame(frame).kind for frame in again] == [Kind.DATA, Kind.FAREWELL]


# --- threads ---


class Worker(threading.Thread):
    """Collects frames; fails the test, rather than hanging it, when they do not end."""

    def __init__(self, stream: Stream, connection: int, keep: Callable[[bytes], None]) -> None:
        super().__init__(daemon=True)
        self._frames, self._keep = stream.frames(connection), keep
        self.start()

    def run(self) -> None:
        for frame in self._frames:
            self._keep(frame)

    def finished(self) -> bool:
        self.join(PATIENCE_S)
        return not self.is_alive()


class Frames:
    """Frames that were emitted, to be waited for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._got: list[Frame] = []

    def add(self, data: bytes) -> None:
        with self._changed:
            self._got.append(read_frame(data))
            self._changed.notify_all()

    def first(self, count: int) -> list[Frame]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._got) >= count, PATIENCE_S)
            return self._got[:count]


def wakes(stream: Stream, act: Callable[[], object], idle: Frames) -> None:
    """Do something while a thread waits in `frames`, which must end it or make it go on."""
    stream.acknowledge()
    idle.first(1)  # the thread is there, and waits for the next
    act()


@pytest.mark.parametrize("end", ["disconnect", "connect", "finish"])
def test_waiting_frames_end_with_their_connection(end: str) -> None:
    stream, got = Stream(FRAME_BYTES, MAX_BYTES), Frames()
    connection = stream.connect(Position())
    worker = Worker(stream, connection, got.add)
    acts: dict[str, Callable[[], object]] = {
        "disconnect": lambda: stream.disconnect(connection),
        "connect": lambda: stream.connect(Position()),
        "finish": lambda: stream.finish("bye"),
    }
    wakes(stream, acts[end], got)
    assert worker.finished()
    assert not stream.disconnect(connection) or end == "finish"


def test_waiting_frames_go_on_with_a_message_and_with_a_long_one_that_arrived() -> None:
    stream, got = Stream(FRAME_BYTES, MAX_BYTES), Frames()
    connection = stream.connect(Position())
    worker = Worker(stream, connection, got.add)
    wakes(stream, lambda: stream.send([b"hello"]), got)
    assert bytes(got.first(2)[1].payload) == b"hello"
    stream.receive(data_frame(bytes(8), total=9))
    stream.receive(data_frame(b"x", part=1, total=9))
    assert fields(got.first(3)[2]) == (Kind.ACKNOWLEDGEMENT, 0, 0, 1, 0, b"")
    stream.disconnect(connection)
    assert worker.finished()


def test_two_ends_in_threads_with_many_cuts() -> None:
    """Both send from threads of their own while their connection is cut and made again."""
    ends = [Stream(64, 10_000), Stream(64, 10_000)]
    results: list[list[bytes]] = [[], []]
    messages = [[bytes([side]) * (1 + (37 * n) % 900) for n in range(300)] for side in range(2)]
    locks = [threading.Lock(), threading.Lock()]
    errors: list[BaseException] = []

    def carry(receiver: int, data: bytes) -> None:
        try:
            with locks[receiver]:
                chunks = ends[receiver].receive(read_frame(data))
                if chunks is not None:
                    results[receiver].append(b"".join(chunks))
        except ReplyError as error:
            errors.append(error)

    def send(side: int) -> None:
        for content in messages[side]:
            ends[side].send([content])

    def keeper(receiver: int) -> Callable[[bytes], None]:
        return lambda data: carry(receiver, data)

    senders = [threading.Thread(target=send, args=(side,), daemon=True) for side in range(2)]
    for sender in senders:
        sender.start()
    workers: list[Worker] = []
    for attempt in range(60):
        numbers = [ends[side].connect(ends[1 - side].received) for side in range(2)]
        workers += [Worker(ends[side], numbers[side], keeper(1 - side)) for side in range(2)]
        if attempt < 59:
            threading.Event().wait(0.002)
            for side in range(2):
                ends[side].disconnect(numbers[side])
    for sender in senders:
        sender.join(PATIENCE_S)
    for end in ends:
        end.finish("done")
    assert all(worker.finished() for worker in workers[-2:])
    for end, number in zip(ends, numbers, strict=True):
        end.disconnect(number)
    assert all(worker.finished() for worker in workers)
    assert not errors
    assert results == [messages[1], messages[0]]


def test_chunks_are_buffers() -> None:
    stream, _ = connected()
    chunks: list[Buffer] | None = stream.receive(data_frame())
    assert chunks is not None
    assert isinstance(chunks[0], memoryview)
    assert chunks[0].readonly
