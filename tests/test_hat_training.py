"""The adapter's training as a federation: equal to one by hand, in any runtime; bad answers count for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_edge.clients.cache import WeightCache
from fl_edge.clients.hat import HatClient, HatWorkload
from fl_edge.errors import ReplyError, TrainingError
from fl_edge.hat.adapter import new_adapter
from fl_edge.hat.config import CloudConfig, HatConfig, TrainingConfig
from fl_edge.hat.distillation import Lessons, Likeness, compare, teach
from fl_edge.hat.federation import AdapterRound, Learned, course, fitted, learn
from fl_edge.hat.messages import Answer
from fl_edge.hat.split import load_device, load_middle
from fl_edge.hat.study import Study
from fl_edge.link import LocalGrid
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.resident.staying import staying
from fl_edge.models.averaging import weighted_mean
from fl_edge.seeding import derive_seed, torch_rng
from fl_edge.strategies.hat import Hat
from fl_edge.strategies.hat_training import HatTraining
from tests.tiny_hat import CPU, draw_tokens, save_model

DEVICES, SEED = 2, 7
CONFIG = TrainingConfig(rounds=2, steps=3, batch_size=2, rate=1e-2, held_out=0.25)
_SAID = {
    *("device", "model", "request", "base", "last", "verify", "end", "tokens", "loss", "handled_s"),
    *("before.agreement", "before.overlap", "before.loss"),
}
CLOUD = CloudConfig(capacity=64, cache_tokens=64 * 8, batch_tokens=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), dtype=torch.float32)


def texts(index: int) -> Tensor:
    return draw_tokens(4, 10 + index, seed=100 + index)


class Site:
    """Devices with texts and a prompt each, in this process."""

    def __init__(self, base: Path, cache: Path) -> None:
        self.base, self.cache, self.rounds = base, WeightCache(cache), list[AdapterRound]()
        model = load_device(base, 2, CPU)
        self.answers: dict[str, list[int]] = {}
        self.work = [
            HatWorkload(
                device=f"device-{index}",
                model=model,
                adapter=None,
                prompt=lambda number: draw_tokens()[0] if number == 0 else None,
                hear=self._hear(f"device-{index}"),
                config=HatConfig(new_tokens=6, threshold=0.0),
                texts=texts(index),
            )
            for index in range(DEVICES)
        ]

    def _hear(self, device: str) -> Callable[[int, Any], None]:
        return lambda _number, tokens: self.answers.setdefault(device, []).extend(tokens)

    def app(self) -> ClientApp:
        app = ClientApp()
        HatClient(lambda context: self.work[int(context.node_config["partition-id"])], cache=self.cache).register(app)
        return app

    def training(self, config: TrainingConfig = CONFIG) -> HatTraining:
        return HatTraining(
            self.base, 2, config, CLOUD, seed=SEED, patience_s=1, observers=[self.rounds.append], min_devices=DEVICES
        )


@pytest.fixture
def site(base: Path, tmp_path: Path) -> Site:
    return Site(base, tmp_path / "cache")


def by_hand(base: Path) -> dict[str, Tensor]:
    """The same training without messages, with the whole model as teacher."""
    device, middle = load_device(base, 2, CPU), load_middle(base, 2, CPU)
    lessons = [teach(device, middle, texts(index)) for index in range(DEVICES)]
    weights: dict[str, Tensor] = dict(new_adapter(device, torch_rng(SEED, "hat", "adapter")).state_dict())
    for number in (1, 2):
        seeds = [derive_seed(SEED, "hat", number, f"device-{index}") for index in range(DEVICES)]
        order = course(CONFIG, number)
        learned = [
            learn(device, weights, own, order, CONFIG.held_out, seed) for own, seed in zip(lessons, seeds, strict=True)
        ]
        weights = weighted_mean([(each.tokens, each.weights) for each in learned])
    return weights


def test_it_is_fedavg_over_lessons_of_the_whole_model(site: Site) -> None:
    training = site.training()
    found = training.start(LocalGrid(site.app(), DEVICES))
    for name, tensor in by_hand(site.base).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
    assert [report.server_round for report in site.rounds] == [1, 2]
    assert all(report.devices == DEVICES and not report.absent for report in site.rounds)
    assert site.rounds[1].line(2, 0.0).startswith("adapter   2/2  loss ")
    assert AdapterRound.from_record(site.rounds[1].to_record()) == site.rounds[1]


def test_a_process_a_message_ends_with_the_bits_of_one_that_stays(site: Site) -> None:
    with staying():
        stayed = site.training().start(LocalGrid(site.app(), DEVICES))
    assert not site.cache.folder.exists()

    def anew(message: Message, context: Any) -> Message:
        return site.app()(message, context)

    training = site.training()
    fresh = training.start(LocalGrid(anew, DEVICES))  # type: ignore[arg-type]
    assert all(torch.equal(fresh[name], tensor) for name, tensor in stayed.items())
    assert len(list(site.cache.folder.glob("*/*-lessons/*.safetensors"))) == sum(len(texts(i)) for i in range(DEVICES))


@pytest.mark.parametrize("stay", [True, False])
def test_devices_draft_with_what_they_are_handed(site: Site, stay: bool) -> None:
    app = site.app()

    def one(message: Message, context: Any) -> Message:
        if not stay:
            return site.app()(message, context)
        with staying():
            return app(message, context)

    grid = LocalGrid(one, DEVICES)  # type: ignore[arg-type]
    training = site.training()
    training.start(grid)
    training.hand_out(grid)
    assert not list(site.cache.folder.glob("*/*-lessons"))
    report = Hat(site.base, 2, CLOUD, patience_s=1, observers=[lambda *_: None]).start(grid)
    assert all(sum(account.drafted for account in accounts) > 0 for accounts in report.accounts.values())
    assert len(set(map(tuple, site.answers.values()))) == 1  # one prompt, one text
    assert not list(site.cache.folder.glob("*/*.safetensors"))


def test_no_token_is_on_the_wire(site: Site) -> None:
    app, seen = site.app(), list[Any]()

    def listening(message: Message, context: Any) -> Message:
        reply = app(message, context)
        seen.extend(tensors_of(each) for each in (message, reply))
        assert set(config_of(reply)) <= _SAID
        return reply

    site.training().start(LocalGrid(listening, DEVICES))  # type: ignore[arg-type]
    assert sum(map(len, seen)) > DEVICES
    assert all(tensor.is_floating_point() for tensors in seen for tensor in tensors.values())


def test_an_adapter_is_saved_and_trained_on(site: Site, tmp_path: Path) -> None:
    training = site.training()
    training.weights = {name: tensor + 0.5 for name, tensor in training.weights.items()}
    training.save(tmp_path / "adapter.safetensors")
    again = site.training()
    again.load(tmp_path / "adapter.safetensors")
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in training.weights.items())


def test_it_goes_on_where_it_was(site: Site) -> None:
    grid = LocalGrid(site.app(), DEVICES)
    whole = site.training().start(grid)
    halfway = site.training()
    kept: list[Any] = []
    halfway.observers = [lambda _report: kept.append(halfway.snapshot())]
    halfway.start(grid)
    again = site.training()
    again.restore(*kept[0])
    found = again.start(LocalGrid(site.app(), DEVICES))
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_what_a_device_breaks_is_written_down_and_the_others_go_on(site: Site) -> None:
    app = site.app()

    def broken(message: Message, context: Any) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train.hat_adapter" and context.node_config["partition-id"] == 1:
            weights = {name: tensor * torch.nan for name, tensor in tensors_of(reply).items()}
            return Message(make_content(config_of(reply), weights), reply_to=message)
        return reply

    training = site.training()
    training.start(LocalGrid(broken, DEVICES))  # type: ignore[arg-type]
    assert [report.devices for report in site.rounds] == [1, 1]
    assert all("not all finite" in report.absent["device-1"] for report in site.rounds)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in training.weights.values())


def test_a_device_without_text_takes_no_part(site: Site) -> None:
    site.work[0] = replace(site.work[0], texts=None)
    site.training().start(LocalGrid(site.app(), DEVICES))
    assert "no text" in site.rounds[0].absent["device-0"]
    assert site.rounds[0].devices == 1


def test_no_device_at_all_ends_it(site: Site) -> None:
    site.work = [replace(work, texts=texts(0)[:1]) for work in site.work]
    with pytest.raises(TrainingError, match=r"no device trained the adapter in 3 rounds; the last: 1 sequences"):
        site.training(replace(CONFIG, rounds=5)).start(LocalGrid(site.app(), DEVICES))


def test_training_brings_an_adapter_near_the_whole_model(base: Path) -> None:
    device, middle = load_device(base, 2, CPU), load_middle(base, 2, CPU)
    lessons = teach(device, middle, draw_tokens(8, 16, seed=5))
    weights = dict(new_adapter(device, torch_rng(0)).state_dict())
    order = course(TrainingConfig(rounds=1, steps=60, rate=3e-3, token_weight=1.0), 1)
    learned = learn(device, weights, lessons, order, 0.25, 0)
    test = Lessons(lessons.states[6:], lessons.rows[6:], lessons.mask[6:])
    after = compare(fitted(device, learned.weights), device, test, token_weight=1.0)
    assert after.loss < learned.before.loss
    assert learned.tokens == 6 * 16


def test_the_rate_falls_from_round_to_round() -> None:
    config = TrainingConfig(rounds=4, rate=1.0)
    assert [course(config, number).rate for number in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]


class TestStudy:
    """What is on disk is used if it can be."""

    def test_rows_that_do_not_fit_are_refused(self, base: Path) -> None:
        study = Study(load_device(base, 2, CPU), texts(0), None)
        with pytest.raises(ReplyError, match=r"rows of shape \(3, 32\) came for sequence 0; finite ones of \(10, 32\)"):
            study.take_in(Answer(0, torch.zeros(3, 32)))
        with pytest.raises(ReplyError, match="sequence 9"):
            study.take_in(Answer(9, torch.zeros(10, 32)))
        with pytest.raises(ReplyError, match="finite"):
            study.take_in(Answer(0, torch.full((10, 32), torch.nan)))
        with pytest.raises(ReplyError, match="missing for 4 of 4"):
            study.lessons()

    def test_damaged_files_are_asked_for_again(self, base: Path, tmp_path: Path) -> None:
        model = load_device(base, 2, CPU)
        study = Study(model, texts(0), tmp_path)
        for number in range(3):
            study.take_in(Answer(number, torch.full((10, 32), float(number))))
        (tmp_path / "0.safetensors").write_bytes(b"nonsense")
        study = Study(model, texts(0), tmp_path)
        upload = study.next()
        assert upload is not None
        assert (upload.request, upload.base, tuple(upload.rows.shape)) == (0, 0, (10, 32))
        study.take_in(Answer(0, torch.zeros(10, 32)))
        upload = study.next()
        assert upload is not None
        assert upload.request == 3
        study.take_in(Answer(3, torch.zeros(10, 32)))
        assert study.next() is None
        assert study.lessons().rows[:, 0, 0].tolist() == [0.0, 1.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 0}, "1 at least"),
        ({"tokens": "many"}, "must be a number"),
        ({"loss": float("inf")}, "loss=inf"),
        ({"before.agreement": -1.0}, "before.agreement=-1.0"),
    ],
)
def test_what_a_device_says_of_its_training_is_checked(change: dict[str, Any], reason: str) -> None:
    weights = {"a": torch.zeros(2)}
    config = Learned(weights, 5, Likeness(0.5, 0.4, 1.0), 0.9).to_config()
    assert Learned.checked(config, weights, weights).to_config() == config
    with pytest.raises(ReplyError, match=reason):
        Learned.checked({**config, **change}, weights, weights)


def test_weights_of_another_kind_are_refused() -> None:
    config = Learned({}, 5, Likeness(0.5, 0.4, 1.0), 0.9).to_config()
    with pytest.raises(ReplyError, match="weights of 0 tensors; the 1 of a were due"):
        Learned.checked(config, {}, {"a": torch.zeros(2)})
