"""The rooms of the real-time benchmark at tiny size, in threads of this process: the whole model's text, held times."""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import Results
from benchmarks.hat_real import CASES, ratios, targets
from benchmarks.hat_real_cloud import pack, serve, unpack
from benchmarks.hat_real_devices import Asked, Order, drive
from benchmarks.hat_real_held import Pipeline, Processor, hold
from fl_edge.hat.config import HatConfig
from fl_edge.hat.messages import Upload
from fl_edge.hat.simulated_cloud import StageDelay
from fl_edge.hat.simulated_device import Device, Shape
from fl_edge.hat.split import load_middle
from fl_edge.hat.wire import write_upload
from tests.tiny_hat import CPU, draw_tokens
from tests.tiny_hat_site import Site

SHAPE = Shape(32, 64, 6, 64, 2, 1e4)
FAST = Device(1e9, 1e10, 1e7, 1e7, latency_s=1e-4)
NEW = 6


def _digest(text: list[int]) -> str:
    return hashlib.blake2b(repr(text).encode(), digest_size=4).hexdigest()


def _cloud(folder: Path) -> tuple[threading.Thread, Connection, Connection]:
    """Return a cloud with memory for one request, and the other ends of its device's way and of its control."""
    (device, way), (control, to_cloud) = Pipe(), Pipe()
    middle = functools.partial(load_middle, folder, 2, CPU)
    run = functools.partial(serve, middle, 32, StageDelay(0.0, 0.0), 1, [way], to_cloud, None)
    room = threading.Thread(target=run, daemon=True)
    room.start()
    return room, device, control


@pytest.fixture
def switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def test_what_is_packed_comes_back() -> None:
    head = {"due": 1.5, "upload": {"request": 3}}
    tensors = {"rows": torch.randn(3, 4), "few": torch.zeros(0, 4, dtype=torch.int8)}
    said, found = unpack(pack(head, tensors))
    assert said == head
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_a_pipeline_takes_a_batch_a_stage_and_gives_it_out_after_all() -> None:
    line = Pipeline(StageDelay(10.0, 1.0, 4), 3)
    now = time.monotonic()
    assert line.enter(now, 4) == pytest.approx(now + 30)
    assert line.free == pytest.approx(now + 10)
    assert line.enter(now + 10, 6) == pytest.approx(now + 46)  # 12 s in each stage
    assert line.enter(now + 22, 1) == pytest.approx(now + 56)  # behind the longer one
    assert (line.batches, line.tokens, line.over_s) == (3, 11, 0.0)


def test_what_is_held_is_not_there_before_its_time(tmp_path: Path) -> None:
    model = Site(tmp_path, "llama").device
    processor = Processor(SHAPE, Device(1e6, 1e12, 1.0, 1.0))
    held = hold(model, processor, {"draft_head": 2.5e4})
    features = torch.zeros(1, 32, dtype=torch.float64)
    started = time.monotonic()
    found = held.draft_head(features)
    assert time.monotonic() - started >= 0.05  # 25000 weights of 2 bytes at 1 MB/s
    assert torch.equal(found, model.draft_head(features))
    assert processor.held_s == pytest.approx(0.05)
    assert "draft_head" not in vars(model)


