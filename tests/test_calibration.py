"""Texts from files, and the sequences that are cut from them: their tokens, their order, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_edge.data.calibration import read_texts, sequences
from fl_edge.errors import DataError
from fl_edge.models.vocabulary import decoder_tokenizer
from fl_edge.seeding import torch_rng

WORDS = "def alpha beta gamma return import self none while yield"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return decoder_tokenizer([WORDS] * 5, 300)


def put(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        file = folder / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    return folder


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    put(
        tmp_path,
        b_txt="second",
        a_md="first",
        c__d_py="third",
        x_bin="no text",
        e_jsonl='{"text": "4"}\n\n{"text":"5"}\n',
    )
    assert read_texts(tmp_path) == ["first", "second", "third", "4", "5"]


def test_one_file_is_one_text_whatever_its_name(tmp_path: Path) -> None:
    put(tmp_path, notes_rst="line\nline é\n")
    assert read_texts(tmp_path / "notes.rst") == ["line\nline é\n"]


def test_lines_of_records_may_hold_any_separator(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl='{"text": "one\u2028still one", "other": 1}')
    assert read_texts(tmp_path / "a.jsonl") == ["one\u2028still one"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "gone", "there is no text at"),
        (lambda folder: put(folder, x_bin="no text"), r"holds no text file; looked for \*.jsonl"),
        (lambda folder: put(folder, a_txt=" \n"), "is empty"),
        (lambda folder: put(folder, a_jsonl="") / "a.jsonl", "is empty"),
        (
            lambda folder: put(folder, a_jsonl='{"text": "fine"}\n{"body": "x"}'),
            r"line 2 of .*a.jsonl is no JSON record",
        ),
        (lambda folder: put(folder, a_jsonl='{"text": 1}'), "line 1"),
        (lambda folder: put(folder, a_jsonl="{"), "line 1"),
        (lambda folder: put(folder, a_jsonl="[1]"), "line 1"),
    ],
)
def test_what_is_no_text_is_one_line(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        read_texts(make(tmp_path))
    assert "\n" not in str(raised.value)


def test_other_encodings_are_refused_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab" + b"\xe9")
    with pytest.raises(DataError, match=r"a.txt is not UTF-8 text: byte 2 is 0xe9"):
        read_texts(tmp_path)


def test_texts_are_joined_by_the_end_token_and_cut(tokenizer: Any) -> None:
    texts = ["alpha beta", "gamma return import"]
    found = sequences(tokenizer, texts, 1, 0, torch_rng(0, "cut")).flatten().tolist()
    end = tokenizer.eos_token_id
    stream = [token for text in texts for token in (*tokenizer(text)["input_ids"], end)]
    assert sorted(found) == sorted(stream)
    assert found != stream
    assert found.count(end) == 2


@given(length=st.integers(1, 9), count=st.integers(0, 12), seed=st.integers(0, 5))
def test_sequences_are_drawn_without_replacement(tokenizer: Any, length: int, count: int, seed: int) -> None:
    stream = (*tokenizer(WORDS)["input_ids"], tokenizer.eos_token_id)
    whole = [tuple(stream[at : at + length]) for at in range(0, len(stream) - length + 1, length)]
    found = sequences(tokenizer, [WORDS], length, count, torch_rng(seed, "draw"))
    assert found.dtype == torch.int64
    assert len(found) == min(count or len(whole), len(whole))
    left = list(whole)
    for row in found.tolist():
        left.remove(tuple(row))  # raises for a row that is none, or drawn twice
    assert torch.equal(found, sequences(tokenizer, [WORDS], length, count, torch_rng(seed, "draw")))


def test_too_little_text_says_how_much_there_is(tokenizer: Any) -> None:
    many = len(tokenizer("alpha beta")["input_ids"]) + 1
    with pytest.raises(DataError, match=f"the text has {many} tokens, fewer than one sequence of {many + 1}"):
        sequences(tokenizer, ["alpha beta"], many + 1, 0, torch_rng(0, "few"))


def test_a_text_longer_than_the_model_takes_is_no_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    before, tokenizer.model_max_length = tokenizer.model_max_length, 4
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        sequences(tokenizer, [WORDS], 4, 0, torch_rng(0, "long"))
    finally:
        logger.removeHandler(caplog.handler)
        tokenizer.model_max_length = before
    assert not caplog.records


def test_a_tokenizer_without_an_end_joins_by_nothing(tokenizer: Any) -> None:
    before, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        found = sequences(tokenizer, ["alpha", "beta"], 1, 0, torch_rng(0, "end")).flatten().tolist()
    finally:
        tokenizer.eos_token = before
    assert sorted(found) == sorted(tokenizer("alpha")["input_ids"] + tokenizer("beta")["input_ids"])
