"""Prompts over devices: beginnings of texts that nobody trains on, or lines of a file. *Ours*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_edge.config import setting
from fl_edge.data.calibration import sequences
from fl_edge.errors import DataError
from fl_edge.seeding import numpy_rng, torch_rng


@dataclass(unsafe_hash=True)
class PromptConfig:
    """What devices ask."""

    source: str = setting("", "a file with a prompt a line, dealt to devices in turn; empty: stretches of test text")
    count: int = setting(2, "prompts of a device, at most", low=1)
    shortest: int = setting(48, "tokens of a prompt that is a stretch of text, at least", low=1)
    longest: int = setting(160, "tokens of a prompt that is a stretch of text, at most", low=1)


def device_prompts(
    config: PromptConfig, texts: Sequence[str], seed: int, index: int, count: int, tokenizer: Any
) -> list[Tensor]:
    """Return the prompts of a device, (n,) int64 each.

    Parameters
    ----------
    texts
        That stretches are taken from; not used where there is a source.
    index, count
        Which device of how many.

    Raises
    ------
    DataError
        A source that cannot be read, or that has no line for this device; texts that are too short.
    """
    if config.source:
        return [_tokens(tokenizer, line) for line in _lines(config, index, count)]
    if config.shortest > config.longest:
        raise DataError(f"prompts of {config.shortest} to {config.longest} tokens cannot be; shortest is above longest")
    stretches = sequences(tokenizer, texts, config.longest, config.count, torch_rng(seed, "prompts", index))
    lengths = numpy_rng(seed, "prompts", "lengths", index).integers(config.shortest, config.longest + 1, len(stretches))
    return [stretch[-length:] for stretch, length in zip(stretches, lengths.tolist(), strict=True)]


def _lines(config: PromptConfig, index: int, count: int) -> list[str]:
    file = Path(config.source).expanduser()
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts.source={config.source} cannot be read: {type(error).__name__}") from None
    mine = lines[index::count][: config.count]
    if not mine:
        raise DataError(f"prompts.source={config.source} has {len(lines)} prompts, none for device {index} of {count}")
    return mine


def _tokens(tokenizer: Any, line: str) -> Tensor:
    return torch.tensor(tokenizer(line)["input_ids"], dtype=torch.int64)
