"""HAT over Flower messages: many devices, the texts of the whole model, nothing but hidden states on the wire."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_edge.clients.hat import HatClient, HatWorkload
from fl_edge.clients.hat.client import STATE
from fl_edge.errors import TrainingError
from fl_edge.hat.account import HatReport
from fl_edge.hat.adapter import new_adapter
from fl_edge.hat.config import CloudConfig, HatConfig
from fl_edge.hat.split import load_device
from fl_edge.link import LocalGrid
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.faults import Fault
from fl_edge.link.resident.staying import staying
from fl_edge.seeding import torch_rng
from fl_edge.strategies.hat import Hat
from tests.tiny_hat import CPU, draw_tokens, load_whole, save_model

NEW, PROMPTS = 8, 2
CONFIG = HatConfig(new_tokens=NEW, threshold=0.0, shortest_chunk=4, longest_chunk=8)
CLOUD = CloudConfig(capacity=64, cache_tokens=64 * 8, batch_tokens=16)


class Devices:
    """Three devices with two prompts each, and a cloud, in this process."""

    def __init__(self, folder: Path) -> None:
        self.base = save_model(folder / "base")
        self.whole: Any = load_whole(self.base)
        self.texts: dict[tuple[str, int], list[int]] = {}
        self.told: list[tuple[str, int, str]] = []
        model = load_device(self.base, 2, CPU)
        adapter = new_adapter(model, torch_rng(0, "adapter")).double()
        self.work = [
            HatWorkload(
                device=f"device-{index}",
                model=model,
                adapter=adapter if index else None,
                prompt=self.prompts(index),
                hear=self.hear(f"device-{index}"),
                tell=lambda number, reason, name=f"device-{index}": self.told.append((name, number, reason)),  # type: ignore[misc]
                config=CONFIG,
            )
            for index in range(3)
        ]

    def prompts(self, index: int) -> Callable[[int], Tensor | None]:
        return lambda number: draw_tokens(1, 9 + 5 * index, seed=10 * index + number)[0] if number < PROMPTS else None

    def hear(self, device: str) -> Callable[[int, Any], None]:
        return lambda number, tokens: self.texts.setdefault((device, number), []).extend(tokens)

    def app(self) -> ClientApp:
        app = ClientApp()
        HatClient(lambda context: self.work[int(context.node_config["partition-id"])]).register(app)
        return app

    def run(self, app: Any = None, faults: Any = None, cloud: CloudConfig = CLOUD, shallow: int = 2) -> HatReport:
        grid = LocalGrid(app or self.app(), len(self.work), faults=faults)
        return Hat(self.base, shallow, cloud, patience_s=1, observers=[lambda *_: None]).start(grid)

    def expected(self, index: int, number: int) -> list[int]:
        prompt = self.work[index].prompt(number)
        assert prompt is not None
        found = self.whole.generate(
            prompt[None], max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return found[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    def check(self, *but: tuple[str, int]) -> None:
        wanted = {(f"device-{index}", number): self.expected(index, number) for index in range(3) for number in (0, 1)}
        assert self.texts == {place: text for place, text in wanted.items() if place not in but}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Devices:
    return Devices(tmp_path_factory.mktemp("site"))


@pytest.fixture
def devices(site: Devices) -> Devices:
    site.texts.clear()
    site.told.clear()
    return site


def test_every_device_gets_the_whole_models_texts(devices: Devices) -> None:
    report = devices.run()
    devices.check()
    assert not report.lost
    assert not report.refused
    assert {device: [each.tokens for each in accounts] for device, accounts in report.accounts.items()} == {
        f"device-{index}": [NEW, NEW] for index in range(3)
    }
    summary = report.summary()
    assert summary["requests"] == 6
    assert summary["tokens"] == 6 * NEW
    assert 1 <= summary["accept_length"] <= 7


@pytest.mark.parametrize("stay", [False, True], ids=["fresh processes", "one that stays"])
def test_texts_do_not_depend_on_the_process(devices: Devices, stay: bool) -> None:
    kept = devices.app()

    def call(message: Message, context: Context) -> Message:
        if not stay:
            return devices.app()(message, context)
        with staying():
            return kept(message, context)

    devices.run(call)
    devices.check()


def test_fresh_processes_know_what_was_measured_for_the_prompts_before(devices: Devices) -> None:
    measured: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def call(message: Message, context: Context) -> Message:
        reply = devices.app()(message, context)
        if STATE in context.state:
            noted = json.loads(str(context.state.config_records[STATE]["session"]))
            place = context.node_id, int(noted["request"])
            measured.setdefault(place, []).append(noted["measured"]["monitor"])
        return reply

    devices.run(call)
    for (_, request), noted in measured.items():
        assert (noted[0]["wait_s"] is None) == (request == 0)  # before the cloud has answered anything of the request
        assert noted[-1]["wait_s"] is not None
    assert len(measured) == len(devices.work) * PROMPTS


def test_no_token_is_on_the_wire(devices: Devices) -> None:
    """All that goes up is rows of hidden states, and numbers that count them."""
    app, numbers = devices.app(), list[Any]()

    def listening(message: Message, context: Context) -> Message:
        reply: Message = app(message, context)
        assert all(tensor.is_floating_point() for tensor in tensors_of(reply).values())
        said = config_of(reply)
        assert said.keys() <= {
            *("device", "model", "handled_s", "request", "base", "last", "verify", "parents", "kept"),
            *("account", "next", "end"),
        }
        assert not {"parents", "kept"} & said.keys()
        numbers.append(said.get("base"))
        return reply

    devices.run(listening)
    devices.check()
    assert len(numbers) > 6


def test_a_device_that_is_lost_does_not_harm_the_others(devices: Devices) -> None:
    def faults(message: Message, count: int) -> Fault | None:
        return Fault(drop=True) if message.metadata.dst_node_id == 2 and count == 4 else None

    report = devices.run(faults=faults)
    assert list(report.lost) == ["device-1"]
    assert [len(accounts) for accounts in report.accounts.values()] == [PROMPTS, 0, PROMPTS]
    begun = devices.texts.pop(("device-1", 0), [])
    assert begun == devices.expected(1, 0)[: len(begun)]
    devices.check(("device-1", 0), ("device-1", 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda config, _: config.update(base=config["base"] + 50), "request"),
        (lambda config, _: config.update(request="0"), "request='0' is not allowed"),
        (lambda _, tensors: tensors.update(rows=tensors["rows"][:, :5]), r"shape \(\d+, 5\)"),
        (lambda _, tensors: tensors["rows"].fill_(torch.nan), "not all finite"),
        (lambda _, tensors: tensors.clear(), "carries one tensor"),
    ],
)
def test_an_upload_that_cannot_be_costs_its_own_request_alone(
    devices: Devices, change: Callable[[dict[str, Any], dict[str, Tensor]], None], reason: str
) -> None:
    app, seen = devices.app(), 0

    def call(message: Message, context: Context) -> Message:
        nonlocal seen
        reply: Message = app(message, context)
        seen += context.node_id == 3
        if context.node_id != 3 or seen != 5:
            return reply
        config, tensors = config_of(reply), tensors_of(reply)
        change(config, tensors)
        return Message(make_content(config, tensors), reply_to=message)

    report = devices.run(call)
    (line,) = report.refused["device-2"]
    assert re.search(reason, line)
    assert [told[:2] for told in devices.told] == [("device-2", 0)]
    assert report.lost == {}
    begun = devices.texts.pop(("device-2", 0), [])
    assert len(begun) < NEW
    devices.check(("device-2", 0))


def test_a_full_cloud_refuses_and_goes_on(devices: Devices) -> None:
    report = devices.run(cloud=replace(CLOUD, cache_tokens=2 * 64))
    refused = {device: len(lines) for device, lines in report.refused.items()}
    assert refused
    assert all("try again later" in line for lines in report.refused.values() for line in lines)
    assert report.summary()["requests"] + sum(refused.values()) == 6
    for (device, number), text in devices.texts.items():
        assert text in ([], devices.expected(int(device[-1]), number))


def test_a_prompt_beyond_the_context_is_told_and_passed_over(devices: Devices) -> None:
    report = devices.run(cloud=replace(CLOUD, capacity=18, cache_tokens=18 * 8))
    assert {(device, number) for device, number, _ in devices.told} == {("device-2", 0), ("device-2", 1)}
    assert all("a prompt of 19 tokens" in reason for *_, reason in devices.told)
    assert report.accounts["device-2"] == []
    assert len(report.accounts["device-0"]) == PROMPTS


def test_devices_with_another_cut_take_no_part(devices: Devices) -> None:
    with pytest.raises(TrainingError, match=r"shallow \(2 and not 1\), weights differ"):
        devices.run(shallow=1)
