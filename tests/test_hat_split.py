"""The split model against the whole one: logits in float64, caches, tensors read, and models that cannot be split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from fl_edge.errors import ConfigError, DataError
from fl_edge.hat.caches import crop, fork, keep_branch, new_cache
from fl_edge.hat.split import DeviceModel, MiddleModel, default_shallow, load_device, load_middle
from fl_edge.models.shards import Shards
from tests.tiny_hat import CPU, MODELS, ONE_OF_EACH, WINDOW, draw_tokens, load_whole, save_model

LAYERS, LENGTH = 6, 3 * WINDOW
EXACT = 1e-12


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def save(model: str) -> Path:
        if model not in folders:
            folders[model] = save_model(tmp_path_factory.mktemp("model") / "saved", model, LAYERS, sharded=True)
        return folders[model]

    return save


def load(folder: Path, shallow: int = 2) -> tuple[DeviceModel, MiddleModel]:
    return load_device(folder, shallow, CPU), load_middle(folder, shallow, CPU)


class Split:
    """Device and cloud in one room."""

    def __init__(self, folder: Path, shallow: int = 2) -> None:
        self.device, self.middle = load(folder, shallow)
        self.caches: tuple[DynamicCache, DynamicCache] = new_cache(), new_cache()

    def run(self, tokens: Tensor) -> Tensor:
        shallow, deep = self.caches
        return self.device.head(self.middle(self.device.embed_and_run(tokens, shallow), deep))

    def crop(self, length: int) -> None:
        for cache in self.caches:
            crop(cache, length)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# logits


@pytest.mark.parametrize("model", MODELS)
def test_split_is_unsplit_in_one_run_in_steps_and_after_rolling_back(model: str, saved: Callable[[str], Path]) -> None:
    split, whole = Split(saved(model)), load_whole(saved(model))
    tokens, others = draw_tokens(2, LENGTH), draw_tokens(2, LENGTH, seed=2)
    assert distance(split.device.head(split.middle(split.device.embed_and_run(tokens))), whole(tokens).logits) < EXACT
    at = WINDOW + 3  # the prompt is longer than the window
    found = [split.run(tokens[:, :at])]
    found += [split.run(tokens[:, place : place + 1]) for place in range(at, LENGTH)]
    assert distance(torch.cat(found, 1), whole(tokens).logits) < EXACT
    split.crop(at - 2)  # into the prompt
    mixed = torch.cat((tokens[:, : at - 2], others[:, at - 2 :]), 1)
    found = [split.run(mixed[:, at - 2 : at + 3]), split.run(mixed[:, at + 3 :])]
    assert distance(torch.cat(found, 1), whole(mixed).logits[:, at - 2 :]) < EXACT


@pytest.mark.parametrize("shallow", range(1, LAYERS))
def test_every_cut_gives_the_same(shallow: int, saved: Callable[[str], Path]) -> None:
    folder = saved("qwen3, windows from layer 3")
    split = Split(folder, shallow)
    tokens = draw_tokens(1, LENGTH)
    assert distance(split.run(tokens), load_whole(folder)(tokens).logits) < EXACT
    assert split.device.shallow == split.middle.shallow == shallow
    assert len(split.device.body.layers) + len(split.middle.body.layers) == LAYERS


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_course_of_runs_and_roll_backs_ends_where_one_run_does(data: st.DataObject, saved: Any) -> None:
    split = Split(saved("mistral, windows"))
    kept = torch.empty(1, 0, dtype=torch.int64)
    for turn in range(data.draw(st.integers(1, 4))):
        new = draw_tokens(1, data.draw(st.integers(1, 7)), seed=turn)
        kept = torch.cat((kept, new), 1)
        logits = split.run(new)
        assert distance(logits, load_of(saved)(kept).logits[:, -new.shape[1] :]) < EXACT
        kept = kept[:, : data.draw(st.integers(0, kept.shape[1]))]
        split.crop(kept.shape[1])


_whole: list[Any] = []


def load_of(saved: Callable[[str], Path]) -> Any:
    if not _whole:
        _whole.append(load_whole(saved("mistral, windows")))
    return _whole[0]


def test_positions_can_be_given_to_the_middle(saved: Callable[[str], Path]) -> None:
    device, middle = load(saved("llama"))
    states, cache = device.embed_and_run(draw_tokens(2, 8)), new_cache()
    middle(states[:, :5], cache)
    places = torch.arange(5, 8)[None]
    assert distance(middle(states[:, 5:], cache, places), middle(states)[:, 5:]) < EXACT


def test_attention_of_the_middle_can_be_set(saved: Callable[[str], Path]) -> None:
    device, middle = load(saved("mistral, windows"))
    states = device.embed_and_run(draw_tokens(1, LENGTH))
    before = middle(states)
    middle.body.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in middle.body.layers} == {"eager"}
    assert device.config._attn_implementation == "sdpa"
    assert distance(middle(states), before) < 1e-5  # eager takes its softmax in float32


@pytest.mark.parametrize("model", ONE_OF_EACH)
def test_parts_are_frozen_and_build_no_graph(model: str, saved: Callable[[str], Path]) -> None:
    device, middle = load(saved(model))
    for part in (device, middle):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())
    rows = middle(device.embed_and_run(draw_tokens()))
    rows.requires_grad_()  # not an inference tensor: an adapter can learn from it
    assert not device.head(rows).requires_grad
    assert not device.draft_head(rows).requires_grad
    assert device.dtype == torch.float64
    assert device.device == CPU


def test_type_is_what_is_asked_for(saved: Callable[[str], Path]) -> None:
    device = load_device(saved("llama"), 2, CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in device.parameters()} == {torch.bfloat16}
    assert device.body.rotary_emb.inv_freq.dtype == torch.float32
    assert device.embed_and_run(draw_tokens()).dtype == torch.bfloat16


# what is read


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor was read as a whole; the digest's samples are apart."""
    names, plain = Counter[str](), Shards.read

    def record(self: Shards, name: str, device: Any, dtype: Any, rows: Any = None) -> Tensor:
        names[name if rows is None else f"rows of {name}"] += 1
        return plain(self, name, device, dtype, rows)

    monkeypatch.setattr(Shards, "read", record)
    return names


