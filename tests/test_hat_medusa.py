"""U-Medusa: trees, heads, their training and files, and the whole model's text whatever the heads say."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_edge.errors import DataError
from fl_edge.hat.adapter import save_adapter
from fl_edge.hat.caches import keep_rows
from fl_edge.hat.distillation import Course, teach
from fl_edge.hat.generation import Generation, Rules, generate
from fl_edge.hat.medusa import MedusaHeads, MedusaTrees, load_heads, new_heads, save_heads
from fl_edge.hat.medusa_training import measure, medusa_loss, train_heads
from fl_edge.hat.messages import Upload
from fl_edge.hat.pace import FixedPace
from fl_edge.hat.sampling import Sampler
from fl_edge.hat.split import load_device, load_middle
from fl_edge.hat.trees import Tree, best_tree, depths
from fl_edge.seeding import torch_rng
from tests.stub_hat import LARGE, VOCABULARY, StubDevice, StubLink, lines, text_after
from tests.tiny_hat import CPU, MODELS, draw_tokens, save_model
from tests.tiny_hat_site import BASE, Site, serve

EXACT = 1e-12


def distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).detach().abs().max())


# trees


@given(
    accuracies=st.lists(st.lists(st.floats(0.01, 0.5), min_size=1, max_size=3), min_size=1, max_size=3),
    rows=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_no_tree_of_so_many_rows_promises_more(accuracies: list[list[float]], rows: int) -> None:
    ordered = [sorted(each, reverse=True) for each in accuracies]
    tree = best_tree(ordered, rows)
    chances = [1.0]
    for parent, rank, depth in list(zip(tree.parents, tree.ranks, tree.depths, strict=True))[1:]:
        assert 0 <= parent < len(chances)
        chances.append(chances[parent] * ordered[depth - 1][rank])
    assert len(set(zip(tree.parents, tree.ranks, strict=True))) == len(tree.parents)
    paths = [path for deep in range(1, len(ordered) + 1) for path in itertools.product(*map(enumerate, ordered[:deep]))]
    best = sorted((torch.tensor([chance for _, chance in path]).double().prod().item() for path in paths), reverse=True)
    assert sum(chances[1:]) == pytest.approx(sum(best[: rows - 1]))  # no rows at all can do better than the likeliest


def test_a_tree_that_is_cut_is_one_still() -> None:
    tree = Tree((-1, 0, 1, 0, 2, 3), (0, 0, 0, 1, 0, 1))
    assert tree.depths == depths(tree.parents) == [0, 1, 2, 1, 3, 2]
    assert tree.cut(2) == Tree((-1, 0, 1, 0, 3), (0, 0, 0, 1, 1))
    assert tree.cut(0) == Tree((-1,), (0,))
    assert lines((-1, 0, 1, 0))[3] == [True, False, False, True]


@pytest.mark.parametrize("name", MODELS)
def test_every_way_through_a_tree_has_the_states_of_its_chain(name: str, tmp_path: Path) -> None:
    device = load_device(save_model(tmp_path, name), 4, CPU)
    before, tree, parents = draw_tokens(1, 7), draw_tokens(1, 7, seed=2), (-1, 0, 0, 1, 2, 3, 5)
    cache = device.new_cache()
    device.embed_and_run(before, cache)
    states = device.embed_and_run(tree, cache, parents)
    for row, line in enumerate(lines(parents)):
        path = [place for place, there in enumerate(line) if there]
        alone = device.embed_and_run(torch.cat((before, tree[:, path]), 1))
        assert distance(states[0, row], alone[0, -1]) < EXACT
    keep_rows(cache, 7, [0, 2, 4])
    assert cache.get_seq_length() == 10
    after = draw_tokens(1, 2, seed=3)
    whole = device.embed_and_run(torch.cat((before, tree[:, [0, 2, 4]], after), 1))
    assert distance(device.embed_and_run(after, cache), whole[:, -2:]) < EXACT


# the loop, with heads that are right where a test says


class StubHeads(MedusaHeads):
    """Heads that know the text; ``ranks`` says at which rank they have the right token, by place in turn, if at all."""

    def __init__(self, text: Sequence[int], ranks: Sequence[int | None], heads: int = 3) -> None:
        super().__init__(2, VOCABULARY, heads)
        self.text, self.right = list(text), ranks
        self.accuracies[:] = 0.5 ** torch.arange(1, self.accuracies.shape[1] + 1)

    def forward(self, features: Tensor) -> Tensor:
        place = int(features[0, 1])
        found = torch.zeros(len(self), 1, VOCABULARY)
        for head in range(len(self)):
            at = place + 1 + head
            token, rank = self.text[at % len(self.text)], self.right[at % len(self.right)]
            order = [each for each in range(VOCABULARY) if each != token]
            if rank is not None:
                order.insert(rank, token)
            found[head, 0, order] = LARGE - torch.arange(len(order)).float()
        return found


PROMPT = [3, 1, 4, 1, 5]


def begin(heads: MedusaHeads, new_tokens: int, rows: int, chunk: int = 0) -> Generation:
    device, sampler = StubDevice(), Sampler()
    proposer = MedusaTrees(device, heads, sampler, rows)
    return Generation(
        device, proposer, sampler, FixedPace(chunk), Rules(new_tokens, 64), 7, torch.tensor(PROMPT, dtype=torch.int64)
    )


@given(
    ranks=st.lists(st.one_of(st.none(), st.integers(0, 2)), min_size=1, max_size=7),
    new_tokens=st.integers(1, 20),
    rows=st.integers(1, 12),
    chunk=st.integers(0, 3),
    fresh=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_text_is_the_whole_models(
    ranks: list[int | None], new_tokens: int, rows: int, chunk: int, fresh: bool
) -> None:
    expected, link = text_after(PROMPT, new_tokens), StubLink()
    heads = StubHeads(PROMPT + expected, ranks)
    generation = begin(heads, new_tokens, rows, chunk)
    while generation.sent < len(PROMPT):
        link.send(generation.next_chunk())
    while not generation.over:
        if fresh:  # another process goes on
            before, generation = generation, begin(heads, new_tokens, rows, chunk)
            generation.restore(before.text, before.sent, before.pending, before.parents)
        generation.take_in(link.receive().rows)
        if not generation.over:
            link.send(generation.propose())
    assert generation.text == expected
    link.holds(PROMPT + expected)


def test_what_the_tree_has_is_accepted_and_kept() -> None:
    expected, link = text_after(PROMPT, 16), StubLink()
    tree = best_tree(StubHeads(expected, [0]).accuracies.tolist(), 10)
    assert {0, 1} <= {rank for rank, depth in zip(tree.ranks, tree.depths, strict=True) if depth == 1}
    rounds = list(generate(begin(StubHeads(PROMPT + expected, [0, 1]), 16, 10), link))
    assert max(each.accepted for each in rounds) >= 2
    assert all(each.drafted <= 9 for each in rounds)
    kept = [upload.kept for upload in link.uploads]
    assert kept[:2] == [None, None]  # a prompt, and what comes after it
    assert any(each not in (None, tuple(range(len(each)))) for each in kept if each)
    assert [len(each.tokens) for each in rounds[1:-1]] == [len(each or ()) for each in kept[2:]]


def test_a_tree_ends_with_the_text() -> None:
    link = StubLink()
    assert sum(len(each.tokens) for each in generate(begin(StubHeads([1], [0]), 3, 12), link)) == 3
    assert all(max(depths(upload.parents)) + upload.base < len(PROMPT) + 3 for upload in link.uploads if upload.parents)


# heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), dtype=torch.float32)


def test_new_heads_say_what_the_models_own_says(folder: Path) -> None:
    device = load_device(folder, 2, CPU)
    heads, rows = new_heads(device, 3), torch.randn(5, 32, generator=torch_rng(0, "rows"))
    assert distance(heads(device.norm(rows)), device.head(rows).expand(3, 5, -1)) < 1e-5
    assert sum(each.numel() for each in heads.parameters()) == 3 * (32 * 33 + 32 * 64)


def test_loss_is_as_written(folder: Path) -> None:
    device, middle = load_device(folder, 2, CPU, torch.float64), load_middle(folder, 2, CPU, torch.float64)
    lessons = teach(device, middle, draw_tokens(2, 6))
    mask = torch.rand(2, 6, generator=torch_rng(3, "mask")) < 0.8
    heads = new_heads(device, 2).double()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch_rng(0, "drawn")), alpha=0.1)
    features, weight = device.norm(lessons.rows), device.lm_head.weight
    expected = torch.zeros((), dtype=torch.float64)
    for head in (0, 1):
        terms = []
        for text, place in itertools.product(range(2), range(6)):
            further = place + head + 1
            if further < 6 and mask[text, place] and mask[text, further]:
                target = (weight @ features[text, further]).softmax(-1)
                terms.append(-(target * heads.logits(head, features[text, place]).log_softmax(-1)).sum())
        expected += 0.8 ** (head + 1) * torch.stack(terms).mean()
    assert distance(medusa_loss(heads, device, lessons.rows, mask), expected) < EXACT


def test_heads_learn_and_know_how_well(folder: Path) -> None:
    device, middle = load_device(folder, 2, CPU), load_middle(folder, 2, CPU)
    line = torch.arange(2, 50) % 7 + 2  # a text of which the next tokens follow
    lessons = teach(device, middle, torch.stack([line.roll(shift) for shift in range(7)]))
    heads, losses = new_heads(device, 2), list[float]()
    before = measure(heads, device, lessons)
    train_heads(heads, device, lessons, Course(steps=60, rate=1e-2), 0, lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0]
    assert heads.accuracies[:, 0].min() > before[:, 0].max() + 0.1
    assert bool((heads.accuracies.sum(1) <= 1 + 1e-6).all())
    assert not any(parameter.grad is not None for parameter in device.parameters())


def test_files_of_heads(folder: Path, tmp_path: Path) -> None:
    device = load_device(folder, 2, CPU)
    heads, file = new_heads(device, 2), tmp_path / "heads.safetensors"
    heads.accuracies[0, 0] = 0.25
    save_heads(heads, device, file)
    back = load_heads(file, device)
    assert len(back) == 2
    assert torch.equal(back.accuracies, heads.accuracies)
    assert torch.equal(back(torch.ones(1, 32)), heads(torch.ones(1, 32)))
    assert not any(parameter.requires_grad for parameter in back.parameters())
    with pytest.raises(DataError, match="is a set of Medusa heads of another model: shallow, weights differ"):
        load_heads(file, load_device(folder, 1, CPU))
    with pytest.raises(DataError, match="is no set of Medusa heads, or a damaged one"):
        load_heads(tmp_path / "none", device)


def test_an_adapter_is_no_set_of_heads(tmp_path: Path) -> None:
    site = Site(tmp_path, "llama")
    save_adapter(site.adapter, site.device, tmp_path / "adapter")
    with pytest.raises(DataError, match="does not hold the tensors of a set of Medusa heads of llama"):
        load_heads(tmp_path / "adapter", site.device)


# on a real model and a real cloud


def wide_heads(site: Site) -> MedusaHeads:
    """Untrained, but with so many tokens of each that some hold."""
    heads = new_heads(site.device, 3).double()
    heads.accuracies[:] = 0.5 * 0.9 ** torch.arange(heads.accuracies.shape[1])
    return heads


@pytest.mark.parametrize("name", ["llama", "mistral, windows", "qwen2, windows from layer 3", "qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_split_text_is_the_whole_models(name: str, temperature: float, tmp_path: Path) -> None:
    site = Site(tmp_path, name)
    prompts = [draw_tokens(1, 9 + 4 * place, seed=place)[0] for place in range(3)]
    config = replace(BASE, temperature=temperature, top_p=0.95)
    texts, expected = [list[int]() for _ in prompts], [list[int]() for _ in prompts]
    heads = wide_heads(site)
    trees = [
        site.session(replace(config, tree_rows=rows), text, 3, heads)
        for rows, text in zip((1, 8, 40), texts, strict=True)
    ]
    serve(site.cloud(), trees, prompts)
    serve(site.cloud(), [site.session(replace(config, max_drafts=0, guesses=0), text, 3) for text in expected], prompts)
    assert texts == expected
    if not temperature:
        assert texts == [site.expected(prompt) for prompt in prompts]
    assert sum(session.account.accepted for session in trees) > 0


def test_a_session_with_trees_goes_on_in_a_fresh_process(tmp_path: Path) -> None:
    site, prompt, heard = Site(tmp_path, "llama"), draw_tokens(1, 9)[0], list[int]()
    cloud, heads = site.cloud(), wide_heads(site)
    config = replace(BASE, chunking="none", tree_rows=24)
    session = site.session(config, heard, 0, heads)
    upload: Upload | None = session.begin(5, prompt)
    while upload is not None:
        record = session.to_record()
        session = site.session(config, heard, 0, heads)
        session.restore(record, prompt)
        assert session.stands_at(record)
        cloud.submit("a", upload, 0.0)
        ((_, answer),) = cloud.step(0.0)
        upload = session.answer(answer)  # type: ignore[arg-type]
    assert heard == site.expected(prompt)
