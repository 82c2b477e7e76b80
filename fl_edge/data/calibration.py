"""Texts as token sequences of one length: what a language model is calibrated and tested on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_edge.errors import DataError

SUFFIXES = (".jsonl", ".md", ".py", ".txt")


def read_texts(path: Path) -> list[str]:
    """Return the texts of a file, or of the text files of a folder and those below it, in the order of their paths.

    A file is one text; each line of a ``.jsonl`` file is one, under ``text``. Empty texts are left out.

    Raises
    ------
    DataError
        Nothing there, nothing to read in it, not UTF-8, or a line that is no record with a text.
    """
    if not path.exists():
        raise DataError(f"there is no text at {path}")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{path} holds no text file; looked for {', '.join('*' + suffix for suffix in SUFFIXES)}")
    texts = [text for file in files for text in _texts(file) if text.strip()]
    if not texts:
        raise DataError(f"{path} is empty")
    return texts


def sequences(tokenizer: Any, texts: Sequence[str], length: int, count: int, generator: torch.Generator) -> Tensor:
    """Return sequences of full length, drawn from the texts without replacement.

    Parameters
    ----------
    tokenizer
        Of Hugging Face; its end token joins the texts.
    texts
        Tokenised without further special tokens, joined, and cut into sequences; what is left at the end is not used.
    length
        Tokens of a sequence.
    count
        How many; 0 for all, as where there are fewer.
    generator
        Says which, and in what order.

    Returns
    -------
    Tensor
        (s, length) int64.

    Raises
    ------
    DataError
        Not one sequence.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # verbose: a text longer than the model's input is no mistake here
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for row in rows for token in (*row, *end)], dtype=torch.int64)
    found = len(tokens) // length
    if not found:
        raise DataError(f"the text has {len(tokens)} tokens, fewer than one sequence of {length}")
    drawn = torch.randperm(found, generator=generator)[: count or found]
    return tokens[: found * length].view(found, length)[drawn]


def _texts(file: Path) -> Iterator[str]:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    if file.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise DataError(f'line {number} of {file} is no JSON record with a "text"')
            yield text