@pytest.mark.parametrize("model", MODELS)
def test_each_part_reads_its_own_tensors_once(model: str, saved: Callable[[str], Path], read: Counter[str]) -> None:
    folder = saved(model)
    shards = Shards(folder)
    sizes = {
        name: shards.tensors[name].dtype.itemsize * torch.Size(one.shape).numel()
        for name, one in shards.tensors.items()
    }

    def of_layer(name: str, numbers: range) -> bool:
        return any(name.startswith(f"model.layers.{number}.") for number in numbers)

    middle = load_middle(folder, 2, CPU)
    assert read == {name: 1 for name in sizes if of_layer(name, range(2, LAYERS))}
    assert middle.bytes_read == sum(sizes[name] for name in read)
    assert middle.bytes_read == sum(parameter.nbytes for parameter in middle.parameters())
    read.clear()
    device = load_device(folder, 2, CPU)
    whole = {name for name in read if not name.startswith("rows of ")}
    assert whole == {name for name in sizes if not of_layer(name, range(2, LAYERS))}
    assert max(read.values()) == 1
    assert not any(of_layer(name.removeprefix("rows of "), range(2, LAYERS)) for name in read)
    assert sum(sizes[name] for name in whole) == sum(parameter.nbytes for parameter in device.parameters())
    assert device.bytes_read >= sum(sizes[name] for name in whole)


def test_tied_head_is_one_tensor(saved: Callable[[str], Path]) -> None:
    tied, own = (load_device(saved(model), 1, CPU) for model in ("llama, tied head", "llama"))
    assert tied.lm_head.weight is tied.body.embed_tokens.weight
    assert own.lm_head.weight is not own.body.embed_tokens.weight


# identity


