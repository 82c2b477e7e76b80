"""What the user takes home: the global model at each size, its folder, its card."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from torch import Tensor, nn

from fl_edge.errors import ConfigError, ReplyError, RunFolderError
from fl_edge.fedspine import export as module
from fl_edge.fedspine.bandit import Agent, Arm
from fl_edge.fedspine.config import FedSpineConfig
from fl_edge.fedspine.export import assemble, export, size_classes
from fl_edge.fedspine.factors import Factors
from fl_edge.fedspine.lora import head_of, map_shapes
from fl_edge.fedspine.model_card import model_card
from fl_edge.fedspine.selection import select
from fl_edge.fedspine.state import DeviceState, FedSpineState
from fl_edge.models.vocabulary import decoder_tokenizer, encoder_tokenizer
from fl_edge.pruning import PruningPlan, full_plan, load_pruned, members, plain, sparsity, unit_params
from fl_edge.pruning.plan import UNITS
from fl_edge.seeding import torch_rng
from tests.tiny_transformers import draw_batch, draw_plan, logits, make_model, mask_units

# peft asks transformers by a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = FedSpineConfig(ranks="2 4 6", scale=0.5)
ABOUT = {"base": "someone/tiny", "data": "Texts of 3 kinds", "seed": 7, "versions": {"torch": "2.0", "peft": "0.1"}}
VOCABULARY = 300


def make_base(task: str) -> Any:
    return make_model("bert" if task == "classification" else "qwen2", task, vocab_size=VOCABULARY)


def draw_adapter(model: nn.Module, rank: int, seed: int = 1) -> dict[str, Factors]:
    generator = torch_rng(seed, "adapter")
    return {
        path: Factors(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))
        for path, (d_out, d_in) in map_shapes(model, members(model)).items()
    }


def cut(plan: PruningPlan, sizes: list[tuple[int, int]], ratio: float, seed: int) -> PruningPlan:
    rng = np.random.default_rng(seed)
    scores = [{unit: rng.random(plan.total(layer, unit)) for unit in UNITS} for layer in range(len(plan.layers))]
    return select(plan, scores, sizes, ratio)


def make_state(model: nn.Module, ratios: Mapping[str, float], ranks: Mapping[str, int]) -> FedSpineState:
    """Devices with plans of their own at the given ratios, and the ranks they were given last."""
    state = FedSpineState(draw_adapter(model, 6), {name: tensor + 1 for name, tensor in head_of(model).items()}, 9)
    for index, (name, ratio) in enumerate(ratios.items()):
        plan = cut(full_plan(model), unit_params(model), ratio, index)
        agent = Agent(CONFIG.bandit, CONFIG.space)
        for rank in (2, ranks[name]):
            agent.learn(Arm(0.05, rank), 0.5)
        state.devices[name] = DeviceState(10, plan, agent, participation=9)
    return state


# -------------------------------------------------------------------------------------------------------- one model


@pytest.mark.parametrize(("family", "task"), [("roberta", "classification"), ("distilbert", "classification"),
                                              ("llama", "causal"), ("qwen3", "causal")])  # fmt: skip
def test_it_computes_what_the_masked_model_with_the_products_in_its_weights_does(family: str, task: str) -> None:
    reference, base = make_model(family, task), make_model(family, task)
    plan = draw_plan(base, np.random.default_rng(2), 0.5)
    adapter = draw_adapter(base, 3)
    head = {name: tensor + 0.1 for name, tensor in head_of(base).items()}
    model = assemble(base, plan, adapter, head, 3, 0.25)
    with torch.no_grad():
        for path, pair in adapter.items():
            reference.get_parameter(f"{path}.weight").add_(0.25 * pair.b @ pair.a)
        for name, tensor in head.items():
            reference.get_parameter(name).copy_(tensor)
    mask_units(reference, plan)
    batch = draw_batch(np.random.default_rng(3))
    assert torch.allclose(logits(model, batch), logits(reference, batch), atol=1e-4, rtol=1e-4)
    assert not model.training
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())


@pytest.mark.parametrize("rank", [2, 5])
def test_another_rank_than_the_adapters_is_the_best_approximation_of_what_is_kept(rank: int) -> None:
    base = make_model("bert")
    plan, adapter = draw_plan(base, np.random.default_rng(4), 0.5), draw_adapter(base, 4)
    whole = assemble(make_model("bert"), plan, adapter, head_of(base), 4, 1.0)
    model = assemble(base, plan, adapter, head_of(base), rank, 1.0)
    for member in members(base):
        both: list[Any] = [each.get_submodule(f"base_model.model.{member.path}") for each in (model, whole)]
        found, given = (
            each.lora_B["default"].weight.detach() @ each.lora_A["default"].weight.detach() for each in both
        )
        assert both[0].lora_A["default"].weight.shape[0] == rank
        u, s, v = torch.linalg.svd(given.double())
        best = (u[:, :rank] * s[:rank]) @ v[:rank] if rank < len(s) else given.double()
        assert torch.allclose(found.double(), best, atol=1e-4)


def test_the_global_factors_are_copied_and_no_draw_is_taken_from_the_global_generator() -> None:
    base = make_model("bert")
    adapter, head = draw_adapter(base, 3), head_of(base)
    before = {path: (pair.a.clone(), pair.b.clone()) for path, pair in adapter.items()}
    state = torch.get_rng_state()
    model = assemble(base, full_plan(base), adapter, head, 3, 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(pair.a, before[path][0]) and torch.equal(pair.b, before[path][1])
               for path, pair in adapter.items())  # fmt: skip
    assert any(tensor.any() for tensor in head.values())


def test_a_head_of_another_model_is_refused() -> None:
    base = make_model("bert")
    with pytest.raises(ReplyError, match="the head has no parameters"):
        assemble(base, full_plan(base), draw_adapter(base, 2), {}, 2, 1.0)


# ---------------------------------------------------------------------------------------------------------- classes


def test_devices_of_about_one_sparsity_share_a_class() -> None:
    base = make_model("bert")
    sizes = unit_params(base)
    ratios = {"a": 0.5, "b": 0.5, "c": 0.25, "d": 0.5, "e": 0.25}
    state = make_state(base, ratios, {"a": 2, "b": 6, "c": 6, "d": 4, "e": 4})
    state.devices["gone"] = DeviceState(10, full_plan(base), Agent(CONFIG.bandit, CONFIG.space))
    small, large = reversed(size_classes(state, CONFIG, sizes))
    assert (large.devices, small.devices) == (("c", "e"), ("a", "b", "d"))
    assert (large.rank, small.rank) == (4, 4)  # median of two: the lower one
    for each in (large, small):
        reached = [sparsity(state.devices[name].plan, sizes) for name in each.devices]
        assert each.sparsity == round(reached[0], 2)
        assert each.folder == f"sparsity-{each.sparsity:.2f}"
        assert min(reached) - 0.01 < sparsity(each.plan, sizes) <= max(reached)
    for device in state.devices.values():
        device.agent.history = []
    fixed = FedSpineConfig(ranks="2 4 6", choice="fixed", fixed_rank=2)
    assert [each.rank for each in size_classes(state, fixed, sizes)] == [2, 2]


def test_equal_plans_are_the_class_plan() -> None:
    base = make_model("bert")
    state = make_state(base, {"a": 0.3, "b": 0.3}, {"a": 2, "b": 2})
    state.devices["b"].plan = state.devices["a"].plan
    (only,) = size_classes(state, CONFIG, unit_params(base))
    assert only.plan == state.devices["a"].plan


def test_without_a_device_that_finished_a_round_there_is_no_class(tmp_path: Path) -> None:
    base = make_model("bert")
    state = FedSpineState(draw_adapter(base, 6), head_of(base))
    assert export(tmp_path, lambda: base, state, CONFIG, unit_params(base), None, lambda _: {}, {}) == []


# ----------------------------------------------------------------------------------------------------------- export


class Exported:
    """An export of two classes, with the logits that each model had when it was measured."""

    def __init__(self, task: str, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.base = make_base(task)
        self.state = make_state(self.base, {"a": 0.5, "b": 0.5, "c": 0.2}, {"a": 4, "b": 6, "c": 6})
        texts = ["the quick brown fox", "jumps over the lazy dog"]
        make = encoder_tokenizer if task == "classification" else decoder_tokenizer
        self.tokenizer = make(texts, VOCABULARY)
        self.batch = draw_batch(np.random.default_rng(5))
        self.measured: list[Tensor] = []
        self.rows = self.write()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        self.measured.append(logits(model, self.batch))
        return {"accuracy": float(self.measured[-1].sigmoid().mean()), "loss": 1.25}

    def write(self, **changes: Any) -> list[dict[str, Any]]:
        given = {"tokenizer": self.tokenizer, "evaluate": self.evaluate, "about": ABOUT, **changes}
        sizes = unit_params(self.base)
        return export(self.folder, lambda: make_base(self.task), self.state, CONFIG, sizes, **given)


@pytest.fixture(scope="module", params=["classification", "causal"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp("home") / "models")


def test_each_class_loads_again_to_the_bit(exported: Exported) -> None:
    assert sorted(path.name for path in exported.folder.iterdir()) == sorted(row["folder"] for row in exported.rows)
    for row, measured in zip(exported.rows, exported.measured, strict=True):
        loaded = load_pruned(exported.folder / row["folder"])
        assert torch.equal(logits(loaded, exported.batch), measured)
        assert exported.evaluate(loaded) == {"accuracy": row["accuracy"], "loss": row["loss"]}
        exported.measured.pop()


def test_the_rows_say_what_is_in_the_folders(exported: Exported) -> None:
    sizes = unit_params(exported.base)
    assert [row["devices"] for row in exported.rows] == [1, 2]
    assert [row["rank"] for row in exported.rows] == [6, 4]
    assert [round(row["sparsity"], 2) for row in exported.rows] == [
        each.sparsity for each in size_classes(exported.state, CONFIG, sizes)
    ]
    for row in exported.rows:
        loaded: Any = load_pruned(exported.folder / row["folder"])
        of_adapter = {name: p.numel() for name, p in loaded.named_parameters() if "lora_" in name}
        assert row["adapter_parameters"] == sum(of_adapter.values())
        assert row["parameters"] == loaded.num_parameters() - row["adapter_parameters"]
        assert row["parameters_before"] == exported.base.num_parameters()
        for model, key in ((loaded, "macs"), (exported.base, "macs_before")):
            maps: list[Any] = [plain(model).get_submodule(member.path) for member in members(model)]
            assert row[key] == sum(each.weight.numel() for each in maps)


def test_the_card_is_one_of_the_hub(exported: Exported) -> None:
    for row in exported.rows:
        card = ModelCard.load(exported.folder / row["folder"] / "README.md")
        task = "text-classification" if exported.task == "classification" else "text-generation"
        assert (card.data.library_name, card.data.pipeline_tag) == ("peft", task)
        assert card.data.base_model == "someone/tiny"
        assert {"lora", "pruning"} <= set(card.data.tags)
        found = {each.metric_type: each.metric_value for each in card.data.eval_results}
        assert found == {"accuracy": row["accuracy"], "loss": row["loss"]}
        assert {each.dataset_name for each in card.data.eval_results} == {"Texts of 3 kinds"}
        parts = [f"{row['parameters']:,}", f"{row['macs_before']:,}", f"| accuracy | {row['accuracy']:.4f} |"]
        for part in [*parts, "| seed | 7 |", "| rounds | 9 |", "| devices | 3 |", "torch 2.0, peft 0.1", "2402.11505"]:
            assert part in card.text


def test_the_code_of_the_card_runs(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(exported.folder)
    for row in exported.rows:
        text = (exported.folder / row["folder"] / "README.md").read_text()
        space: dict[str, Any] = {}
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            exec(block, space)
        said = capsys.readouterr().out
        if exported.task == "classification":
            assert re.fullmatch(r"\['LABEL_[012]'\]\n", said)
        else:
            assert space["tokens"].shape[1] > space["inputs"]["input_ids"].shape[1]
        assert isinstance(space["tokenizer"], transformers.PreTrainedTokenizerFast)


def test_the_adapter_merges_into_a_plain_model(exported: Exported) -> None:
    for row in exported.rows:
        loaded: Any = load_pruned(exported.folder / row["folder"])
        before = logits(loaded, exported.batch)
        merged = loaded.merge_and_unload()
        assert isinstance(merged, type(exported.base))
        assert torch.allclose(logits(merged, exported.batch), before, atol=1e-3, rtol=1e-4)


def test_no_path_of_this_machine_goes_along(exported: Exported) -> None:
    for file in exported.folder.rglob("*"):
        if file.suffix in (".json", ".md"):
            assert "/tmp" not in file.read_text()
            assert str(exported.folder) not in file.read_text()


def test_a_local_folder_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"folder": "sparsity-0.50", "devices": 1, "sparsity": 0.5, "rank": 2, "adapter_parameters": 3,
           "parameters": 1, "parameters_before": 2, "macs": 1, "macs_before": 2}  # fmt: skip
    monkeypatch.chdir(tmp_path)
    facts = {"base": "models/mine", "devices": 1}
    cards = [model_card(row, "text-classification", "flexlora", facts)]
    (tmp_path / "models" / "mine").mkdir(parents=True)
    cards.append(model_card(row, "text-classification", "flexlora", facts))
    found: list[Any] = [ModelCard(card).data for card in cards]
    assert [data.base_model for data in found] == ["models/mine", None]


def test_a_bare_card_says_only_what_is_known(tmp_path: Path) -> None:
    made = Exported("classification", tmp_path / "first")
    made.folder = tmp_path / "second"
    about = {"base": "/some/where/tiny", "data": "x|y", "example": 'say "no"\\\n'}
    (row, _) = made.write(evaluate=lambda _: {}, about=about, tokenizer=None)
    card = ModelCard.load(made.folder / row["folder"] / "README.md")
    assert card.data.base_model is None
    assert card.data.eval_results is None
    assert r"| data | x\|y |" in card.text
    assert r'["say \"no\"\\\n"]' in card.text
    assert "# tiny, 20% pruned\n" in card.text
    assert "/some/where" not in card.text
    assert "accuracy" not in row


def test_classes_that_are_gone_are_removed_and_nothing_else(tmp_path: Path) -> None:
    made = Exported("classification", tmp_path)
    (tmp_path / "sparsity-notes").mkdir()
    (tmp_path / "kept.txt").write_text("")
    kept = made.rows[1]["folder"]
    (tmp_path / kept / "mine.txt").write_text("")
    del made.state.devices["c"]
    assert [row["folder"] for row in made.write()] == [kept]
    assert {path.name for path in tmp_path.iterdir()} == {kept, "sparsity-notes", "kept.txt"}
    assert (tmp_path / kept / "mine.txt").exists()


@contextmanager
def full_disk(left: int) -> Iterator[None]:
    """No file may become longer than that: the same errors as on a full disk, from the same calls."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("step", ["save_pruned", "tokenizer", "write_whole"])
def test_a_full_disk_is_one_line(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Exported("classification", tmp_path / "first")
    made.folder = tmp_path / "second"
    owner, name = (made.tokenizer, "save_pretrained") if step == "tokenizer" else (module, step)
    write = getattr(owner, name)

    def on_a_full_disk(*given: Any) -> Any:
        with full_disk(1000):
            return write(*given)

    monkeypatch.setattr(owner, name, on_a_full_disk)
    with pytest.raises(RunFolderError, match=r"^cannot write [^\n]*second/sparsity-[^\n]*File too large[^\n]*$"):
        made.write()


def test_what_is_wrong_with_the_model_is_not_called_a_full_disk(tmp_path: Path) -> None:
    made = Exported("classification", tmp_path / "first")
    with pytest.raises(ConfigError, match="merged into the weights"):
        made.write(evaluate=lambda model: model.merge_adapter() or {})
    with pytest.raises(AttributeError):
        made.write(tokenizer=object())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    made = Exported("classification", tmp_path / "first")
    (tmp_path / "file").write_text("")
    made.folder = tmp_path / "file" / "models"
    with pytest.raises(RunFolderError, match=r"^cannot write [^\n]*$"):
        made.write()
