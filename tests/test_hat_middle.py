"""HAT's middle submodel in batches: no request's rows depend on what else is in a batch, or on how they came."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_edge.hat.attention import Span, grouped
from fl_edge.hat.caches import new_cache
from fl_edge.hat.middle import Item, Middle
from fl_edge.hat.pool import Pool
from fl_edge.hat.split import load_middle
from fl_edge.seeding import torch_rng
from tests.tiny_hat import CPU, MODELS, ONE_OF_EACH, save_model

WIDTH, CAPACITY, SLOTS = 32, 64, 5
TIGHT = {"atol": 1e-11, "rtol": 0.0}

trees = st.integers(1, 8).flatmap(lambda n: st.tuples(*(st.integers(-1, row - 1) for row in range(n))))


@cache
def folder(model: str) -> Path:
    return save_model(Path(mkdtemp()) / "model", model)


@cache
def plain(model: str) -> Any:
    return load_middle(folder(model), 2, CPU)


@cache
def middle(model: str) -> Middle:
    return Middle(load_middle(folder(model), 2, CPU), CAPACITY, SLOTS * CAPACITY)


def states(count: int, *name: int | str) -> Tensor:
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=torch_rng(0, "states", *name))


def reference(model: str, rows: Tensor) -> Tensor:
    """All at once, by transformers."""
    found: Tensor = plain(model)(rows[None])[0]
    return found


def run(model: str, *items: tuple[int, int, Tensor] | tuple[int, int, Tensor, Sequence[int]]) -> list[Tensor]:
    made = []
    for slot, base, rows, *parents in items:
        made.append(Item(Span(slot, base, len(rows), tuple(parents[0]) if parents else None), rows))
    return middle(model).run(made)


def close(found: Tensor, due: Tensor) -> None:
    torch.testing.assert_close(found, due, **TIGHT)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", MODELS)
def test_rows_of_a_batch_are_those_of_each_request_alone_in_transformers(model: str) -> None:
    lengths = (40, 3, 17, 1, 22)
    requests = [states(length + 6, slot) for slot, length in enumerate(lengths)]
    prompts = run(model, *((slot, 0, requests[slot][:length]) for slot, length in enumerate(lengths)))
    rounds = ((1, (2, 0, 1)), (2, (3, 1)), (2, (0, 2, 4)), (3, (4, 1, 3)))  # from where, and who takes part
    done = list(lengths)
    parts = [[each] for each in prompts]
    for count, those in rounds:
        found = run(model, *((slot, done[slot], requests[slot][done[slot] : done[slot] + count]) for slot in those))
        for slot, each in zip(those, found, strict=True):
            parts[slot].append(each)
            done[slot] += count
    for slot, request in enumerate(requests):
        close(torch.cat(parts[slot]), reference(model, request[: done[slot]]))


def test_rows_after_a_cache_of_transformers_are_the_same() -> None:
    prompt, draft, held = states(9, "prompt"), states(4, "draft"), new_cache()
    plain("qwen3")(prompt[None], held)
    due = plain("qwen3")(draft[None], held)[0]
    run("qwen3", (3, 0, prompt))
    close(run("qwen3", (3, 9, draft))[0], due)


@given(data=st.data(), model=st.sampled_from(ONE_OF_EACH))
@settings(max_examples=25, deadline=None)
def test_chunks_of_any_lengths_give_what_the_whole_prompt_gives(data: st.DataObject, model: str) -> None:
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=SLOTS), label="lengths")
    prompts = [states(length, slot, "chunks") for slot, length in enumerate(lengths)]
    done, parts = [0] * len(lengths), [[states(0)] for _ in lengths]
    while left := [slot for slot, length in enumerate(lengths) if done[slot] < length]:
        items = []
        for slot in data.draw(st.permutations(left)):
            count = data.draw(st.integers(1, lengths[slot] - done[slot]))
            items.append((slot, done[slot], prompts[slot][done[slot] : done[slot] + count]))
        for (slot, base, rows), found in zip(items, run(model, *items), strict=True):
            parts[slot].append(found)
            done[slot] = base + len(rows)
    for prompt, part in zip(prompts, parts, strict=True):
        close(torch.cat(part), reference(model, prompt))


@given(model=st.sampled_from(ONE_OF_EACH), length=st.integers(1, 40), base=st.integers(0, 40), draft=st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_what_is_cut_back_leaves_no_trace(model: str, length: int, base: int, draft: int) -> None:
    base = min(base, length)
    prompt, wrong, right = states(length, "cut"), states(8, "wrong"), states(draft, "right")
    run(model, (1, 0, prompt))
    run(model, (1, length, wrong), (0, 0, wrong))
    found = run(model, (2, 0, wrong), (1, base, right))[1]
    close(found, reference(model, torch.cat([prompt[:base], right]))[base:])


@given(model=st.sampled_from((*ONE_OF_EACH, "mistral")), tree=trees, other=trees, base=st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_each_path_of_a_draft_tree_is_the_chain_of_its_rows(
    model: str, tree: tuple[int, ...], other: tuple[int, ...], base: int
) -> None:
    prompt, rows, others = states(base, "tree"), states(len(tree), "rows"), states(len(other), "others")
    run(model, (2, 0, states(1, "first")), *([(0, 0, prompt)] if base else []))
    found, beside, chain = run(model, (0, base, rows, tree), (2, 1, others, other), (4, 0, others[:2]))
    for before, parents, drafts, answer in ((prompt, tree, rows, found), (states(1, "first"), other, others, beside)):
        for leaf in range(len(parents)):
            path = [leaf]
            while (parent := parents[path[0]]) >= 0:
                path.insert(0, parent)
            close(answer[path], reference(model, torch.cat([before, drafts[path]]))[len(before) :])
    close(chain, reference(model, others[:2]))


def test_kept_rows_of_a_tree_are_moved_behind_the_base() -> None:
    prompt, rows, draft = states(6, "kept"), states(5, "tree rows"), states(2, "next")
    run("qwen2", (3, 0, prompt))
    run("qwen2", (3, 6, rows, (-1, -1, 1, 0, 2)))
    middle("qwen2").pool.move(3, 6, (1, 2, 4))
    found = run("qwen2", (3, 9, draft))[0]
    close(found, reference("qwen2", torch.cat([prompt, rows[[1, 2, 4]], draft]))[9:])


def test_numbers_that_are_not_finite_in_undefined_memory_do_not_matter() -> None:
    short, long = states(2, "short"), states(13, "long")
    run("llama", (1, 0, long * torch.nan), (4, 0, short))
    for slot in (1, 4):
        middle("llama").pool.forget(slot, 0)
    found = run("llama", (1, 0, short), (4, 0, long))
    close(found[0], reference("llama", short))
    close(found[1], reference("llama", long))


def test_a_pool_gives_low_slots_first_and_none_when_all_are_taken() -> None:
    pool = Pool(1, 1, 1, 10, 35)
    assert (pool.slots, pool.free) == (3, 3)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, None]
    pool.give_back(2)
    pool.give_back(0)
    assert pool.free == 2
    assert pool.take() == 0


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4000)), min_size=1, max_size=20))
def test_groups_hold_every_span_once_and_pad_little(sizes: list[tuple[int, int]]) -> None:
    spans = [Span(slot, base, count) for slot, (count, base) in enumerate(sizes)]
    groups = grouped(spans)
    assert sorted(index for group in groups for index in group) == list(range(len(spans)))
    for group in groups:
        those = [spans[index] for index in group]
        assert [span.slot for span in those] == sorted(span.slot for span in those)
        work = sum(span.count * span.end for span in those)
        assert len(those) * max(span.count for span in those) * max(span.end for span in those) <= 2 * work
        assert len(those) == 1 or max(span.count for span in those) <= 16