def test_identity_tells_weights_and_cuts_apart_but_not_types(saved: Callable[[str], Path], tmp_path: Path) -> None:
    first = load_device(saved("llama"), 2, CPU).identity
    again = load_device(saved("llama"), 2, CPU, torch.float16).identity
    assert first == again
    half = save_model(tmp_path / "half", "llama", LAYERS, torch.bfloat16)
    assert load_device(half, 2, CPU).identity == first
    assert load_device(saved("llama"), 1, CPU).identity != first
    tuned = load_whole(saved("llama"))
    tuned.model.layers[1].self_attn.o_proj.weight.data *= 1.01
    tuned.save_pretrained(tmp_path / "tuned")
    other = load_device(tmp_path / "tuned", 2, CPU).identity
    assert {key for key in first if first[key] != other[key]} == {"weights"}


# what cannot be split


@pytest.mark.parametrize(("layers", "kept"), [(4, 1), (16, 1), (17, 2), (28, 2), (32, 2), (40, 3), (80, 5)])
def test_default_cut_is_the_papers_where_it_has_one(layers: int, kept: int) -> None:
    assert default_shallow(layers) == kept


def test_default_cut_is_taken_for_0(saved: Callable[[str], Path]) -> None:
    assert load_device(saved("llama"), 0, CPU).shallow == load_middle(saved("llama"), 0, CPU).shallow == 1


@pytest.mark.parametrize("shallow", [-1, LAYERS, LAYERS + 1])
@pytest.mark.parametrize("part", [load_device, load_middle])
def test_cut_without_a_middle_is_refused(shallow: int, part: Any, saved: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=rf"shallow layers {shallow} are not allowed .* 6 layers; allowed: 1 to 5$"):
        part(saved("llama"), shallow, CPU)


def test_model_of_one_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allowed: none, since there is no middle"):
        load_device(save_model(tmp_path, "llama", 1), 0, CPU)


def test_other_families_are_refused(tmp_path: Path) -> None:
    from tests.tiny_transformers import make_model

    make_model("opt", "causal").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has the architecture 'opt'; HAT splits llama, mistral, qwen2, qwen3$"):
        load_middle(tmp_path, 1, CPU)


def test_positions_that_change_with_other_requests_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", 2)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="'dynamic' position embeddings"):
        load_device(tmp_path, 1, CPU)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the folder of a model"):
        load_device(tmp_path, 1, CPU)


# caches


def test_branches_of_a_fork_go_their_own_ways(saved: Callable[[str], Path]) -> None:
    split, whole = Split(saved("mistral, windows")), load_whole(saved("mistral, windows"))
    start, ends = draw_tokens(1, WINDOW + 2), draw_tokens(3, 4, seed=2)
    split.run(start)
    trunk = split.caches
    split.caches = fork(trunk[0], 3), fork(trunk[1], 3)
    expected = whole(torch.cat((start.expand(3, -1), ends), 1)).logits[:, -4:]
    found = [split.run(ends[:, :1]), split.run(ends[:, 1:3])]
    assert distance(torch.cat(found, 1), expected[:, :3]) < EXACT
    assert [cache.get_seq_length() for cache in trunk] == [WINDOW + 2] * 2  # untouched
    every = split.caches
    split.caches = keep_branch(every[0], 1), keep_branch(every[1], 1)
    split.crop(WINDOW + 4)
    assert distance(split.run(ends[1:2, 2:]), expected[1:2, 2:]) < EXACT
    assert {len(keys) for keys, *_ in every[0]} == {3}
    split.caches = trunk
    assert distance(split.run(ends[2:]), expected[2:]) < EXACT


def test_caches_keep_their_whole_past_behind_a_window(saved: Callable[[str], Path]) -> None:
    split = Split(saved("mistral, windows"))
    split.run(draw_tokens(1, LENGTH))
    assert {keys.shape[-2] for cache in split.caches for keys, *_ in cache} == {LENGTH}


@pytest.mark.parametrize("length", [-1, 5])
def test_crop_beyond_what_is_there_is_refused(length: int, saved: Callable[[str], Path]) -> None:
    split = Split(saved("llama"))
    split.run(draw_tokens(1, 4))
    with pytest.raises(ValueError, match=f"a cache of 4 tokens cannot be cropped to {length}"):
        split.crop(length)


def test_empty_cache_can_be_cropped_to_nothing() -> None:
    cache = new_cache()
    crop(cache, 0)
    assert cache.get_seq_length() == 0
