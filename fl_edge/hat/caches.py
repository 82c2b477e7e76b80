"""Keys and values of the tokens that a part of the model has seen: roll-back, and branches that share a beginning.

All are transformers' own caches, with layers of full length: a sliding window is left to the mask, since a layer that
forgets cannot be rolled back. *Ours*, as is forking; that caches are cut to what was accepted is HAT's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache


def new_cache() -> DynamicCache:
    """Return an empty cache, for any number of layers."""
    return DynamicCache()


def crop(cache: DynamicCache, length: int) -> None:
    """Forget all tokens but the first.

    Parameters
    ----------
    cache
        Changed in place; tensors that others got from it are not.
    length
        Tokens to keep.

    Raises
    ------
    ValueError
        More than there are, or fewer than none.
    """
    there: int = cache.get_seq_length()
    if not 0 <= length <= there:
        raise ValueError(f"a cache of {there} tokens cannot be cropped to {length}")
    cache.crop(length - there)  # transformers takes the tokens to drop, negative


def keep_rows(cache: DynamicCache, base: int, kept: Sequence[int]) -> None:
    """Forget all tokens but the first ``base`` and some of those behind them, as after a draft tree.

    Parameters
    ----------
    cache
        Changed in place; tensors that others got from it are not.
    kept
        Tokens behind ``base``, counted from it, ascending.
    """
    if list(kept) != list(range(len(kept))):
        layers: list[Any] = cache.layers
        for layer in layers:
            rows = torch.tensor([*range(base), *(base + row for row in kept)], device=layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(2, rows), layer.values.index_select(2, rows)
    crop(cache, base + len(kept))


def fork(cache: DynamicCache, branches: int) -> DynamicCache:
    """Return a cache in which each sequence stands ``branches`` times, one after the other; the given one stays."""
    forked = _copy(cache)
    forked.batch_repeat_interleave(branches)
    return forked


def keep_branch(cache: DynamicCache, branch: int) -> DynamicCache:
    """Return a cache of one sequence of a batch; the given one stays."""
    kept = _copy(cache)
    kept.batch_select_indices(torch.tensor([branch]))
    return kept


def _copy(cache: DynamicCache) -> DynamicCache:
    """Copy the list of layers, not the tensors: a layer never writes into one, it takes a new one."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