@pytest.mark.usefixtures("switching")
def test_devices_and_cloud_give_the_whole_models_text(tmp_path: Path) -> None:
    site = Site(tmp_path, "llama")
    prompts = [draw_tokens(1, 20 + number, number)[0] for number in range(3)]
    ways = [Pipe() for _ in range(2)]
    cloud, to_cloud = Pipe()
    devices, to_devices = Pipe()
    middle = functools.partial(load_middle, tmp_path, 2, CPU)
    parts = {"model": site.device, "adapter": site.adapter}
    runs = {
        to_cloud: functools.partial(serve, middle, 128, StageDelay(1e-3, 0.0), 2, [way for way, _ in ways]),
        to_devices: functools.partial(drive, lambda: parts, SHAPE, 128, [way for _, way in ways]),
    }
    rooms = [threading.Thread(target=run, args=(end, None), daemon=True) for end, run in runs.items()]
    for room in rooms:
        room.start()
    assert (cloud.recv(), devices.recv()) == ("ready", "ready")
    asked = [
        [Asked(0, 0.0, prompts[0].tolist(), FAST), Asked(2, 0.1, prompts[2].tolist(), FAST)],
        [Asked(1, 0.0, prompts[1].tolist(), FAST)],
    ]
    methods: dict[str, dict[str, Any]] = {"adapter": {"chunking": "r1"}, "": {"chunking": "none"}}
    texts = []
    for drafts, settings in methods.items():
        cloud.send((512, 0))
        cloud.recv()
        config = HatConfig(new_tokens=NEW, shortest_chunk=4, longest_chunk=8, **settings)
        devices.send(Order(drafts, config, asked, time.monotonic()))
        found = devices.recv()
        cloud.send("account")
        account = cloud.recv()
        records = sorted(found["records"], key=lambda each: each["number"])
        assert [each["number"] for each in records] == [0, 1, 2]
        assert account["rows"] >= sum(map(len, prompts)) + 3 * (NEW - 1)
        assert all(each["paced_up"] >= (each["prompt"] + NEW - 1) * SHAPE.row_bytes for each in records)
        assert found["held_s"] > 0
        texts.append([each["text"] for each in records])
    for end in (cloud, devices):
        end.send(None)
    for room in rooms:
        room.join()
    assert texts == [[_digest(site.expected(prompt, NEW)) for prompt in prompts]] * 2


def test_a_cloud_that_stops_waits_for_ends_that_are_under_way(tmp_path: Path) -> None:
    """There is memory for one request: if the first cloud left its own there, the next one could not take any."""
    site = Site(tmp_path, "llama")
    room, device, control = _cloud(tmp_path)
    assert control.recv() == "ready"
    rows = site.device.embed_and_run(draw_tokens(1, 5, 0))[0].float()
    for number in range(2):
        control.send((512, 0))
        assert control.recv() == "ready"
        plain, tensors = write_upload(Upload(number, 0, rows))
        device.send_bytes(pack({"due": 0.0, "upload": plain}, tensors))
        head, _ = unpack(device.recv_bytes())
        assert head["answer"]["request"] == number
        control.send("account")
        assert not control.poll(0.05)
        device.send_bytes(pack({"due": 0.0, "end": number}, {}))
        assert control.recv()["batches"] == 1
    control.send(None)
    room.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_waits_for_a_cloud_that_fails_hears_of_it(tmp_path: Path) -> None:
    Site(tmp_path, "llama")
    room, device, control = _cloud(tmp_path)
    control.recv()
    control.send((512, 0))
    control.recv()
    device.send_bytes(pack({"due": 0.0, "upload": {}}, {}))  # nothing that a cloud could read
    for end in (device, control):
        with pytest.raises(EOFError):
            end.recv_bytes()
    room.join()


def test_targets_are_the_issues_lines() -> None:
    assert len(targets(Results([], {}, {}))) == 9
    assert not any(line.holds for line in targets(Results([], {}, {})))
    raw = [{"case": case.name, "seed": 0, "repetition": 0, "values": {"texts": "a b"}} for case in CASES]
    summary = {case.name: {"ttft_ms": {"median": 9.0}, "tbt_ms": {"median": 9.0}} for case in CASES}
    summary["real: HAT, threshold 0.3"] = {"ttft_ms": {"median": 4.0}, "tbt_ms": {"median": 2.0}}
    lines = {line.measure: line for line in targets(Results(raw, summary, {}))}
    assert lines["real run, TTFT: HAT below U-shape, %"].holds
    assert lines["real run, TBT: HAT below U-Medusa, %"].holds
    assert lines["real run: requests with other tokens"].value == 0


def test_the_ratios_are_the_papers() -> None:
    found = ratios()
    assert found["upload of a prompt, s"] == pytest.approx(1036.6 * 10240 / 9.8e6, rel=0.03)
    assert 0.2 < found["share of a stage that whole prompts take"] < 0.3
