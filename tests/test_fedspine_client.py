"""The client: every way to a pruned base gives the same bits, caches never cost a round, times follow the profile."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from torch import Tensor, nn

from fl_edge.clients.bases import STATE, PrunedBases
from fl_edge.errors import ConfigError, RunFolderError
from fl_edge.fedspine.costs import round_seconds, training_macs
from fl_edge.fedspine.lora import head_of
from fl_edge.fedspine.messages import Order, device_adapter, order_tensors
from fl_edge.fedspine.training import train_round
from fl_edge.link import LocalGrid
from fl_edge.link.content import config_of, make_content, tensors_of
from fl_edge.link.flower import identify_process
from fl_edge.link.resident.staying import staying
from fl_edge.pruning import Costs, PruningPlan, count_costs, full_plan, members, prune, saving
from fl_edge.seeding import derive_seed, torch_rng
from tests.tiny import same_bits
from tests.tiny_fedspine import BASE, draw_factors, make_app, make_dataset, order_of, workload
from tests.tiny_transformers import draw_plan

MEMBERS, FULL = members(BASE), full_plan(BASE)
SMALL = draw_plan(BASE, np.random.default_rng(1), 0.3)
SMALLER = draw_plan(BASE, np.random.default_rng(2), 0.4, of=SMALL)
ADAPTER = draw_factors(MEMBERS, BASE, 4)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path))
    identify_process(1)
    return tmp_path / "pruned"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was warned of since the last call."""
    logger = logging.getLogger("flwr")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, "flwr"):

        def since() -> list[str]:
            said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
            caplog.clear()
            return said

        yield since
    logger.removeHandler(caplog.handler)
    logger.propagate = propagates


def context_of(node: int = 1, run: int = 1) -> Context:
    return Context(run, node, {"partition-id": node - 1, "num-partitions": 3}, RecordDict(), {})


def question(plan: PruningPlan = FULL, rank: int = 2, server_round: int = 1, **settings: Any) -> tuple[Order, Message]:
    order = order_of(plan, rank, server_round, **settings)
    tensors = order_tensors(device_adapter(ADAPTER, MEMBERS, plan, rank), head_of(BASE))
    return order, Message(make_content(order.to_config(), tensors), 1, "train.fedspine")


