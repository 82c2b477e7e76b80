"""Faults injected on live client processes; each is ended by its own id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fl_edge.link.flower import identify_process
from fl_edge.link.resident import LinkConfig, ResidentGrid
from tests.flower_stub import ProcessFlower

identify_process(1)
PATIENCE_S = 60
QUICK = LinkConfig(grace_s=1.0, heartbeat_s=0.5)


def count(node: int) -> Message:
    return Message(RecordDict(), node, "query")


def sleep(node: int, seconds: float) -> Message:
    return Message(RecordDict({"order": ConfigRecord({"seconds": seconds})}), node, "train")


def told(reply: Message) -> tuple[int, int]:
    """Return (count, process id) of a reply."""
    record = reply.content.config_records["told"]
    return int(record["count"]), int(record["pid"])  # type: ignore[arg-type]


@pytest.fixture
def flower() -> Iterator[ProcessFlower]:
    with ProcessFlower(2) as made:
        yield made


def wait_for(process: subprocess.Popen[bytes]) -> int:
    return process.wait(PATIENCE_S)


def test_a_process_answers_all_messages_and_ends_with_the_grid(flower: ProcessFlower) -> None:
    with ResidentGrid(flower) as grid:
        replies = [grid.send_and_receive([count(1), count(2)], timeout=PATIENCE_S) for _ in range(3)]
        (failed,) = grid.send_and_receive([Message(RecordDict(), 1, "evaluate")], timeout=PATIENCE_S)
        assert (failed.error.code, failed.error.reason) == (2, "<class 'ZeroDivisionError'>:<'on request'>")
        processes = dict(flower.processes)
    assert [[told(reply) for reply in both] for both in replies] == [
        [(number, processes[1].pid), (number, processes[2].pid)] for number in (1, 2, 3)
    ]
    assert [wait_for(process) for process in processes.values()] == [0, 0]


def test_killed(flower: ProcessFlower) -> None:
    with ResidentGrid(flower, config=QUICK) as grid:
        before = [told(reply) for reply in grid.send_and_receive([count(1), count(2)], timeout=PATIENCE_S)]
        os.kill(flower.processes[1].pid, signal.SIGKILL)
        lost, good = grid.send_and_receive([count(1), count(2)], timeout=PATIENCE_S)
        assert (lost.error.code, lost.metadata.src_node_id) == (5, 1)
        assert "is not connected" in (lost.error.reason or "")
        assert told(good) == (2, before[1][1])
        # asked again, Flower is asked to invite it again, and another process comes
        (back,) = grid.send_and_receive([count(1)], timeout=PATIENCE_S)
        assert told(back) == (1, flower.processes[1].pid)
        assert told(back)[1] != before[0][1]
    assert len(flower.delivered) == 3


def test_killed_in_the_middle_of_its_work(flower: ProcessFlower) -> None:
    with ResidentGrid(flower, config=QUICK) as grid:
        grid.send_and_receive([count(1)], timeout=PATIENCE_S)
        threading.Timer(0.3, os.kill, (flower.processes[1].pid, signal.SIGKILL)).start()
        (lost,) = grid.send_and_receive([sleep(1, 60)], timeout=PATIENCE_S)
        assert lost.error.code == 5


def test_frozen_past_its_time_out_and_awake_again(flower: ProcessFlower) -> None:
    with ResidentGrid(flower, config=LinkConfig(grace_s=60)) as grid:
        grid.send_and_receive([count(1), count(2)], timeout=PATIENCE_S)
        frozen = psutil.Process(flower.processes[1].pid)
        frozen.suspend()
        asked = [count(1), count(2)]
        replies = grid.send_and_receive(asked, timeout=1.0)
        assert [reply.metadata.src_node_id for reply in replies] == [2]
        frozen.resume()
        # the late message is answered once, and the next finds the device where it was
        (reply,) = grid.send_and_receive([count(1)], timeout=PATIENCE_S)
        assert told(reply) == (3, frozen.pid)
        (late,) = grid.pull_messages([asked[0].metadata.message_id])
        assert told(late) == (2, frozen.pid)


def test_frozen_for_longer_than_a_session_lasts(flower: ProcessFlower) -> None:
    with ResidentGrid(flower, config=QUICK) as grid:
        grid.send_and_receive([count(1)], timeout=PATIENCE_S)
        old = flower.processes[1]
        os.kill(old.pid, signal.SIGSTOP)
        (lost,) = grid.send_and_receive([count(1)], timeout=PATIENCE_S)
        assert lost.error.code == 5
        (reply,) = grid.send_and_receive([count(1)], timeout=PATIENCE_S)
        assert told(reply) == (1, flower.processes[1].pid)
        # the old process wakes, is refused, and leaves without having touched anything
        os.kill(old.pid, signal.SIGCONT)
        assert wait_for(old) == 0
        (reply,) = grid.send_and_receive([count(1)], timeout=PATIENCE_S)
        assert told(reply) == (2, flower.processes[1].pid)


def test_a_client_notices_that_its_server_is_gone_and_leaves(flower: ProcessFlower) -> None:
    """The server is a process of its own, which gets killed."""
    script = "from tests.test_resident_faults import serve_until_killed\nserve_until_killed()\n"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        client = psutil.Process(int(server.stdout.readline()))
        server.kill()
    psutil.wait_procs([client], timeout=PATIENCE_S)
    assert not client.is_running()


def serve_until_killed() -> None:
    with ProcessFlower(1) as flower, ResidentGrid(flower, config=QUICK) as grid:
        (reply,) = grid.send_and_receive([count(1)], timeout=PATIENCE_S)
        sys.stdout.write(f"{told(reply)[1]}\n")
        sys.stdout.flush()
        time.sleep(PATIENCE_S)
