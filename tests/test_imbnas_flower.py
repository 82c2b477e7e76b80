"""IMB-NAS over Flower: what devices find together is what one machine finds that has all of their images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fl_edge.data.images import ImageSet
from fl_edge.errors import ConfigError, DataError, TrainingError
from fl_edge.imbnas.federation import read_head
from fl_edge.imbnas.report import FIXED, FOUND, UNADAPTED, ImbNasRound
from fl_edge.imbnas.scoring import Scorer
from fl_edge.imbnas.search import evolve, winner
from fl_edge.link import LocalGrid
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.faults import Fault
from fl_edge.link.resident.staying import staying
from tests.tiny import same_bits
from tests.tiny_imbnas import BRIEF, SEED, SPACE, Site, central, digits, source, union


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "cache")


def assert_central(strategy: Any, name: str, scorer: Scorer, validation: ImageSet) -> None:
    """The whole history is that of a search on one machine: same candidates, same scores, same winner."""
    found = strategy.report.histories[name]
    expected = evolve(SPACE, scorer.on(validation), BRIEF.search, SEED)
    assert [entry.architecture for entry in found] == [entry.architecture for entry in expected]
    assert [entry.score for entry in found] == [entry.score for entry in expected]
    assert winner(found) == winner(expected)


@pytest.mark.parametrize("procedure", ["own", "P1"])
def test_devices_find_what_one_machine_finds(site: Site, procedure: str) -> None:
    """Federated score = centralised score, exactly (test 10), with and without adaptation."""
    strategy = site.strategy(procedure=procedure, final_rounds=0)
    strategy.start(LocalGrid(site.app(), 3))
    head = read_head(strategy.head) if procedure == "P1" else None
    assert_central(strategy, "search", central(procedure, head), union()[1])
    assert_central(strategy, "search P0", central("P0", source().head), union()[1])
    phases = [row.phase for row in site.rounds]
    assert phases == ["head"] * (2 if procedure == "P1" else 0) + ["search"] * 2 + ["search P0"] * 2
    assert strategy.report.counts[9] == 0
    assert not strategy.report.lost


def test_batch_by_batch_statistics_take_one_exchange(site: Site) -> None:
    kinds = list[str]()
    app = site.app()

    def listening(message: Message, context: Any) -> Message:
        kinds.append(str(config_of(message).get("kind")))
        return app(message, context)

    batchwise = replace(BRIEF.batchnorm, layerwise=False)
    strategy = site.strategy(procedure="P1", final_rounds=0, compare=False, batchnorm=batchwise)
    strategy.start(LocalGrid(listening, 3))  # type: ignore[arg-type]
    assert kinds.count("moments") == kinds.count("accuracy") == 2 * 3
    assert 0 < strategy.report.winner.score <= 1


def test_only_the_head_travels_in_p1(site: Site) -> None:
    app, head, kept = site.app(), list[dict[str, Tensor]](), list[int]()

    def listening(message: Message, context: Any) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train.imbnas_head" and "missing" not in config_of(reply):
            head.extend([tensors_of(message), tensors_of(reply)])
        kept.append(message.metadata.message_type == "query.imbnas_keep")
        return reply

    strategy = site.strategy(procedure="P1", final_rounds=0)
    backbone = {name: value.clone() for name, value in source().supernet.state_dict().items()}
    strategy.start(LocalGrid(listening, 3))  # type: ignore[arg-type]
    assert len(head) == 2 * 2 * 3
    for tensors in head:
        assert {name: (value.shape, value.dtype) for name, value in tensors.items()} == {
            "weight": ((10, SPACE.features), torch.float32),
            "bias": ((10,), torch.float32),
        }
    assert sum(kept) == 3  # the super-network, once a device
    assert same_bits(backbone, dict(source().supernet.state_dict()))
    assert site.rounds[1].up_bytes == site.rounds[1].down_bytes == 3 * 4 * (10 * SPACE.features + 10)


def test_what_was_found_is_trained_beside_its_rivals_and_tested(site: Site) -> None:
    strategy = site.strategy(procedure="own", final_rounds=8, final=replace(BRIEF.final, epochs=64))
    report = strategy.start(LocalGrid(site.app(), 3))
    assert list(report.contenders) == [FOUND, UNADAPTED, FIXED]
    assert report.contenders[FIXED] == (0, 0, 0)
    for matrix in report.confusions.values():
        assert matrix.sum(1).tolist() == digits()[1].label_counts().tolist()
    assert site.rounds[-1].accuracy == report.row(FOUND, tail())["balanced"]
    assert report.row(FIXED, tail())["balanced"] > 0.3
    assert all(matrix[:, 9].sum() == 0 for matrix in report.confusions.values())  # nobody has seen one
    row = site.rounds[-1]
    assert "training 8/8  loss " in row.line(strategy.rounds, 61)
    assert row.line(strategy.rounds, 61).endswith("left of it 1:01")
    assert ImbNasRound.from_record(row.to_record()) == row
    assert report.summary(tail())["contenders"][FOUND]["blocks"]


def tail() -> Any:
    from fl_edge.imbnas.config import TailConfig

    return TailConfig()


def everything(strategy: Any) -> tuple[dict[str, Tensor], Any]:
    tensors, record = strategy.snapshot()
    return tensors, {name: value for name, value in record.items() if not name.endswith("_bytes")}


@pytest.mark.parametrize("procedure", ["own", "P1"])
def test_a_process_a_message_ends_with_the_bits_of_one_that_stays(site: Site, procedure: str) -> None:
    def run(app: Any) -> Any:
        strategy = site.strategy(procedure=procedure)
        strategy.start(LocalGrid(app, 3))
        return everything(strategy)

    with staying():
        stayed = run(site.app())
    assert not site.cache.folder.exists()
    fresh = run(site.anew())
    assert not list(site.cache.folder.glob("*/*.safetensors"))  # forgotten at the end
    assert same_bits(stayed[0], fresh[0])
    assert stayed[1] == fresh[1]


def test_it_goes_on_where_it_was_killed(site: Site) -> None:
    kept, strategy = list[Any](), site.strategy(procedure="P1")
    strategy.observers.append(lambda _row: kept.append(strategy.snapshot()))
    strategy.start(LocalGrid(site.app(), 3))
    for place in (0, 2, 4, 6):  # behind a round of the head, in each search, in the final training
        again = site.strategy(procedure="P1")
        again.restore(*kept[place])
        site.rounds.clear()
        again.start(LocalGrid(site.app(), 3))
        assert [row.server_round for row in site.rounds] == list(range(place + 2, len(kept) + 1))
        assert same_bits(again.snapshot()[0], strategy.snapshot()[0])
        assert all(
            torch.equal(one, two)
            for one, two in zip(again.report.confusions.values(), strategy.report.confusions.values(), strict=True)
        )


def test_a_device_that_is_lost_leaves_the_search_to_the_others(site: Site) -> None:
    def faults(message: Message, received: int) -> Fault | None:
        gone = message.metadata.dst_node_id == 2 and received >= 4
        return Fault(error="out of power") if gone else None

    strategy = site.strategy(procedure="own")
    report = strategy.start(LocalGrid(site.app(), 3, faults=faults))
    assert list(report.lost) == ["device-1"]
    assert "out of power" in report.lost["device-1"]
    assert_central(strategy, "search", central("own", None, (0, 2)), union((0, 2))[1])
    assert [row.devices for row in site.rounds] == [2] * 6


def test_a_device_that_misses_a_round_of_training_is_back_in_the_next(site: Site) -> None:
    missed = list[int]()

    def faults(message: Message, received: int) -> Fault | None:
        first = message.metadata.message_type == "train.imbnas_networks" and message.metadata.dst_node_id == 1
        if first and not missed:
            missed.append(received)
            return Fault(error="out of power")
        return None

    strategy = site.strategy(procedure="own")
    strategy.start(LocalGrid(site.app(), 3, faults=faults))
    assert [row.devices for row in site.rounds if row.phase == "training"] == [2, 3]
    assert "out of power" in site.rounds[-2].absent["device-0"]


def forged(site: Site, kind: str, change: Any) -> Any:
    """Return an app whose second device forges its answers of one kind."""
    app = site.app()

    def answer(message: Message, context: Any) -> Message:
        reply = app(message, context)
        said, tensors = config_of(reply), tensors_of(reply)
        asked = config_of(message).get("kind", message.metadata.message_type)
        if asked != kind or context.node_id != 2 or "missing" in said or "refused" in said:
            return reply
        change(said, tensors)
        return Message(make_content(said, tensors), reply_to=message)

    return answer


def nan(_said: Any, tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor[:1] = torch.nan


def cut(_said: Any, tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name] = tensors[name][:-1].clone()


def boast(_said: Any, tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.add_(1)


def negative(_said: Any, tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.mul_(-1)


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("moments", nan, "candidate 0 is not all finite"),
        ("moments", cut, "has not the 9 numbers that are due"),
        ("moments", negative, "a count or a sum of squares below 0"),
        ("slope", nan, "candidate 0 is not all finite"),
        ("gram", cut, "has not the 81 numbers that are due"),
        ("probability", boast, "is not one of the 25 images it has"),
    ],
)
def test_forged_sums_leave_their_device_out(site: Site, kind: str, change: Any, says: str) -> None:
    strategy = site.strategy(procedure="own", final_rounds=0, compare=False)
    report = strategy.start(LocalGrid(forged(site, kind, change), 3))
    assert list(report.lost) == ["device-1"]
    assert says in report.lost["device-1"]
    assert "\n" not in report.lost["device-1"]
    assert_central(strategy, "search", central("own", None, (0, 2)), union((0, 2))[1])


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("train.imbnas_head", nan, "is not all finite numbers"),
        ("train.imbnas_head", cut, "due is torch.float32 of"),
        ("train.imbnas_networks", nan, "is not all finite numbers"),
        ("train.imbnas_networks", lambda said, _: said.update(samples=10**6), "it says it trained on 1000000 images"),
        ("train.imbnas_networks", lambda said, _: said.update(losses=[float("nan")]), "with losses [nan]"),
    ],
)
def test_a_forged_round_of_training_does_not_count(site: Site, kind: str, change: Any, says: str) -> None:
    strategy = site.strategy(procedure="P1")
    strategy.start(LocalGrid(forged(site, kind, change), 3))
    rows = [row for row in site.rounds if row.phase == ("head" if "head" in kind else "training")]
    assert all(row.devices == 2 and says in row.absent["device-1"] for row in rows)
    assert all(bool(torch.isfinite(value).all()) for value in strategy.snapshot()[0].values())


def test_a_super_network_other_than_announced_is_refused(site: Site) -> None:
    app = site.app()

    def tampered(message: Message, context: Any) -> Any:
        if message.metadata.message_type == "query.imbnas_keep" and context.node_id == 2:
            tensors = {name: value + 1 for name, value in tensors_of(message).items()}
            content = make_content(config_of(message), tensors)
            message.content.array_records.update(content.array_records)
        return app(message, context)

    strategy = site.strategy(procedure="own", final_rounds=0, compare=False)
    report = strategy.start(LocalGrid(tampered, 3))  # type: ignore[arg-type]
    assert list(report.lost) == ["device-1"]
    assert "device-1 was sent a super-network whose hash is not " in report.lost["device-1"]


def test_devices_of_another_task_take_no_part(site: Site) -> None:
    own = site.work[1]
    site.work[1] = replace(own, train=replace(own.train, classes=list("abcdefghij")))
    wide = replace(site.work[2].train, images=site.work[2].train.images.repeat(1, 3, 1, 1))
    site.work[2] = replace(site.work[2], train=wide)
    strategy = site.strategy(procedure="own", final_rounds=0, compare=False)
    strategy.start(LocalGrid(site.app(), 3))
    assert [row.devices for row in site.rounds] == [1, 1]


def test_a_lost_file_is_sent_again(site: Site) -> None:
    app, sent = site.anew(), list[str]()

    def lossy(message: Message, context: Any) -> Any:
        sent.append(message.metadata.message_type)
        if len(sent) % 40 == 0:
            for file in site.cache.folder.glob("*/*.safetensors"):
                file.unlink()
        return app(message, context)

    strategy = site.strategy(procedure="own", final_rounds=0, compare=False)
    report = strategy.start(LocalGrid(lossy, 3))  # type: ignore[arg-type]
    assert not report.lost
    assert sent.count("query.imbnas_keep") > 3
    assert_central(strategy, "search", central("own", None), union()[1])


def test_what_cannot_be_searched_is_one_line(site: Site) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for part, name in (("validation", "validation"), ("train", "training")):
        work = site.work
        site.work = [replace(each, **{part: getattr(each, part).subset(none)}) for each in work]
        with pytest.raises(DataError, match=rf"^none of \d devices has {name} images; a search needs some$"):
            site.strategy().start(LocalGrid(site.app(), 3))
        site.work = work
    with pytest.raises(ConfigError, match="a limit of 5 multiply-adds is not allowed; the cheapest path"):
        site.strategy(limit=5)
    with pytest.raises(TrainingError, match=r"^2 devices are left and fewest=3 must be; the last that was lost is dev"):
        site.strategy(procedure="own", fewest=3).start(LocalGrid(forged(site, "gram", nan), 3))
    with pytest.raises(ConfigError, match="procedure=P9 is not allowed"):
        site.strategy(procedure="P9")