def asked(app: Any, context: Context, *given: Any, **settings: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reply = app(question(*given, **settings)[1], context)
    assert not reply.has_error(), reply.error.reason
    return config_of(reply), tensors_of(reply)


class Counted:
    """Makes the unpruned base and counts how often."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> nn.Module:
        self.made += 1
        made: nn.Module = copy.deepcopy(BASE)
        return made


def get(cache: PrunedBases, base: Counted, context: Context, plan: PruningPlan) -> nn.Module:
    return cache.get(context, base, "tiny", plan, "cpu")


def reference(plan: PruningPlan) -> dict[str, Tensor]:
    model = copy.deepcopy(BASE)
    prune(model, plan)
    return dict(model.state_dict())


def test_a_description() -> None:
    reply: Any = make_app()(Message(make_content({"round": 1}), 1, "query.fedspine_describe"), context_of(2))
    config = config_of(reply)
    assert config.pop("handled_s") >= 0
    assert config == {"device": "device-1", "samples": 24, "base": "tiny"}


def test_a_reply_is_the_round_that_was_ordered() -> None:
    order, message = question(SMALL, 4, 6, tau=3)
    reply: Any = make_app()(message, context_of(2))
    config, tensors = config_of(reply), tensors_of(reply)
    model, dataset = copy.deepcopy(BASE).requires_grad_(False), make_dataset(1, 24)
    prune(model, SMALL)

    def rows(generator: torch.Generator, count: int) -> list[dict[str, Tensor]]:
        """Batches of 8 without replacement, an epoch's rest left out."""
        found, order = [], torch.randperm(24, generator=generator).tolist()
        for step in range(count):
            chosen = dataset[order[8 * step : 8 * step + 8]]
            found.append({name: torch.tensor(chosen[name]) for name in ("input_ids", "attention_mask", "labels")})
        return found

    done = train_round(
        model, MEMBERS, device_adapter(ADAPTER, MEMBERS, SMALL, 4), head_of(BASE),
        rows(torch_rng(3, "batches", 6, "device-1"), 3), rows(torch_rng(3, "probe", "device-1"), 1), order.settings,
        derive_seed(3, "dropout", 6, "device-1"),
    )  # fmt: skip
    assert (config["loss_before"], config["loss_after"]) == (done.loss_before, done.loss_after)
    expected = order_tensors(done.adapter, done.head)
    assert same_bits({name: tensors[name] for name in expected}, expected)
    mean = done.importance.mean
    assert mean is not None
    assert torch.equal(tensors["importance.1.channels"], mean[1]["channels"])
    assert (config["round"], config["rank"], config["plan"], config["samples"]) == (6, 4, SMALL.digest(), 24)


def test_the_probe_is_the_same_in_every_round() -> None:
    app, context = make_app(), context_of()
    first, later = (asked(app, context, FULL, 2, server_round)[0] for server_round in (1, 9))
    assert first["loss_before"] == later["loss_before"]
    assert first["loss_after"] != later["loss_after"]


def test_every_way_to_a_pruned_base_gives_the_same_bits(folder: Path) -> None:
    """In memory, from disk, and made anew: as a process that stays, one that does not, and one that lost its disk."""
    plans = [FULL, SMALL, SMALLER, SMALLER]

    def played(fresh_app: bool, lost: bool) -> list[dict[str, Tensor]]:
        app, context, found = make_app(), context_of(), []
        for server_round, plan in enumerate(plans, 1):
            app = make_app() if fresh_app else app
            context = context_of() if lost else context
            found.append(asked(app, context, plan, 4, server_round)[1])
        return found

    with staying():
        live = played(fresh_app=False, lost=False)
        assert not folder.exists()  # a process that stays keeps nothing on disk
    disk = played(fresh_app=True, lost=False)
    assert len(list(folder.glob("[!.]*"))) == 2
    anew = played(fresh_app=True, lost=True)
    for one, other, third in zip(live, disk, anew, strict=True):
        assert same_bits(one, other)
        assert same_bits(one, third)


def test_a_base_is_made_only_when_nothing_nearer_holds_the_plan() -> None:
    base, context, cache = Counted(), context_of(), PrunedBases()
    for plan in (FULL, SMALL, SMALLER, SMALLER):
        model = get(cache, base, context, plan)
        assert same_bits(dict(model.state_dict()), reference(plan))
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert base.made == 1
    assert same_bits(dict(get(PrunedBases(), base, context, SMALLER).state_dict()), reference(SMALLER))
    assert base.made == 1  # another process has found it on disk
    half_way = draw_plan(BASE, np.random.default_rng(5), 0.3, of=SMALLER)
    assert same_bits(dict(get(PrunedBases(), base, context, half_way).state_dict()), reference(half_way))
    assert base.made == 1
    for other in (SMALL, FULL):  # a plan that needs what is gone
        assert same_bits(dict(get(cache, base, context, other).state_dict()), reference(other))
    assert base.made == 3


def test_devices_do_not_share_what_is_in_memory() -> None:
    base, cache = Counted(), PrunedBases(keep_live=2)
    contexts = [context_of(node) for node in (1, 2, 3)] + [context_of(1, run=2)]
    models = [get(cache, base, context, SMALL) for context in contexts]
    assert len({id(model) for model in models}) == 4
    assert get(cache, base, contexts[3], SMALL) is models[3]
    assert get(cache, base, contexts[2], SMALL) is models[2]
    assert get(cache, base, contexts[0], SMALL) is not models[0]  # only two are kept


def damage(folder: Path, name: str) -> None:
    (file,) = folder.glob(f"[!.]*/{name}")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "config.json", "checksums.json"])
