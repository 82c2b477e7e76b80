"""The adapter: shape, caches, positions, files; its loss against a plain re-statement, and that it learns."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fl_edge.errors import DataError, TrainingError
from fl_edge.hat.adapter import Adapter, load_adapter, new_adapter, save_adapter
from fl_edge.hat.caches import crop, fork, keep_branch
from fl_edge.hat.distillation import Course, Lessons, compare, distillation_loss, teach, train
from fl_edge.hat.split import DeviceModel, MiddleModel, load_device, load_middle
from fl_edge.seeding import torch_rng
from tests.tiny_hat import CPU, ONE_OF_EACH, WINDOW, draw_tokens, load_whole, save_model
from tests.tiny_transformers import make_config

EXACT = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Room:
    """A split model and an adapter of it."""

    folder: Path
    device: DeviceModel
    middle: MiddleModel
    adapter: Adapter


def draw(device: DeviceModel, seed: int = 0) -> Adapter:
    """An adapter in float64 of which every parameter is drawn, norms and biases included."""
    adapter = new_adapter(device, torch_rng(seed, "adapter")).double()
    generator = torch_rng(seed, "drawn")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


def furnish(folder: Path, model: str = "llama", shallow: int = 2) -> Room:
    save_model(folder, model, 4)
    device = load_device(folder, shallow, CPU)
    return Room(folder, device, load_middle(folder, shallow, CPU), draw(device))


@pytest.fixture(scope="module", params=ONE_OF_EACH)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Room:
    return furnish(tmp_path_factory.mktemp("each"), request.param)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    return furnish(tmp_path_factory.mktemp("room"))


def draw_states(sequences: int = 2, length: int = 2 * WINDOW, width: int = 32) -> Tensor:
    return torch.randn(sequences, length, width, generator=torch_rng(3, "states"), dtype=torch.float64)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


# shape


@pytest.mark.parametrize(
    ("width", "heads", "groups", "millions"), [(4096, 32, 32, 67.12), (5120, 40, 40, 104.87), (4096, 32, 8, 41.95)]
)
def test_size_is_the_papers(width: int, heads: int, groups: int, millions: float) -> None:
    shape = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": 32000}
    with torch.device("meta"):
        adapter = Adapter(make_config("llama", attention_bias=False, num_hidden_layers=32, **shape))
    count = sum(parameter.numel() for parameter in adapter.parameters())
    assert count == 2 * width**2 + 2 * width * (width * groups // heads) + 2 * width
    assert round(count / 1e6, 2) == millions


def test_parts_are_the_base_models_own(each: Room) -> None:
    layer = each.device.body.layers[0]
    assert type(each.adapter.attention) is type(layer.self_attn)
    assert type(each.adapter.input_norm) is type(layer.input_layernorm)
    names = {f"attention.{name}" for name in layer.self_attn.state_dict()}
    assert each.adapter.state_dict().keys() == names | {"input_norm.weight", "output_norm.weight"}


def test_base_configuration_stays_as_it_is(each: Room) -> None:
    before = each.device.config.to_dict()
    Adapter(each.device.config)
    assert each.device.config.to_dict() == before


@torch.no_grad()
def test_block_is_as_written(room: Room) -> None:
    """One head at a time, from the formula: u = h + Attn(RMSNorm(h)), f = RMSNorm(u)."""
    adapter, config, (states, *_) = room.adapter, room.device.config, draw_states()
    length, size = len(states), config.head_dim

    def norm(values: Tensor, weight: Tensor) -> Tensor:
        return weight * (values / (values.pow(2).mean(-1, keepdim=True) + float(config.rms_norm_eps)).sqrt())

    def turn(values: Tensor) -> Tensor:
        rate: Tensor = float(config.rope_parameters["rope_theta"]) ** (-torch.arange(0, size, 2).double() / size)
        angle = torch.arange(length)[:, None] * rate.repeat(2)
        half = torch.cat((-values[:, size // 2 :], values[:, : size // 2]), -1)
        return values * angle.cos() + half * angle.sin()

    linear: Any = adapter.attention
    entering, leaving = norm(states, adapter.input_norm.get_parameter("weight")), []
    query, key, value = (part(entering).split(size, -1) for part in (linear.q_proj, linear.k_proj, linear.v_proj))
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
    for head, one in enumerate(query):
        group = head * len(key) // len(query)
        scores = turn(one) @ turn(key[group]).T / size**0.5
        leaving.append(scores.masked_fill(ahead, -torch.inf).softmax(-1) @ value[group])
    plain = norm(states + linear.o_proj(torch.cat(leaving, -1)), adapter.output_norm.get_parameter("weight"))
    assert distance(adapter(states[None])[0], plain) < 1e-5  # transformers' norms and angles are in float32


# caches and positions


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 2 * WINDOW - 1), unique=True, max_size=4).map(sorted))
def test_step_by_step_is_at_once(each: Room, cuts: list[int]) -> None:
    states, cache = draw_states(), each.adapter.new_cache()
    parts = torch.tensor_split(states, cuts, 1)
    found = torch.cat([each.adapter(part, cache) for part in parts], 1)
    assert distance(found, each.adapter(states)) < EXACT
    assert cache.get_seq_length() == states.shape[1]


def test_cache_rolls_back_and_forks(each: Room) -> None:
    states, cache = draw_states(3), each.adapter.new_cache()
    first = states[:1].expand(3, -1, -1)
    each.adapter(states[:1], cache)
    crop(cache, 4)
    branches = fork(cache, 3)
    mixed = torch.cat((first[:, :4], states[:, 4:]), 1)
    expected = each.adapter(mixed)
    assert distance(each.adapter(states[:, 4:7], branches), expected[:, 4:7]) < EXACT
    assert distance(each.adapter(states[2:, 7:], keep_branch(branches, 2)), expected[2:, 7:]) < EXACT
    assert cache.get_seq_length() == 4


def test_attention_reaches_behind_the_models_window(tmp_path: Path) -> None:
    adapter = furnish(tmp_path, "mistral, windows").adapter
    states = draw_states()
    changed = states.clone()
    changed[:, 0] += 1
    assert distance(adapter(changed)[:, -1], adapter(states)[:, -1]) > 1e-6


def test_graph_is_built_to_learn_and_not_to_draft(room: Room) -> None:
    assert room.adapter(draw_states()).requires_grad
    assert not room.adapter(draw_states(), room.adapter.new_cache()).requires_grad


def test_frequencies_outlive_a_change_of_type(room: Room) -> None:
    there = copy.deepcopy(room.adapter).to(torch.bfloat16)
    assert torch.equal(there._rotary[0].inv_freq, room.device.body.rotary_emb.inv_freq)
    assert distance(there.double()(draw_states()), room.adapter(draw_states())) < 0.1


def test_output_norm_begins_as_the_final_norm(each: Room) -> None:
    adapter = new_adapter(each.device, torch_rng(0, "adapter"))
    assert distance(adapter.output_norm.get_parameter("weight"), each.device.norm.get_parameter("weight")) < 1e-6
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_weights_depend_on_the_generator_alone(room: Room) -> None:
    torch.manual_seed(1)
    one = new_adapter(room.device, torch_rng(5, "adapter")).state_dict()
    torch.manual_seed(2)
    other = new_adapter(room.device, torch_rng(5, "adapter")).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


# files


def test_adapter_comes_back_from_its_file(each: Room, tmp_path: Path) -> None:
    save_adapter(each.adapter, each.device, tmp_path / "adapter.safetensors")
    back = load_adapter(tmp_path / "adapter.safetensors", each.device)
    assert distance(back(draw_states()), each.adapter(draw_states())) == 0
    assert not any(parameter.requires_grad for parameter in back.parameters())
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_adapter_takes_the_devices_type(room: Room, tmp_path: Path) -> None:
    save_adapter(room.adapter, room.device, tmp_path / "adapter.safetensors")
    half = load_device(room.folder, 2, CPU, torch.bfloat16)
    back = load_adapter(tmp_path / "adapter.safetensors", half)
    assert {parameter.dtype for parameter in back.parameters()} == {torch.bfloat16}
    assert back(half.embed_and_run(draw_tokens()), back.new_cache()).dtype == torch.bfloat16


def test_adapter_of_another_cut_or_other_weights_is_refused(room: Room, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    save_adapter(room.adapter, room.device, file)
    with pytest.raises(
        DataError, match=r"adapter\.safetensors is an adapter of another model: shallow, weights differ$"
    ):
        load_adapter(file, load_device(room.folder, 1, CPU))
    tuned = load_whole(room.folder)
    tuned.lm_head.weight.data *= 1.01
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(DataError, match=r"of another model: weights differ$"):
        load_adapter(file, load_device(tmp_path / "tuned", 2, CPU))


@pytest.mark.parametrize("kind", ["nothing", "garbage", "cut short", "no record", "no JSON", "a list"])
def test_what_is_no_adapter_is_refused(kind: str, room: Room, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    save_adapter(room.adapter, room.device, file)
    whole, tensors = file.read_bytes(), dict(room.adapter.state_dict())
    if kind == "nothing":
        file.unlink()
    elif kind == "garbage":
        file.write_bytes(b"\0" * 100)
    elif kind == "cut short":
        file.write_bytes(whole[:-1])
    else:
        records = {"no record": None, "no JSON": {"fits": "{"}, "a list": {"fits": "[]"}}
        save_file(tensors, file, records[kind])
    with pytest.raises(DataError, match=r"adapter\.safetensors is (no adapter|an adapter of another model)"):
        load_adapter(file, room.device)


def test_other_tensors_are_refused(room: Room, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({"x": torch.zeros(1)}, file, {"fits": json.dumps(room.device.identity)})
    with pytest.raises(DataError, match="does not hold the tensors of an adapter of llama"):
        load_adapter(file, room.device)


# learning


def draw_lessons(room: Room, sequences: int = 6, length: int = 9, seed: int = 1) -> Lessons:
    return teach(room.device, room.middle, draw_tokens(sequences, length, seed), batch_size=4)


def test_lessons_are_what_the_whole_model_gives(each: Room) -> None:
    tokens = draw_tokens(6, 2 * WINDOW)
    lessons = teach(each.device, each.middle, tokens, batch_size=4)
    whole = load_whole(each.folder)(tokens, output_hidden_states=True)
    assert distance(lessons.states, whole.hidden_states[2]) < EXACT
    assert distance(each.device.norm(lessons.rows), whole.hidden_states[-1]) < EXACT
    assert lessons.mask.all()
    assert len(lessons) == 6


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), weight=st.sampled_from([0.0, 0.1, 2.0]))
def test_loss_is_as_written(room: Room, seed: int, weight: float) -> None:
    lessons = draw_lessons(room, 2, 5, seed)
    mask = torch.rand(2, 5, generator=torch_rng(seed, "mask")) < 0.6
    loss = distillation_loss(room.adapter, room.device, lessons.states, lessons.rows, mask, weight)
    terms = []
    head = room.device.lm_head.weight
    features = room.adapter(lessons.states)
    for sequence, place in mask.nonzero().tolist():
        found, wanted = features[sequence, place], room.device.norm(lessons.rows[sequence, place])
        gap = (found - wanted).abs()
        smooth = torch.where(gap < 1, gap**2 / 2, gap - 0.5).sum() / len(gap)
        target, guess = (head @ wanted).softmax(-1), (head @ found).softmax(-1)
        terms.append(smooth - weight * (target * guess.log()).sum())
    expected = sum(terms) / len(terms) if terms else torch.zeros(())
    assert distance(loss, torch.as_tensor(expected)) < 1e-9


def test_loss_changes_the_adapter_alone(room: Room) -> None:
    adapter, lessons = copy.deepcopy(room.adapter), draw_lessons(room)
    distillation_loss(adapter, room.device, lessons.states, lessons.rows, lessons.mask).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
    assert not any(parameter.grad is not None for parameter in room.device.parameters())


def test_adapter_in_float32_learns_beside_a_model_in_bfloat16(room: Room) -> None:
    device, middle = load_device(room.folder, 2, CPU, torch.bfloat16), load_middle(room.folder, 2, CPU, torch.bfloat16)
    lessons = teach(device, middle, draw_tokens(4, 6))
    assert lessons.states.dtype == lessons.rows.dtype == torch.bfloat16
    adapter = new_adapter(device, torch_rng(0, "adapter"))
    loss = distillation_loss(adapter, device, lessons.states, lessons.rows, lessons.mask)
    exact = distillation_loss(
        copy.deepcopy(adapter).double(), room.device, *dataclasses.astuple(draw_lessons(room, 4, 6))
    )
    assert loss.dtype == torch.float32
    assert distance(loss, exact) < 0.05
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_tokens_that_do_not_count_change_nothing(room: Room) -> None:
    lessons, mask = draw_lessons(room), torch.ones(6, 9, dtype=torch.bool)
    mask[:, 6:] = False  # filled up at the end
    other = lessons.rows.clone()
    other[:, 6:] += 1
    states = lessons.states.clone()
    states[:, 6:] += 1
    first = distillation_loss(room.adapter, room.device, lessons.states, lessons.rows, mask)
    assert first == distillation_loss(room.adapter, room.device, states, other, mask)


def test_perfect_student_has_full_marks(room: Room) -> None:
    lessons = draw_lessons(room)

    class Perfect(Adapter):
        def forward(self, states: Tensor, cache: Any = None, parents: Any = None) -> Tensor:
            answer: Tensor = room.device.norm(lessons.rows.to(states))
            return answer

    likeness = compare(Perfect(room.device.config).double(), room.device, lessons, batch_size=6)
    assert likeness.agreement == 1
    assert likeness.overlap == pytest.approx(1)


def test_likeness_is_as_written_whatever_the_batches(room: Room) -> None:
    lessons = dataclasses.replace(draw_lessons(room), mask=torch.rand(6, 9, generator=torch_rng(1, "mask")) < 0.7)
    whole = compare(room.adapter, room.device, lessons, batch_size=6)
    parts = compare(room.adapter, room.device, lessons, batch_size=4)
    assert dataclasses.astuple(whole) == pytest.approx(dataclasses.astuple(parts))
    p = room.device.draft_head(room.adapter(lessons.states))[lessons.mask].softmax(-1)
    q = room.device.head(lessons.rows)[lessons.mask].softmax(-1)
    assert whole.overlap == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()))
    assert whole.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    loss = distillation_loss(room.adapter, room.device, lessons.states, lessons.rows, lessons.mask)
    assert whole.loss == pytest.approx(float(loss.detach()))


COURSE = Course(steps=60, batch_size=8, rate=1e-2)


def in_float32(folder: Path, shallow: int) -> tuple[DeviceModel, MiddleModel]:
    return load_device(folder, shallow, CPU, torch.float32), load_middle(folder, shallow, CPU, torch.float32)


def test_adapter_learns(each: Room) -> None:
    device, middle = in_float32(each.folder, 3)  # the adapter stands in for one layer
    lessons, held_out = teach(device, middle, draw_tokens(32, 24, 1)), teach(device, middle, draw_tokens(8, 24, 2))
    adapter = new_adapter(device, torch_rng(0, "adapter"))
    before, losses = compare(adapter, device, held_out), list[float]()
    train(adapter, device, lessons, COURSE, 0, lambda step, loss: losses.append(loss))
    after = compare(adapter, device, held_out)
    assert len(losses) == COURSE.steps
    assert after.loss < before.loss
    assert after.agreement > before.agreement + 0.1
    assert 1 - after.overlap < 0.7 * (1 - before.overlap)
    assert not adapter.training


def test_course_depends_on_the_seed_alone(room: Room) -> None:
    device, middle = in_float32(room.folder, 2)
    lessons = teach(device, middle, draw_tokens(8, 6))
    short = dataclasses.replace(COURSE, steps=3, batch_size=2)

    def run(seed: int) -> list[float]:
        losses: list[float] = []
        train(new_adapter(device, torch_rng(0, "a")), device, lessons, short, seed, lambda _, x: losses.append(x))
        return losses

    assert run(1) == run(1) != run(2)


def test_loss_that_is_no_number_ends_the_course(room: Room) -> None:
    lessons = draw_lessons(room)
    lessons.rows[:, 2] = torch.nan
    with pytest.raises(TrainingError, match="the loss of step 1 is not a number"):
        train(copy.deepcopy(room.adapter), room.device, lessons, COURSE, 0)
