"""Aggregation of LoRA factors against dense algebra: ranks, pruned shapes, what nobody holds, what cannot be summed."""

import weakref
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_edge.errors import ConfigError
from fl_edge.fedspine import lowrank
from fl_edge.fedspine.aggregation import Rule, aggregate, truncate
from fl_edge.fedspine.factors import Factors, Part, gather, scatter

seeds = st.integers(0, 2**32 - 1)
RULES: tuple[Rule, ...] = get_args(Rule)
OUT, IN, RANK = 24, 20, 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_factors(rng: np.random.Generator, rank: int, rows: int = OUT, columns: int = IN) -> Factors:
    a, b = rng.normal(size=(rank, columns)), rng.normal(size=(rows, rank))
    return Factors(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32))


def draw_indices(rng: np.random.Generator, width: int) -> Tensor:
    return torch.tensor(np.sort(rng.choice(width, size=rng.integers(1, width + 1), replace=False)))


def draw_parts(
    rng: np.random.Generator, count: int, cut: str = "", shape: tuple[int, int] = (OUT, IN), max_rank: int = RANK
) -> list[Part]:
    """Parts of random ranks; of those, two thirds lack rows and/or columns, as ``cut`` names them."""
    parts = []
    for _ in range(count):
        rows, columns = (
            draw_indices(rng, width) if name in cut and rng.random() < 2 / 3 else None
            for name, width in zip(("rows", "columns"), shape, strict=True)
        )
        sizes = [w if kept is None else len(kept) for w, kept in zip(shape, (rows, columns), strict=True)]
        factors = draw_factors(rng, int(rng.integers(1, max_rank + 1)), *sizes)
        parts.append(Part(factors, float(rng.uniform(0.1, 3)), rows, columns))
    return parts


def product(factors: Factors) -> Tensor:
    return factors.b.double() @ factors.a.double()


