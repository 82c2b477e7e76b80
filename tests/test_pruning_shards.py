"""Models written in shards: whole or not at all, taken up after a kill, and equal to what `save_pruned` writes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from fl_edge.errors import ConfigError, DataError, RunFolderError
from fl_edge.pruning import (
    PruningPlan,
    ShardWriter,
    full_plan,
    load_pruned,
    prune,
    read_plan,
    save_pruned,
    saving,
    shards,
)
from fl_edge.pruning.configuration import empty
from tests.tiny_transformers import (
    DECODERS,
    GROUPED,
    draw_batch,
    draw_plan,
    logits,
    make_config,
    make_model,
    same_everywhere,
    without_layers,
)

AUTO: Any = transformers.AutoModelForCausalLM
DEPTH = 4


def deep(family: str = "qwen2", **changes: Any) -> Any:
    return make_model(family, "causal", num_hidden_layers=DEPTH, **changes)


def sliced(model: Any, even: bool = False, gone: tuple[int, ...] = (1,)) -> PruningPlan:
    """Slice a model, and return the plan."""
    plan = draw_plan(model, np.random.default_rng(1), 0.5)
    if even:
        heads = (0, 2) if model.config.model_type in GROUPED else (0, 1, 2, 3)
        plan = same_everywhere(model, heads, (1, 2, 20))
    plan = without_layers(plan, gone)
    prune(model, plan)
    return plan


def pieces(model: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The model's tensors layer by layer, without those that are tied."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            _, found, rest = name.partition(".layers.")
            by_name.setdefault(f"layer-{rest.partition('.')[0]}" if found else "outside", {})[name] = tensor
    yield from by_name.items()


def skeleton(model: Any, plan: PruningPlan) -> nn.Module:
    config = make_config(model.config.model_type, num_hidden_layers=DEPTH)
    config.tie_word_embeddings = model.config.tie_word_embeddings
    hollow = empty(type(model), config)
    prune(hollow, plan)
    return hollow


def write_all(folder: Path, model: Any, plan: PruningPlan, source: Path | None = None) -> None:
    writer = ShardWriter(folder)
    for name, tensors in pieces(model):
        writer.write(name, tensors)
    writer.finish(skeleton(model, plan), plan, source)


def same_model(one: Any, other: Any) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(
        torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype for name, tensor in ours.items()
    )
    assert type(one) is type(other)
    batch = draw_batch(np.random.default_rng(0))
    # the same weights at addresses that are aligned otherwise may round otherwise
    torch.testing.assert_close(logits(one, batch), logits(other, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_shards_give_the_model_that_one_file_gives(family: str, even: bool, tied: bool, tmp_path: Path) -> None:
    model = deep(family, tie_word_embeddings=tied)
    plan = sliced(model, even)
    write_all(tmp_path / "shards", model, plan)
    save_pruned(model, plan, tmp_path / "one")
    same_model(load_pruned(tmp_path / "shards"), model)
    assert read_plan(tmp_path / "shards") == plan
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("shards", "one")]
    assert configs[0] == configs[1]
    listed = json.loads((tmp_path / "shards" / "plan.json").read_text())["weights_sha256"]
    assert listed.keys() == {f"model-{name}.safetensors" for name, _ in pieces(model)}
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {
        *listed, "config.json", "plan.json", "model.safetensors.index.json"
    }  # fmt: skip
    if not even:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AUTO.from_pretrained(tmp_path / "shards")
        return
    theirs = AUTO.from_pretrained(tmp_path / "shards")
    same_model(theirs, model)
    asked: Any = {**draw_batch(np.random.default_rng(2), 2, 5, left=True), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(theirs.generate(**asked), model.generate(**asked))


def test_the_written_type_and_total_size_are_true(tmp_path: Path) -> None:
    model = deep().to(torch.bfloat16)
    plan = sliced(model, even=True)
    write_all(tmp_path, model, plan)  # the skeleton is in float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(tensor.numel() for tensor in model.state_dict().values())
    same_model(AUTO.from_pretrained(tmp_path), model)


def test_what_lies_beside_the_source_is_copied(tmp_path: Path) -> None:
    model = deep()
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_bytes(b"tokens \xff")
    (tmp_path / "source" / "notes.txt").write_text("private")
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    plan = sliced(model)
    write_all(tmp_path / "out", model, plan, tmp_path / "source")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"tokens \xff"
    assert not (tmp_path / "out" / "notes.txt").exists()
    loaded: Any = load_pruned(tmp_path / "out")
    assert loaded.generation_config.max_new_tokens == 3
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before


def test_a_killed_run_is_taken_up_with_the_shards_that_are_whole(tmp_path: Path) -> None:
    model = deep()
    plan = sliced(model)
    first, *others = pieces(model)
    ShardWriter(tmp_path).write(*first)
    writer = ShardWriter(tmp_path)
    assert writer.has(first[0])
    assert not any(writer.has(name) for name, _ in others)
    assert {name: tensor.tolist() for name, tensor in writer.read(first[0]).items()} == {
        name: tensor.tolist() for name, tensor in first[1].items()
    }
    with pytest.raises(DataError, match=r"model-layer-0.safetensors is not a whole shard"):
        writer.read("layer-0")
    for name, tensors in others:
        with pytest.raises(ConfigError, match=r"the shards in .* are not the model: it has nothing for"):
            writer.finish(skeleton(model, plan), plan)
        with pytest.raises(DataError, match=r"no plan.json"):
            load_pruned(tmp_path)
        with pytest.raises((OSError, ValueError), match=r"config.json"):
            AUTO.from_pretrained(tmp_path)
        writer.write(name, tensors)
    writer.finish(skeleton(model, plan), plan)
    same_model(load_pruned(tmp_path), model)
    assert not ShardWriter(tmp_path).has(first[0])  # it is a model now, no longer shards


@pytest.mark.parametrize("how", ["gone", "half", "flipped", "other journal", "no journal"])
def test_a_shard_that_is_not_whole_is_not_there(how: str, tmp_path: Path) -> None:
    model = deep()
    plan = sliced(model)
    written = list(pieces(model))
    writer = ShardWriter(tmp_path)
    for name, tensors in written:
        writer.write(name, tensors)
    file, journal = tmp_path / "model-layer-2.safetensors", tmp_path / ".shards.json"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    match how:
        case "gone":
            file.unlink()
        case "half":
            file.write_bytes(content[: len(content) // 2])
        case "flipped":
            file.write_bytes(content)
        case "other journal":
            journal.write_text(journal.read_text()[:-9])
        case "no journal":
            journal.unlink()
    again = ShardWriter(tmp_path)
    assert not again.has("layer-2")
    assert again.has("layer-1") == ("journal" not in how)
    if "journal" not in how:
        with pytest.raises(DataError, match=r"model-layer-2.safetensors is damaged or gone; write it again"):
            again.finish(skeleton(model, plan), plan)
    for name, tensors in written:
        if not again.has(name):
            again.write(name, tensors)
    again.finish(skeleton(model, plan), plan)
    same_model(load_pruned(tmp_path), model)


@pytest.mark.parametrize("step", ["write_tensors", "sha256_of", "write_whole"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device"), SafetensorError("No space")]
)
def test_a_write_that_fails_leaves_what_was_whole(
    step: str, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardWriter(tmp_path)
    writer.write("one", {"a": torch.zeros(3)})

    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(shards, step, failing)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RunFolderError) as caught:
        writer.write("two", {"b": torch.zeros(3)})
    if error is not KeyboardInterrupt:
        assert str(caught.value) == f"cannot write {tmp_path}: No space" + " left on device" * isinstance(
            error, OSError
        )
    with pytest.raises(type(caught.value)):
        writer.write("one", {"a": torch.ones(3)})
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*partial"))
    for each in (writer, ShardWriter(tmp_path)):
        assert not each.has("two")
        assert each.has("one") == (step == "write_tensors")  # else its file is another than the journal says
    ShardWriter(tmp_path).write("one", {"a": torch.ones(3)})
    assert ShardWriter(tmp_path).read("one")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_finish_that_is_cut_short_can_be_done_again(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep()
    plan = sliced(model)
    steps = iter(range(1, 9))

    def killed(file: Path, content: Any) -> None:
        if next(steps) == step:
            raise KeyboardInterrupt
        file.write_text(content)

    writer = ShardWriter(tmp_path)
    for name, tensors in pieces(model):
        writer.write(name, tensors)
    monkeypatch.setattr(shards, "write_whole", killed)  # index, configuration
    monkeypatch.setattr(saving, "write_whole", killed)  # plan
    with pytest.raises(KeyboardInterrupt):
        writer.finish(skeleton(model, plan), plan)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"no plan.json"):
        load_pruned(tmp_path)
    again = ShardWriter(tmp_path)
    assert all(again.has(name) for name, _ in pieces(model))
    again.finish(skeleton(model, plan), plan)
    same_model(load_pruned(tmp_path), model)


def test_a_pruned_model_is_replaced_and_any_other_is_not_touched(tmp_path: Path) -> None:
    model = deep()
    model.save_pretrained(tmp_path / "foreign")
    before = {path.name: path.read_bytes() for path in (tmp_path / "foreign").iterdir()}
    with pytest.raises(RunFolderError, match="holds a model that is not a pruned one; choose another folder"):
        ShardWriter(tmp_path / "foreign")
    assert {path.name: path.read_bytes() for path in (tmp_path / "foreign").iterdir()} == before
    whole, plan = copy.deepcopy(model), sliced(model)
    out = tmp_path / "out"
    save_pruned(whole, full_plan(whole), out)
    writer = ShardWriter(out)
    same_model(load_pruned(out), whole)  # until the first shard
    writer.write(*next(pieces(model)))
    assert {path.name for path in out.iterdir()} == {"model-outside.safetensors", ".shards.json"}
    write_all(out, model, plan)
    same_model(load_pruned(out), model)
    same_model(load_pruned(out), model)
    save_pruned(whole, full_plan(whole), out)
    assert not list(out.glob("model-*"))
    same_model(AUTO.from_pretrained(out), whole)


def test_shards_that_are_not_the_model_are_refused(tmp_path: Path) -> None:
    model = deep()
    plan = sliced(model)
    writer = ShardWriter(tmp_path)
    for name, tensors in pieces(model):
        writer.write(name, tensors)
    with pytest.raises(ConfigError, match="by the plan of what is present"):
        writer.finish(skeleton(model, plan), without_layers(full_plan(deep()), (1,)))
    dense = without_layers(full_plan(deep()), (1,))
    with pytest.raises(ConfigError, match=r"are not the model: it has .* for model.layers.0.*, the plan \("):
        writer.finish(skeleton(model, dense), dense)
    writer.write("more", {"model.layers.0.mlp.down_proj.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"down_proj.weight stands in two shards of .*: model-layer-0.* and "):
        writer.finish(skeleton(model, plan), plan)
    writer.write("more", {"model.layers.3.mlp.down_proj.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"it has \(1,\) for model.layers.3.mlp.down_proj.weight, the plan nothing"):
        writer.finish(skeleton(model, plan), plan)
    for name in ("", "../up", "a/b", ".hidden", "with space"):
        with pytest.raises(ConfigError, match="a shard cannot be named"):
            writer.write(name, {})


def test_a_damaged_shard_of_a_finished_model_is_one_line(tmp_path: Path) -> None:
    model = deep()
    write_all(tmp_path, model, sliced(model))
    file = tmp_path / "model-layer-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"model-layer-1.safetensors is damaged or not the file that plan.json"):
        load_pruned(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"cannot read .*model-layer-1.safetensors"):
        load_pruned(tmp_path)
    record = json.loads((tmp_path / "plan.json").read_text())
    for wrong in ({}, {"../x": "0"}, "0", None):
        (tmp_path / "plan.json").write_text(json.dumps({**record, "weights_sha256": wrong}))
        with pytest.raises(DataError, match=r"plan.json is damaged") as caught:
            load_pruned(tmp_path)
        assert "\n" not in str(caught.value)


def add_biases(model: Any, *names: str) -> None:
    for name in names:
        linear = model.get_submodule(name)
        linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.out_features))


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "mistral"])
@pytest.mark.parametrize("kind", ["uneven", "even", "layers only", "nothing"])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_bias_that_pruning_added_stays_and_is_never_lost_in_silence(
    family: str, kind: str, sharded: bool, tmp_path: Path
) -> None:
    model = deep(family, **({"enable_bias": False} if family == "opt" else {"attention_bias": False}))
    plan = without_layers(full_plan(model), () if kind == "nothing" else (2,))
    if kind in {"nothing", "layers only"}:
        prune(model, plan)
    else:
        plan = sliced(model, even=kind == "even", gone=(2,))
    down, out = ("fc2", "self_attn.out_proj") if family == "opt" else ("mlp.down_proj", "self_attn.o_proj")
    stack = "model.decoder.layers" if family == "opt" else "model.layers"
    add_biases(model, f"{stack}.0.{down}", f"{stack}.1.{out}")
    if sharded:
        writer = ShardWriter(tmp_path)
        for name, tensors in pieces(model):
            writer.write(name, tensors)
        hollow = empty(type(model), make_config(family, num_hidden_layers=DEPTH, **(
            {"enable_bias": False} if family == "opt" else {"attention_bias": False})))  # fmt: skip
        prune(hollow, plan)
        writer.finish(hollow, plan)
    else:
        save_pruned(model, plan, tmp_path)
    loaded: Any = load_pruned(tmp_path)
    same_model(loaded, model)
    assert (
        loaded.config.to_dict().items()
        >= {
            key: value for key, value in model.config.to_dict().items() if key in ("intermediate_size", "ffn_dim")
        }.items()
    )
    for load in (AUTO, type(model)):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load.from_pretrained(tmp_path)
    prune(loaded, smaller := draw_plan(model, np.random.default_rng(3), 0.5, of=plan), present=plan)
    save_pruned(loaded, smaller, tmp_path)
    same_model(load_pruned(tmp_path), loaded)


def test_a_journal_that_outlived_its_model_is_ignored(tmp_path: Path) -> None:
    model = deep()
    plan = sliced(model)
    writer = ShardWriter(tmp_path)
    for name, tensors in pieces(model):
        writer.write(name, tensors)
    journal = (tmp_path / ".shards.json").read_bytes()
    writer.finish(skeleton(model, plan), plan)
    (tmp_path / ".shards.json").write_bytes(journal)  # killed between the plan and the end
    assert not ShardWriter(tmp_path).has("layer-0")
    same_model(load_pruned(tmp_path), model)
    ShardWriter(tmp_path).write("new", {"a": torch.zeros(1)})
    assert ShardWriter(tmp_path).has("new")
    assert {path.name for path in tmp_path.iterdir()} == {"model-new.safetensors", ".shards.json"}


def test_an_index_that_leads_elsewhere_removes_nothing_there(tmp_path: Path) -> None:
    model = deep()
    out = tmp_path / "out"
    write_all(out, model, sliced(model))
    (tmp_path / "mine").write_text("")
    index = out / "model.safetensors.index.json"
    for names in ({"a": "../mine", "b": str(tmp_path / "mine"), "c": 3}, 3):
        index.write_text(json.dumps({"weight_map": names}))
        whole = deep()
        save_pruned(whole, full_plan(whole), out)
        assert (tmp_path / "mine").exists()
        assert not index.exists()
        same_model(load_pruned(out), whole)


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    import resource

    writer = ShardWriter(tmp_path)
    writer.write("one", {"a": torch.zeros(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the same errors, from the same calls
    try:
        with pytest.raises(RunFolderError, match=r"^cannot write [^\n]*File too large[^\n]*$"):
            writer.write("two", {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ShardWriter(tmp_path).has("one")
    assert not ShardWriter(tmp_path).has("two")
    assert {path.name for path in tmp_path.iterdir()} == {"model-one.safetensors", ".shards.json"}


def test_a_bias_that_no_output_map_can_have_is_refused(tmp_path: Path) -> None:
    model = deep("mistral")
    add_biases(model, "model.layers.0.mlp.up_proj")
    save_pruned(model, full_plan(model), tmp_path)
    with pytest.raises(DataError, match=r"it has \(24,\) for model.layers.0.mlp.up_proj.bias, the plan nothing"):
        load_pruned(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of resident memory")
def test_no_more_than_a_shard_is_held(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    writer, size = ShardWriter(tmp_path), 2**22  # 16 MiB
    writer.write("0", {"a": torch.zeros(size)})
    before = resident()
    for index in range(1, 9):
        writer.write(str(index), {"a": torch.full((size,), float(index))})
    # One shard and its bytes may stay with the allocator; eight that were held would be past any doubt.
    assert resident() - before < 4 * 4 * size