def test_a_damaged_file_costs_a_line_and_nothing_else(folder: Path, name: str, warnings: Any) -> None:
    base, context = Counted(), context_of()
    get(PrunedBases(), base, context, SMALL)
    damage(folder, name)
    for _ in range(2):
        assert same_bits(dict(get(PrunedBases(), base, context, SMALL).state_dict()), reference(SMALL))
    said = warnings()
    assert len(said) <= 1
    if name in ("model.safetensors", "plan.json"):
        assert said[0].startswith("a pruned base on disk is made anew: ")
        assert "\n" not in said[0]
        assert base.made == 2  # once before, once after the damage; what was written then is good


def test_a_folder_that_is_gone_is_no_warning(folder: Path, warnings: Any) -> None:
    base, context = Counted(), context_of()
    get(PrunedBases(), base, context, SMALL)
    for file in folder.glob("[!.]*/*"):
        file.unlink()
    for place in folder.glob("[!.]*"):
        place.rmdir()
    assert same_bits(dict(get(PrunedBases(), base, context, SMALL).state_dict()), reference(SMALL))
    assert (base.made, warnings()) == (2, [])


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Any
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path / "file"))
    context = context_of()
    config, _ = asked(make_app(), context, SMALL)
    assert "refused" not in config
    assert config["plan"] == SMALL.digest()
    (line,) = warnings()
    assert line.startswith("the pruned base is not kept on disk: cannot keep a pruned base in ")
    assert "\n" not in line
    assert STATE not in context.state


@pytest.mark.parametrize("name", ["write_tensors", "write_whole"])
def test_a_full_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path, warnings: Any) -> None:
    def full(*_: Any) -> None:
        if name == "write_whole":
            raise RunFolderError("cannot write x: No space left on device; what stood there before is unchanged")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, name, full)
    context = context_of()
    config, _ = asked(make_app(), context, SMALL)
    assert "refused" not in config
    (line,) = warnings()
    assert line.startswith("the pruned base is not kept on disk: cannot write ")
    assert "No space left on device" in line
    assert not list(folder.glob("[!.]*"))


def test_only_so_many_folders_are_kept_and_those_that_are_used(folder: Path) -> None:
    rng, base = np.random.default_rng(0), Counted()
    first = context_of(1)
    get(PrunedBases(), base, first, SMALL)
    for node in range(2, 9):
        get(PrunedBases(), base, context_of(node), draw_plan(BASE, rng, 0.5))
        get(PrunedBases(), base, first, SMALL)  # used again and again: it stays
        assert len(list(folder.glob("[!.]*"))) <= 4
    assert base.made == 8
    get(PrunedBases(), base, context_of(20), SMALL)
    assert len(list(folder.glob("[!.]*"))) == 4  # equal base and plan: equal folder


def test_the_context_stays_small() -> None:
    app, context = make_app(), context_of()
    for server_round, plan in enumerate((FULL, SMALL, SMALLER), 1):
        asked(app, context, plan, 4, server_round)
    assert list(context.state) == [STATE]
    held: Any = context.state.config_records[STATE]
    assert 0 < sum(len(str(key)) + len(str(value)) for key, value in held.items()) < 300


def test_what_a_device_cannot_do_is_one_line() -> None:
    app = make_app([workload(0, samples=0), workload(1)])
    config, tensors = asked(app, context_of(1), SMALL)
    assert config["refused"] == "device-0 holds no samples"
    assert tensors == {}
    order, message = question(SMALL)
    message.content = make_content(order.to_config(), {"head.x": torch.zeros(1)})
    reply: Any = app(message, context_of(2))
    assert config_of(reply)["refused"].startswith("the order holds no bert.encoder.layer.0.")
    message.content = make_content(
        order.to_config(), order_tensors(device_adapter(ADAPTER, MEMBERS, FULL, 2), head_of(BASE))
    )
    reply = app(message, context_of(2))
    assert "the factors of bert.encoder.layer.0." in str(config_of(reply)["refused"])
    assert "\n" not in str(config_of(reply)["refused"])
    config, _ = asked(app, context_of(2), SMALL)  # and it is well afterwards
    assert "refused" not in config


