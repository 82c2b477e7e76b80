"""Tokens, labels and batches; data sets in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.data.config import TextConfig
from fl_edge.data.texts import load_text_device, load_text_test, open_texts, text_classes
from fl_edge.data.tokens import IGNORED, batches, ordered_batches, padded, tokenize_answers
from fl_edge.errors import DataError
from fl_edge.models.vocabulary import decoder_tokenizer, encoder_tokenizer
from fl_edge.seeding import torch_rng

TEXTS = [f"the {animal} number {number} is here" for number in range(10) for animal in ("cat", "dog", "eel")]
ENCODER, DECODER = encoder_tokenizer(TEXTS, 300), decoder_tokenizer(TEXTS, 300)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rows(count: int, answers: bool = False) -> Any:
    from datasets import Dataset

    ids = [[row] * (row % 11 + 1) for row in range(count)]
    labels = [[IGNORED, *row[1:]] for row in ids] if answers else list(range(count))
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
    )  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 9), st.integers(0, 3))
def test_batches_take_every_sample_once_an_epoch(count: int, size: int, steps: int, device: int) -> None:
    found = list(batches(rows(count), 99, size, steps, torch_rng(1, "batches", 2, device)))
    longer = list(batches(rows(count), 99, size, steps + 2, torch_rng(1, "batches", 2, device)))
    assert len(found) == steps
    size = min(size, count)
    assert all(len(batch["labels"]) == size for batch in found)
    for one, other in zip(found, longer, strict=False):  # the first ones do not depend on how many there are
        assert all(torch.equal(one[name], other[name]) for name in one)
    epoch = [label for batch in found[: count // size] for label in batch["labels"].tolist()]
    assert len(set(epoch)) == len(epoch)


def test_batches_follow_the_generator() -> None:
    orders = [
        torch.cat([batch["labels"] for batch in batches(rows(20), 0, 4, 5, torch_rng(1, "batches", 2, device))])
        for device in (0, 0, 1)
    ]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert sorted(orders[0].tolist()) == list(range(20))


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize(("count", "length"), [(3, 8), (8, 8), (9, 16), (11, 16)])
def test_rows_are_padded_to_a_multiple_of_eight(count: int, length: int, answers: bool) -> None:
    data = rows(count, answers)
    batch = padded(data[:], 99)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (count, length)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    for row in range(count):
        real = row % 11 + 1
        assert batch["input_ids"][row].tolist() == [row] * real + [99] * (length - real)
        assert batch["attention_mask"][row].tolist() == [1] * real + [0] * (length - real)
        if answers:
            assert batch["labels"][row].tolist() == [IGNORED] + [row] * (real - 1) + [IGNORED] * (length - real)
    if not answers:
        assert batch["labels"].tolist() == list(range(count))


def test_a_test_set_is_read_in_order() -> None:
    found = list(ordered_batches(rows(10), 0, 4))
    assert [len(batch["labels"]) for batch in found] == [4, 4, 2]
    assert torch.cat([batch["labels"] for batch in found]).tolist() == list(range(10))


def test_no_samples_make_no_batches() -> None:
    with pytest.raises(DataError, match=r"^no samples to make batches of$"):
        next(batches(rows(1).select([]), 0, 4, 1, torch_rng(1)))


@given(st.integers(4, 40), st.text(max_size=60), st.text(min_size=1, max_size=60))
def test_only_the_answer_has_labels(longest: int, instruction: str, response: str) -> None:
    found = {name: values[0] for name, values in tokenize_answers(DECODER, [instruction], [response], longest).items()}
    tokens, labels = found["input_ids"], found["labels"]
    assert len(tokens) == len(labels) == len(found["attention_mask"]) <= longest
    learnt = [token for token, label in zip(tokens, labels, strict=True) if label != IGNORED]
    asked = tokens[: len(tokens) - len(learnt)]
    assert labels == [IGNORED] * len(asked) + learnt
    answer = [*DECODER(response)["input_ids"], DECODER.eos_token_id]
    assert learnt == answer[: len(learnt)]
    question = DECODER(f"{instruction}\n")["input_ids"]
    assert asked == question[: len(asked)]
    if len(question) + len(answer) <= longest:
        assert DECODER.decode(tokens) == f"{instruction}\n{response}{DECODER.eos_token}"
    else:  # the question is cut before the answer
        assert len(learnt) == len(answer) or len(asked) <= longest // 2


def test_a_model_learns_from_the_answer_alone() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1))  # fmt: skip
    data = tokenize_answers(DECODER, ["the cat", "the dog number"], ["is here", "is"], 32)
    batch = padded(data, DECODER.pad_token_id)
    scores = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    losses = [
        -scores[row, place - 1, token]
        for row, labels in enumerate(data["labels"])
        for place, token in enumerate(labels)
        if token != IGNORED
    ]
    torch.testing.assert_close(model(**batch).loss, torch.stack(losses).mean())


def table(kind: str, folder: Path, columns: dict[str, list[Any]]) -> str:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict(columns)
    folder.mkdir()
    if kind == "disk":
        DatasetDict({"train": data, "validation": data.select(range(6))}).save_to_disk(str(folder))
    elif kind == "parquet":
        data.to_parquet(str(folder / "train.parquet"))
    elif kind == "jsonl":
        data.to_json(str(folder / "train.jsonl"))
    else:
        data.to_csv(str(folder / "train.csv"), index=False)
    return str(folder)


ANIMALS = [text.split()[1] for text in TEXTS]


@pytest.mark.filterwarnings("ignore:.*train.csv:pytest.PytestUnraisableExceptionWarning")  # datasets leaves it open
@pytest.mark.parametrize("kind", ["disk", "parquet", "jsonl", "csv"])
def test_folders_in_every_format(tmp_path: Path, kind: str) -> None:
    source = table(kind, tmp_path / "data", {"sentence": TEXTS, "label": ANIMALS, "number": list(range(30))})
    config = TextConfig(source=source, partition="iid")
    test = load_text_test(config, 1, ENCODER)
    devices = [load_text_device(config, 1, device, 3, ENCODER) for device in range(3)]
    assert text_classes(config, 1) == ["cat", "dog", "eel"]
    assert (len(test), sum(map(len, devices))) == ((6, 30) if kind == "disk" else (6, 24))
    for data in (test, *devices):
        for ids, label in zip(data["input_ids"][:], data["labels"][:], strict=True):
            assert ("cat", "dog", "eel")[label] in ENCODER.decode(ids)


def test_pairs_of_texts_are_joined(tmp_path: Path) -> None:
    source = table("jsonl", tmp_path / "data", {"a": TEXTS, "b": TEXTS[::-1], "label": ANIMALS})
    config = TextConfig(source=source, text_column="a", pair_column="b")
    first, second = (split[0] for split in open_texts(config, 1)[1].strings())
    assert load_text_test(config, 1, ENCODER)["input_ids"][0] == ENCODER(first, second)["input_ids"]


@pytest.mark.parametrize("category", ["", "kind"])
def test_instructions_from_a_folder(tmp_path: Path, category: str) -> None:
    columns: dict[str, list[Any]] = {
        "instruction": TEXTS,
        "response": TEXTS[::-1],
        "kind": ANIMALS,
        "number": list(range(30)),
    }
    source = table("jsonl", tmp_path / "data", columns)
    config = TextConfig(source=source, response_column="response", label_column=category, partition="iid")
    assert text_classes(config, 1) == (["cat", "dog", "eel"] if category else ["all"])
    test = load_text_test(config, 1, DECODER)
    assert len(test) == 6
    answer = [token for token in test["labels"][0] if token != IGNORED]
    text = str(DECODER.decode(test["input_ids"][0], skip_special_tokens=True))
    assert text == "\n".join(open_texts(config, 1)[1].rows[0][name] for name in ("instruction", "response"))
    assert text.endswith(str(DECODER.decode(answer, skip_special_tokens=True)))
    assert sum(len(load_text_device(config, 1, device, 3, DECODER)) for device in range(3)) == 24


@pytest.mark.parametrize(
    ("columns", "given", "says"),
    [
        ({"number": [1, 2], "label": [0, 1]}, {}, r"^text_column of .* is not clear, no column is of that kind"),
        ({"a": ["x"] * 9, "b": ["y"] * 9, "label": [0] * 9}, {}, r"^text_column of .* is not clear, several"),
        ({"a": ["x"] * 9, "label": [0] * 9}, {"text_column": "c"}, r"^text_column=c will not do for .*; it must be a$"),
        ({"a": ["x"] * 9}, {}, r"^label_column of .* is not clear"),
        ({"a": ["x"] * 9, "label": [0] * 9}, {"label_column": "c"}, r"^label_column=c will not do"),
        ({"a": ["x"] * 9, "label": [0] * 9}, {"pair_column": "c"}, r"^pair_column=c will not do"),
        ({"a": ["x"] * 9, "label": [0] * 9}, {"response_column": "c"}, r"^response_column=c will not do"),
        ({"a": ["x"] * 9, "b": ["x"] * 9, "label": [0] * 9}, {"response_column": "b", "label_column": "c"},
         r"^label_column=c is not in .*; it must be one of label$"),
        ({"a": ["x", None] * 9, "label": [0, 1] * 9}, {}, r"^row \d holds no text in a$"),
        ({"a": ["x"] * 9, "label": [0] * 9}, {"train_split": "c"}, r"^train_split=c is not in .*; it must be train$"),
        ({"a": [], "label": []}, {}, r"^source=.*cannot be loaded: |is empty$"),
    ],
)  # fmt: skip
def test_wrong_columns_are_named(tmp_path: Path, columns: Any, given: dict[str, str], says: str) -> None:
    source = table("jsonl", tmp_path / "data", columns)
    tokenizer = DECODER if "response_column" in given else ENCODER
    with pytest.raises(DataError, match=says) as raised:
        load_text_test(TextConfig(source=source, **given), 1, tokenizer)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ["./no/such/folder", "digits digits", "json"])
def test_unknown_sources_name_those_there_are(source: str) -> None:
    with pytest.raises(DataError, match=r"docstrings, instructions|cannot be loaded") as raised:
        load_text_test(TextConfig(source=source), 1, ENCODER)
    assert "\n" not in str(raised.value)


def test_an_answer_needs_an_end(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no end token"):
        tokenize_answers(ENCODER, ["a"], ["b"], 8)
