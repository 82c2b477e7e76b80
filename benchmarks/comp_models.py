"""The models that :mod:`benchmarks.comp` prunes, text to calibrate and to measure them with, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_edge.errors import DataError
from fl_edge.models.quiet import quiet
from fl_edge.models.small import small_model, unseen_sources
from fl_edge.seeding import torch_rng

MODELS = ("deep-llama", "deep-qwen")
STEPS, QUICK_STEPS = 3000, 500  # the first trains to a plateau
LENGTH = 128  # tokens of a sequence, as many as in pretraining
CALIBRATION, VALIDATION, TEST = 128, 100, 300  # sequences
_GENERATED = "gencodec.py"  # made the standard library's tables of characters, which are nearly all the same
_PARTS = ("calibration", "validation", "calibration", "test")  # whose a file is, by its number in turn


@dataclass(frozen=True)
class Texts:
    """Text that a model was not trained on; no file is in two parts.

    Attributes
    ----------
    pool
        (tokens,) int64: files to draw calibration sequences from, see :meth:`calibration`.
    validation, test
        (sequences, LENGTH) int64: to choose among variants with, and to report.
    """

    pool: Tensor
    validation: Tensor
    test: Tensor

    def calibration(self, seed: int, count: int = CALIBRATION) -> Tensor:
        """Return (count, LENGTH) int64: sequences that begin anywhere in the pool. A seed is another draw."""
        starts = torch.randint(len(self.pool) - LENGTH + 1, (count, 1), generator=torch_rng(seed, "calibration"))
        return self.pool[starts + torch.arange(LENGTH)]


def load(name: str, steps: int, device: str = "cpu") -> Any:
    """Return a model of :data:`MODELS` in float32 and evaluation mode; pretrained at the first use."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(small_model(name, steps), dtype=torch.float32)
    model.config.use_cache = False
    return model.to(device).eval()


def texts(name: str, steps: int, validation: int = VALIDATION, test: int = TEST) -> Texts:
    """Return what a model was not trained on, split by file.

    Raises
    ------
    DataError
        Fewer unseen files than it takes.
    """
    parts = split(small_model(name, steps), unseen_sources(name))
    return Texts(
        parts["calibration"],
        _spread(parts["validation"], validation, "validation"),
        _spread(parts["test"], test, "test"),
    )


def split(folder: Path, sources: list[str]) -> Mapping[str, Tensor]:
    """Return the tokens of each part, (tokens,) int64: every second file calibrates, the others validate or test.

    Tables of characters are left out: they are a third of the unseen text, and the model has learned many like them.
    """
    from transformers import AutoTokenizer

    with quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.model_max_length = 10**9  # the files are far longer than what the model reads at once
        rows = tokenizer([source for source in sources if _GENERATED not in source])["input_ids"]
    by_part: dict[str, list[list[int]]] = {part: [] for part in _PARTS}
    for index, row in enumerate(rows):
        by_part[_PARTS[index % len(_PARTS)]].append([*row, tokenizer.eos_token_id])
    return {part: torch.tensor(list(chain.from_iterable(rows))) for part, rows in by_part.items()}


def _spread(tokens: Tensor, count: int, part: str) -> Tensor:
    """Return (count, LENGTH): stretches at even distances that do not overlap."""
    if len(tokens) < count * LENGTH:
        raise DataError(f"{part}={count} needs {count * LENGTH} unseen tokens; there are {len(tokens)}")
    return tokens[: len(tokens) // count * count].view(count, -1)[:, :LENGTH].clone()


def rows_at_once(sequences: Tensor, tokens: int = 4096) -> Iterator[Tensor]:
    """Yield sequences (s, n) in pieces of at most so many tokens, at least one sequence."""
    yield from torch.split(sequences, max(1, tokens // sequences.shape[1]))


@torch.inference_mode()
def perplexity(model: nn.Module, sequences: Tensor) -> float:
    """Return the perplexity of a model on sequences (s, n) int64; each token but a sequence's first counts once."""
    model.eval()
    device, loss = next(model.parameters()).device, 0.0
    for rows in rows_at_once(sequences):
        ids = rows.to(device)
        scores = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss += float(functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(loss / (len(sequences) * (sequences.shape[1] - 1)))