def test_a_plan_of_another_model_is_one_line() -> None:
    other = PruningPlan("bert", (4,), (40,), FULL.layers[:1])
    with pytest.raises(ConfigError, match="is one of another model"):
        get(PrunedBases(), Counted(), context_of(), other)


def test_a_device_with_fewer_samples_than_a_batch_trains() -> None:
    config, _ = asked(make_app([workload(0, samples=3)]), context_of(), SMALL)
    assert config["samples"] == 3
    assert config["loss_after"] > 0


def test_virtual_time_follows_profile_plan_and_rank() -> None:
    app = make_app()

    def seconds(node: int, plan: PruningPlan, rank: int, **settings: Any) -> float:
        config, _ = asked(app, context_of(node), plan, rank, **settings)
        assert config["bandwidth_bps"] == 1e7
        return float(config["compute_s"])

    slow, fast = seconds(1, FULL, 4), seconds(2, FULL, 4)
    assert slow == pytest.approx(2 * fast)
    assert seconds(1, SMALLER, 4) < seconds(1, SMALL, 4) < slow
    assert seconds(1, FULL, 2) < slow
    assert seconds(1, FULL, 4, tau=4) == pytest.approx(2 * slow)
    costs, tensors = count_costs(BASE, SMALL), device_adapter(ADAPTER, MEMBERS, SMALL, 4).values()
    lora = sum(factors.a.numel() + factors.b.numel() for factors in tensors)
    assert seconds(1, SMALL, 4) == pytest.approx(training_macs(costs, lora, [(64, 8)] * 2) / 1e8)
    # by hand: 2 iterations of 8 rows of 8 tokens, at 1e8 multiply-adds a second
    block = 2 * (4 * 32 * 32 + 2 * 32 * 40)
    lora = 4 * 2 * (4 * (32 + 32) + 2 * (32 + 40))
    attention = 2 * 2 * 32
    assert slow == pytest.approx(2 * 64 * (2 * block + 3 * lora + 3 * 8 * attention) / 1e8)


def test_costs_of_a_round() -> None:
    costs = Costs(prunable=0, fixed=0, outside=0, block_macs=100, attention_macs=7, outside_macs=0)
    assert training_macs(costs, 10, [(6, 3), (4, 2)]) == 6 * (200 + 30 + 63) + 4 * (200 + 30 + 42)
    assert training_macs(costs, 10, []) == 0
    assert training_macs(count_costs(BASE, SMALL), 0, [(8, 8)]) < training_macs(count_costs(BASE, FULL), 0, [(8, 8)])
    assert round_seconds(1.5, 1000, 250, 1e4) == pytest.approx(1.5 + 1.0)
    assert round_seconds(1.5, 1000, 250, 0.0) == 1.5


def test_without_a_profile_the_time_is_this_machines() -> None:
    config, _ = asked(make_app([workload(0, costs=None)]), context_of(), SMALL)
    assert config["bandwidth_bps"] == 0
    assert 0 < config["compute_s"] <= config["handled_s"]


def test_a_live_model_trains_round_after_round_from_the_same_base() -> None:
    """LoRA that stayed on it, or gradients that moved it, would show."""
    app, context = make_app(), context_of()
    with staying():
        first = asked(app, context, SMALL, 4, 1)[1]
        asked(app, context, SMALL, 2, 2)
        again = asked(app, context, SMALL, 4, 1)[1]
    assert same_bits(first, again)


def test_one_process_serves_many_nodes() -> None:
    grid = LocalGrid(make_app(keep_live=1), 3)
    messages = []
    for node in (1, 2, 3):
        order, message = question(SMALL, 2, 1)
        messages.append(Message(message.content, node, "train.fedspine", group_id="1"))
    replies = list(grid.send_and_receive(messages))
    assert sorted(int(config_of(reply)["samples"]) for reply in replies) == [20, 24, 28]
    assert {config_of(reply)["plan"] for reply in replies} == {order.plan.digest()}
