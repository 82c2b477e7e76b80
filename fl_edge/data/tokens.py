"""From texts to tokens, and from rows of tokens to padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fl_edge.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that the loss of transformers leaves out
_MULTIPLE = 8  # batches are padded to a multiple of it


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None, max_length: int
) -> dict[str, list[list[int]]]:
    """Return ``input_ids`` and ``attention_mask`` of texts, or of pairs of texts, cut at ``max_length`` tokens."""
    found = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_token_type_ids=False)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def tokenize_answers(
    tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], responses: Sequence[str], max_length: int
) -> dict[str, list[list[int]]]:
    """Return tokens of instruction, line break, response, end token; only the last two have labels.

    Where both do not fit, the instruction is cut first, down to half of ``max_length``.

    Raises
    ------
    DataError
        A tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{type(tokenizer).__name__} has no end token, so it cannot mark where an answer ends")
    prompts = tokenizer([f"{text}\n" for text in instructions])["input_ids"]
    answers = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, response in zip(prompts, answers, strict=True):
        answer = [*response, tokenizer.eos_token_id]
        asked = prompt[: max(max_length - len(answer), max_length // 2)]
        tokens = [*asked, *answer][:max_length]
        rows["input_ids"].append(tokens)
        rows["attention_mask"].append([1] * len(tokens))
        rows["labels"].append([*[IGNORED] * len(asked), *tokens[len(asked) :]])
    return rows


def batches(
    dataset: Dataset, pad_id: int, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Yield batches to train on: epoch after epoch without replacement, an epoch's incomplete last batch left out.

    Parameters
    ----------
    dataset
        Columns ``input_ids``, ``attention_mask``, ``labels``.
    pad_id
        Token to pad with.
    batch_size
        Samples of a batch; all that there are where they are fewer.
    steps
        Number of batches. A smaller number gives the first ones of the same sequence.
    generator
        On the CPU; one of the run's seed, the round and the device.

    Raises
    ------
    DataError
        A data set without rows.
    """
    if not len(dataset):
        raise DataError("no samples to make batches of")
    size = min(batch_size, len(dataset))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(dataset), generator=generator)
        chosen, order = order[:size], order[size:]
        yield padded(dataset[chosen.tolist()], pad_id)


def ordered_batches(dataset: Dataset, pad_id: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield every row once, in order, as for a test."""
    for start in range(0, len(dataset), batch_size):
        yield padded(dataset[start : start + batch_size], pad_id)


def padded(rows: dict[str, Any], pad_id: int) -> dict[str, Tensor]:
    """Return rows as tensors, padded on the right to the longest one's length, rounded up to a multiple of 8.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` int64 (b, n); ``labels`` int64 (b,), or (b, n) padded with -100.
    """
    longest = max(map(len, rows["input_ids"]))
    length = -(-longest // _MULTIPLE) * _MULTIPLE
    fillers = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}

    def tensor(name: str) -> Tensor:
        values = rows[name]
        if not isinstance(values[0], Sequence):
            return torch.tensor(values)
        return torch.tensor([[*value, *[fillers[name]] * (length - len(value))] for value in values])

    return {name: tensor(name) for name in fillers}