def best_dense(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return best


def dense_mean(parts: Sequence[Part], previous: Factors, by_rank: bool = False) -> Tensor:
    """The holders' mean of the products, entry by entry and, if asked, direction by direction, in loops."""
    shape = (len(previous.b), previous.a.shape[1])
    levels = max([previous.rank, *(part.factors.rank for part in parts)])
    groups = [[level] for level in range(levels)] if by_rank else [list(range(levels))]
    mean = torch.zeros(shape, dtype=torch.float64)
    for group in groups:
        total, weight = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        for part in parts:
            own = [level for level in group if level < part.factors.rank]
            if not own:
                continue
            rows = torch.arange(shape[0]) if part.rows is None else part.rows
            columns = torch.arange(shape[1]) if part.columns is None else part.columns
            held = part.factors.b[:, own].double() @ part.factors.a[own].double()
            total[rows[:, None], columns] += part.weight * held
            weight[rows[:, None], columns] += part.weight
        own = [level for level in group if level < previous.rank]
        old = previous.b[:, own].double() @ previous.a[own].double()
        mean += torch.where(weight > 0, total / weight, old)
    return mean


def assert_same(found: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    assert torch.linalg.norm(found - expected) <= relative * torch.linalg.norm(expected)


cuts = st.sampled_from(["", "rows", "columns"])


@given(seed=seeds, count=st.integers(1, 6), cut=cuts, by_rank=st.booleans(), square=st.booleans())
@settings(max_examples=80, deadline=None)
def test_products_agree_with_the_dense_mean(seed: int, count: int, cut: str, by_rank: bool, square: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = (OUT, OUT) if square else (OUT, IN)
    parts, previous = draw_parts(rng, count, cut, shape), draw_factors(rng, RANK, *shape)
    rank = int(rng.integers(1, RANK + 1))
    mean = dense_mean(parts, previous, by_rank)
    rule: Rule = "rank_partitioned" if by_rank else "flexlora"
    found = aggregate(rule, iter(parts), previous, rank, generator())
    assert (found.a.shape, found.b.shape) == ((rank, shape[1]), (shape[0], rank))
    assert found.a.dtype == found.b.dtype == torch.float32
    assert found.a.is_contiguous()
    assert found.b.is_contiguous()
    s = torch.linalg.svdvals(mean)
    best_error = float((s[rank:] ** 2).sum().sqrt())
    assert torch.linalg.norm(product(found) - mean) <= best_error + 1e-6 * torch.linalg.norm(mean)
    if s[rank - 1] > 1.01 * s[rank]:
        assert_same(product(found), best_dense(mean, rank), 3e-6)
    if not by_rank:
        assert_same(product(aggregate("stacking", iter(parts), previous, rank, generator())), mean)


@given(seed=seeds, count=st.integers(1, 5), cut=st.sampled_from(["", "rows", "columns", "rows columns"]))
@settings(max_examples=60, deadline=None)
def test_masked_mean_agrees_with_loops(seed: int, count: int, cut: str) -> None:
    rng = np.random.default_rng(seed)
    parts, previous = draw_parts(rng, count, cut), draw_factors(rng, RANK)
    found = aggregate("masked_mean", iter(parts), previous, RANK, generator())
    zeros = Factors(torch.zeros(RANK, IN), torch.zeros(OUT, RANK))
    ones = [Factors(torch.ones_like(p.factors.a), torch.ones_like(p.factors.b)) for p in parts]
    values = [scatter(p.factors, zeros, p.rows, p.columns) for p in parts]
    held = [scatter(one, zeros, p.rows, p.columns) for one, p in zip(ones, parts, strict=True)]
    for side in ("a", "b"):
        old, new = getattr(previous, side), getattr(found, side)
        for spot in np.ndindex(*old.shape):
            owners = [i for i, mask in enumerate(held) if getattr(mask, side)[spot] > 0]
            total = sum(parts[i].weight * float(getattr(values[i], side)[spot]) for i in owners)
            weight = sum(parts[i].weight for i in owners)
            expected = total / weight if owners else float(old[spot])
            assert float(new[spot]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(seed=seeds, rule=st.sampled_from(RULES), cut=cuts)
@settings(max_examples=60, deadline=None)
def test_the_order_of_devices_does_not_matter(seed: int, rule: Rule, cut: str) -> None:
    rng = np.random.default_rng(seed)
    parts, previous = draw_parts(rng, 4, cut), draw_factors(rng, RANK)
    first = aggregate(rule, iter(parts), previous, RANK, generator())
    second = aggregate(rule, reversed(parts), previous, RANK, generator())
    expected = product(first)
    if rule in ("flexlora", "rank_partitioned"):  # the cut is only as sharp as the gap between singular values
        s = torch.linalg.svdvals(dense_mean(parts, previous, rule == "rank_partitioned"))
        if s[RANK - 1] < 1.01 * s[RANK]:
            return
    assert_same(product(second), expected, 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_the_same_call_gives_the_same_bits(rule: Rule) -> None:
    rng = np.random.default_rng(5)
    parts, previous = draw_parts(rng, 5, "rows", max_rank=2), draw_factors(rng, RANK)
    runs = [aggregate(rule, iter(parts), previous, RANK, generator(3)) for _ in range(2)]
    assert torch.equal(runs[0].a, runs[1].a)
    assert torch.equal(runs[0].b, runs[1].b)


def test_equal_ranks_without_pruning_are_fedavg() -> None:
    rng = np.random.default_rng(1)
    parts = [Part(draw_factors(rng, 4), weight) for weight in (1.0, 2.0, 5.0)]
    previous, shares = draw_factors(rng, 4), [0.125, 0.25, 0.625]
    mean = sum((s * product(p.factors) for s, p in zip(shares, parts, strict=True)), torch.zeros(()))
    for rule in ("flexlora", "rank_partitioned"):
        assert_same(product(aggregate(rule, parts, previous, 4, generator())), best_dense(mean, 4))
    assert_same(product(aggregate("stacking", parts, previous, 4, generator())), mean)
    averaged = aggregate("masked_mean", parts, previous, 4, generator())
    for side in ("a", "b"):
        expected = sum((s * getattr(p.factors, side) for s, p in zip(shares, parts, strict=True)), torch.zeros(()))
        torch.testing.assert_close(getattr(averaged, side), expected)


def test_singular_values_are_shared_by_both_factors_and_descend() -> None:
    rng = np.random.default_rng(2)
    found = aggregate("flexlora", draw_parts(rng, 4), draw_factors(rng, RANK), RANK, generator())
    a, b = found.a.double(), found.b.double()
    s = torch.linalg.svdvals(b @ a)[:RANK]
    torch.testing.assert_close(a @ a.T, torch.diag(s), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.T @ b, torch.diag(s), rtol=1e-5, atol=1e-5)
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()
    # so a device's prefix is the best approximation of its own rank
    assert_same(product(gather(found, 3)), best_dense(b @ a, 3))


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (5, 7)])  # with the last one the sum is formed
@pytest.mark.parametrize("shared", ["both", "a", "b"])
def test_directions_without_energy_are_drawn_anew_and_change_nothing(shape: tuple[int, int], shared: str) -> None:
    rng = np.random.default_rng(3)
    pair, previous = draw_factors(rng, 2, *shape), draw_factors(rng, 4, *shape)
    parts = []
    for scale in (0.5, 2.0, 1.0):
        own = draw_factors(rng, 2, *shape)
        a, b = (getattr(pair if shared in (side, "both") else own, side) for side in "ab")
        parts.append(Part(Factors(a, b * scale), 1.0))
    found = aggregate("flexlora", parts, previous, 4, generator(7))
    assert_same(product(found), dense_mean(parts, previous))
    assert (found.b[:, 2:] == 0).all()
    bound = shape[1] ** -0.5
    assert (found.a[2:].abs().amax(1) > bound / 10).all()
    assert found.a[2:].abs().max() <= bound
    other = aggregate("flexlora", parts, previous, 4, generator(8))
    assert torch.equal(other.b, found.b)
    assert not torch.equal(other.a[2:], found.a[2:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 9])
def test_an_update_of_zero_stays_zero_and_can_train(rule: Rule, count: int) -> None:
    rng = np.random.default_rng(4)
    start = draw_factors(rng, RANK)
    start = Factors(start.a, torch.zeros_like(start.b))
    parts = [Part(gather(start, rank), 1.0) for rank in [*range(2, RANK + 1)] * count]
    found = aggregate(rule, parts, start, RANK, generator())
    assert not product(found).any()
    assert (torch.linalg.vector_norm(found.a, dim=1) > 0.1).all()


@given(seed=seeds, rank=st.integers(1, RANK))
@settings(max_examples=60, deadline=None)
def test_gather_then_scatter_is_the_identity(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    whole, other = draw_factors(rng, RANK), draw_factors(rng, RANK)
    rows, columns = (draw_indices(rng, width) if rng.random() < 0.7 else None for width in (OUT, IN))
    held = gather(whole, rank, rows, columns)
    assert held.a.is_contiguous()
    assert held.b.is_contiguous()
    back = scatter(held, whole, rows, columns)
    assert torch.equal(back.a, whole.a)
    assert torch.equal(back.b, whole.b)
    again = gather(scatter(held, other, rows, columns), rank, rows, columns)
    assert torch.equal(again.a, held.a)
    assert torch.equal(again.b, held.b)
    kept_rows, kept_columns = (OUT if rows is None else len(rows)), (IN if columns is None else len(columns))
    assert (held.a.shape, held.b.shape) == ((rank, kept_columns), (kept_rows, rank))
    changed = scatter(held, other, rows, columns)
    untouched = torch.ones(RANK, IN, dtype=torch.bool)
    untouched[:rank, slice(None) if columns is None else columns] = False
    assert torch.equal(changed.a[untouched], other.a[untouched])


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("lone", [False, True])  # all devices have moved away, or one alone
@pytest.mark.parametrize("count", [3, 9])  # 9 of rank up to 6: the sum is formed
def test_devices_that_start_from_one_a_lose_no_digits(noise: float, lone: bool, count: int) -> None:
    rng = np.random.default_rng(6)
    start = draw_factors(rng, RANK)
    parts = []
    for index in range(count):
        own = draw_factors(rng, 1 + index % RANK)
        apart = noise * (index == count - 1) if lone else noise
        parts.append(Part(Factors(start.a[: own.rank] + apart * own.a, own.b), 1.0))
    assert_same(
        product(aggregate("flexlora", parts, start, RANK, generator())),
        best_dense(dense_mean(parts, start), RANK),
        3e-7,
    )


@pytest.mark.parametrize("left_over", [1e-2, 1e-4, 1e-6])
def test_devices_that_nearly_cancel_out_lose_no_digits(left_over: float) -> None:
    rng = np.random.default_rng(7)
    one, other, start = (draw_factors(rng, 3) for _ in range(3))
    parts = [Part(one, 1.0), Part(Factors(one.a + left_over * other.a, -one.b), 1.0)]
    assert_same(
        product(aggregate("flexlora", parts, start, 2, generator())), best_dense(dense_mean(parts, start), 2), 3e-7
    )


@pytest.mark.parametrize("rule", RULES)
def test_slabs_do_not_change_the_result(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    parts, previous = draw_parts(rng, 3, "columns"), draw_factors(rng, RANK)
    whole = aggregate(rule, parts, previous, 3 if rule != "masked_mean" else RANK, generator())
    monkeypatch.setattr(lowrank, "_SLAB", 40)
    slabs = aggregate(rule, parts, previous, 3 if rule != "masked_mean" else RANK, generator())
    assert_same(product(slabs), product(whole))


@pytest.mark.parametrize("cut", ["", "rows"])
def test_many_devices_on_a_wide_map(cut: str) -> None:
    rng = np.random.default_rng(13)
    shape = (260, 240)
    parts = [Part(draw_factors(rng, 4, *shape), float(weight)) for weight in range(1, 41)]
    if cut:
        kept = draw_indices(rng, 260)
        parts[0] = Part(gather(parts[0].factors, 4, kept), 1.0, kept)
    assert 128 < 40 * 4 < 240  # a Gram matrix of more than one tile, and still smaller than the map
    found = aggregate("flexlora", parts, parts[-1].factors, 8, generator())
    assert_same(product(found), best_dense(dense_mean(parts, parts[-1].factors), 8))


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_parts_are_summed_in_double(rule: Rule) -> None:
    rng = np.random.default_rng(9)
    wide, previous = draw_parts(rng, 3, "rows"), draw_factors(rng, RANK)
    half = [Part(Factors(p.factors.a.bfloat16(), p.factors.b.bfloat16()), p.weight, p.rows) for p in wide]
    same = [Part(Factors(p.factors.a.float(), p.factors.b.float()), p.weight, p.rows) for p in half]
    found, expected = (aggregate(rule, parts, previous, RANK, generator()) for parts in (half, same))
    assert found.a.dtype == torch.float32
    assert_same(product(found), product(expected), 1e-6)
    small = Factors(previous.a.bfloat16(), previous.b.bfloat16())
    found = aggregate(rule, half, small, RANK, generator())
    assert found.a.dtype == found.b.dtype == torch.bfloat16


def test_masked_mean_keeps_no_part() -> None:
    alive: list[weakref.ref[Factors]] = []

    def arriving() -> Iterator[Part]:
        rng = np.random.default_rng(0)
        for _ in range(5):
            factors = draw_factors(rng, RANK)
            assert sum(ref() is not None for ref in alive) <= 1
            alive.append(weakref.ref(factors))
            yield Part(factors, 1.0)

    aggregate("masked_mean", arriving(), draw_factors(np.random.default_rng(1), RANK), RANK, generator())
    assert len(alive) == 5


def test_a_stack_wider_than_its_map_is_compressed_without_loss() -> None:
    rng = np.random.default_rng(10)
    parts, previous = draw_parts(rng, 12), draw_factors(rng, RANK)
    found = aggregate("stacking", parts, previous, RANK, generator())
    assert found.rank == IN
    assert_same(product(found), dense_mean(parts, previous))
    stack = aggregate("stacking", parts[:2], previous, 1, generator())
    assert stack.rank == sum(part.factors.rank for part in parts[:2])
    assert stack.a.is_contiguous()
    assert stack.b.is_contiguous()
    received = truncate(found, 4, generator())
    assert received.rank == 4
    assert_same(product(received), best_dense(dense_mean(parts, previous), 4))


def test_factors_that_ask_for_gradients_leave_no_graph() -> None:
    rng = np.random.default_rng(11)
    trained = draw_factors(rng, RANK)
    previous = Factors(trained.a.requires_grad_(), trained.b.requires_grad_())
    for rule in RULES:
        found = aggregate(rule, [Part(previous, 1.0)], previous, RANK, generator())
        assert not found.a.requires_grad
        assert not found.b.requires_grad


def test_bad_input_is_one_line() -> None:
    rng = np.random.default_rng(12)
    pair = draw_factors(rng, RANK)
    whole = Part(pair, 1.0)
    rows, columns = torch.arange(OUT), torch.arange(IN)
    for rule, parts, rank, words in (
        ("fedavg", [whole], RANK, "no aggregation rule 'fedavg': there are masked_mean, flexlora"),
        ("flexlora", [], RANK, "no part"),
        ("masked_mean", [], RANK, "no part"),
        ("flexlora", [whole], 0, "1 to 20 is allowed"),
        ("flexlora", [whole], IN + 1, "1 to 20 is allowed"),
        ("masked_mean", [whole], RANK - 1, "the ranks must agree"),
        ("masked_mean", [Part(draw_factors(rng, RANK + 1), 1.0)], RANK, "up to that of the result"),
        ("flexlora", [Part(draw_factors(rng, 2, OUT - 1, IN), 1.0)], RANK, "its map has"),
        ("stacking", [Part(draw_factors(rng, 2, OUT, IN + 1), 1.0, None, torch.arange(IN + 1))], RANK, "its map has"),
        ("flexlora", [Part(pair, 1.0, rows), Part(pair, 1.0, None, columns)], RANK, "masked_mean alone"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            aggregate(rule, parts, pair, rank, generator())  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="weight"):
            Part(pair, weight)
    with pytest.raises(ConfigError, match="24 rows and 2 indices"):
        Part(pair, 1.0, torch.arange(2))
    with pytest.raises(ConfigError, match=r"\(r, d_in\)"):
        Factors(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ConfigError, match=r"\(r, d_in\)"):
        Factors(torch.zeros(0, 3), torch.zeros(4, 0))
    for rank in (0, RANK + 1):
        with pytest.raises(ConfigError, match="1 to 6 is allowed"):
            gather(pair, rank)
