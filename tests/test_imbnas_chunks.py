"""Evaluation in chunks: an image's row is the same to the bit, whatever it is evaluated with."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.imbnas.chunks import SIZE, chunks, in_chunks
from fl_edge.imbnas.losses import make_head
from fl_edge.imbnas.space import cifar_space, digits_space, random
from fl_edge.imbnas.supernet import Supernet
from fl_edge.seeding import numpy_rng, torch_rng


@given(st.integers(0, 3 * SIZE))
def test_chunks_hold_all_images_and_zeros(count: int) -> None:
    images = torch.arange(1.0, count + 1)[:, None]
    parts = chunks(images)
    assert all(len(part) == SIZE and not part[size:].any() for part, size in parts)
    assert torch.equal(torch.cat([images[:0], *(part[:size] for part, size in parts)]), images)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(0, 150), max_size=4))
def test_any_cut_in_any_order_gives_the_same_bits(seed: int, cuts: list[int]) -> None:
    space = [digits_space(), cifar_space(4)][seed % 2]
    supernet, head = Supernet(space, 1, torch_rng(seed)).eval(), make_head("ce", space.features, 10, torch_rng(seed))
    architecture = random(space, numpy_rng(seed))
    images = torch.randn(150, 1, 8, 8, generator=torch_rng(seed, "images"))
    order = torch.randperm(150, generator=torch_rng(seed, "order"))
    with torch.no_grad():
        whole = in_chunks(lambda part: head(supernet(part, architecture)), images)
        shards = images[order].tensor_split(sorted(cuts))
        parts = [in_chunks(lambda part: head(supernet(part, architecture)), shard) for shard in shards]
        plain = head(supernet(images, architecture))
    assert torch.equal(torch.cat(parts), whole[order])
    assert torch.allclose(whole, plain, atol=1e-5)
